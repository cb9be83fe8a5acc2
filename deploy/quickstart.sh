#!/usr/bin/env bash
# Sets everything up on a fresh Debian 12 or Ubuntu machine and runs the main job: the daemon, four FSDP2 ranks that
# train a small Llama for three steps, a sync after each step into a tensor-parallel engine of two ranks, a timeline
# per phase, and the proof that the engine holds the trainer's weights. May be run again; cleans up after itself.
#   deploy/quickstart.sh                 into a real `vllm serve` (CPU), whose log-probabilities follow the trainer's
#   deploy/quickstart.sh --engine rank   into two light processes that hold parameters in vLLM's layout; no vLLM
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$ROOT"
ENGINE=vllm
case "$*" in
  "") ;;
  "--engine vllm" | "--engine rank") ENGINE="$2" ;;
  *) sed -n '2,6s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; [ "$*" = --help ] && exit 0; exit 2 ;;
esac

setup_packages
setup_python .venv torch==2.13.0 transformers==5.19.0 numpy safetensors pytest
[ "$ENGINE" = rank ] || setup_vllm .venv
setup_build release weightd weightctl weightd_client
BUILD="$ROOT/build/release"

WORK="$(mktemp -d -t weightd-quickstart-XXXXXX)"
DAEMON=0
cleanup() {
  [ "$DAEMON" -gt 0 ] && kill -TERM "$DAEMON" 2>/dev/null && wait "$DAEMON" 2>/dev/null
  rm -rf "$WORK"
}
trap cleanup EXIT

say "packing the Python wheel and installing it where only this run sees it"
.venv/bin/python client/python/build_wheel.py "$BUILD" --out "$WORK/wheel"
.venv/bin/pip install -q --disable-pip-version-check --no-deps --target "$WORK/site" "$WORK"/wheel/*.whl

say "starting the daemon"
"$BUILD/bin/weightd" --set listen.socket="$WORK/weightd.sock" --set listen.tcp= --set listen.http=127.0.0.1:0 \
  --set runtime.state_dir="$WORK/state" > "$WORK/daemon.log" 2>&1 &
DAEMON=$!
export WEIGHTD_ADDRESS="unix:$WORK/weightd.sock"
export PYTHONPATH="$WORK/site:$ROOT" TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1
for _ in $(seq 100); do
  "$BUILD/bin/weightctl" --address "$WEIGHTD_ADDRESS" health >/dev/null 2>&1 && break
  sleep 0.1
done

say "four FSDP2 ranks train; two engine ranks follow"
if ! .venv/bin/python -m deploy.quickstart.run --engine "$ENGINE" --weightctl "$BUILD/bin/weightctl"; then
  say "the daemon's log"
  cat "$WORK/daemon.log"
  exit 1
fi
say "weightctl versions"
"$BUILD/bin/weightctl" --address "$WEIGHTD_ADDRESS" versions
say "done: every version was acknowledged and proved; the proofs are above"
