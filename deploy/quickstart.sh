#!/usr/bin/env bash
# Sets everything up on a fresh Debian 12 or Ubuntu machine and runs the main job: the daemon, four FSDP2 ranks that
# train a small Llama for three steps, a sync after each step into a tensor-parallel engine of two ranks, a timeline
# per phase, and the proof that the engine holds the trainer's weights. May be run again; cleans up after itself.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$ROOT"

setup_packages
setup_python .venv torch==2.13.0 transformers==5.19.0 numpy safetensors pytest
setup_build release weightd weightctl weightd_client
BUILD="$ROOT/build/release"

WORK="$(mktemp -d -t weightd-quickstart-XXXXXX)"
DAEMON=0
cleanup() {
  [ "$DAEMON" -gt 0 ] && kill -TERM "$DAEMON" 2>/dev/null && wait "$DAEMON" 2>/dev/null
  rm -rf "$WORK"
}
trap cleanup EXIT

say "starting the daemon"
"$BUILD/bin/weightd" --set listen.socket="$WORK/weightd.sock" --set listen.tcp= --set listen.http=127.0.0.1:0 \
  --set runtime.state_dir="$WORK/state" > "$WORK/daemon.log" 2>&1 &
DAEMON=$!
export WEIGHTD_ADDRESS="unix:$WORK/weightd.sock" WEIGHTD_LIBRARY="$BUILD/bin/libweightd.so"
export PYTHONPATH="$ROOT/client/python:$ROOT" TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1
for _ in $(seq 100); do
  "$BUILD/bin/weightctl" --address "$WEIGHTD_ADDRESS" health >/dev/null 2>&1 && break
  sleep 0.1
done

say "four FSDP2 ranks train; two engine ranks follow"
if ! .venv/bin/python -m deploy.quickstart.run --weightctl "$BUILD/bin/weightctl"; then
  say "the daemon's log"
  cat "$WORK/daemon.log"
  exit 1
fi
say "weightctl status"
"$BUILD/bin/weightctl" --address "$WEIGHTD_ADDRESS" versions
say "done: every version was acknowledged and equals the trainer's weights, bit for bit"
