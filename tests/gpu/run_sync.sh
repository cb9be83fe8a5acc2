#!/usr/bin/env bash
# Tests and benchmarks of whole syncs on GPUs, unattended; run.sh has those of the kernels. Where there is no GPU it says why
# and ends with status 77.
#   tests/gpu/run_sync.sh             in a checkout: uses build/test
#   OUT_DIR/tests/gpu/run_sync.sh     in a folder that tests/gpu/bundle_sync.sh packed
#   --tests or --bench [CASE ...]     only these
# Logs and figures go to $WEIGHTD_RESULTS (default: a folder under /tmp), one file each.
set -uo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
bin="$root/bin"
[ -x "$bin/weightd" ] || bin="$root/build/test/bin"
python="${PYTHON:-python3}"
[ -x "$root/.venv/bin/python" ] && python="$root/.venv/bin/python"
export WEIGHTD_BIN="$bin/weightd" WEIGHTCTL_BIN="$bin/weightctl" WEIGHTD_LIBRARY="$bin/libweightd.so"
export PYTHONPATH="$root/client/python:$root" NCCL_NVLS_ENABLE=0
# The workers' NCCL is the one that torch brings.
nccl="$("$python" -c 'import importlib.util as u; s = u.find_spec("nvidia.nccl"); print(list(s.submodule_search_locations)[0] if s else "")' 2>/dev/null)"
export LD_LIBRARY_PATH="${nccl:+$nccl/lib:}${LD_LIBRARY_PATH:-}"
results="${WEIGHTD_RESULTS:-$(mktemp -d -t weightd-gpu-XXXXXX)}"
mkdir -p "$results"

reason="$("$python" -c 'from tests.support.gpu import missing_gpu; print(missing_gpu())' 2>&1)"
if [ -n "$reason" ]; then
  echo "GPU tests are skipped: $reason"
  exit 77
fi

what="${1:-}"
[ $# -gt 0 ] && shift
failed=()
run() {
  local name="$1" start=$SECONDS
  shift
  if timeout 400 "$@" > "$results/$name.log" 2>&1; then
    echo "ok      $name ($((SECONDS - start)) s)"
  else
    echo "FAILED  $name ($((SECONDS - start)) s, status $?)"
    tail -n 100 "$results/$name.log"
    failed+=("$name")
  fi
}

if [ "$what" != --bench ]; then
  for test in "$bin"/{mapping,ipc_transport}_test "$root"/build/test/tests/gpu/*/*_test; do
    [ -x "$test" ] && run "$(basename "$test")" "$test"
  done
  run end_to_end "$python" -m pytest -q -p no:cacheprovider --durations=0 "$root/tests/gpu"
fi
if [ "$what" != --tests ]; then
  # The transfer of the nccl path alone.
  for bench in "$bin/wire_bench" "$root/build/test/tests/gpu/wire/wire_bench"; do
    [ -x "$bench" ] && [ "$(nvidia-smi -L | wc -l)" -ge 2 ] || continue
    for case in "llama float32" "llama bfloat16" "moe bfloat16"; do
      # shellcheck disable=SC2086
      run "wire_bench_${case// /_}" "$bench" $case 192 256
    done
    break
  done
  run gpu_sync_bench "$python" -m tests.bench.gpu_sync_bench "$@"
  grep -h RESULT "$results"/*.log
fi
echo "logs: $results"
[ ${#failed[@]} -eq 0 ]
