#!/usr/bin/env bash
# Sets everything up and runs all tests. May be run again; leaves nothing behind but build/ and .venv.
#   tests/run.sh                   everything but the breadth of vLLM's architectures
#   WEIGHTD_FULL=1 tests/run.sh    that, too: half an hour or more on two cores
#   tests/run.sh --no-e2e          without the end-to-end and fault tests
# Installing Python packages and building run side by side, and so do two rows of tests, most of which
# wait or use one core. A step beside others prints its output when it is waited for.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../deploy/setup.sh"
cd "$ROOT"
END_TO_END=1
[ "${1:-}" = "--no-e2e" ] && END_TO_END=0
START=$SECONDS
step() { say "[$((SECONDS - START)) s] $*"; }

failed=()
run() {
  local name="$1"
  shift
  step "$name"
  "$@" || failed+=("$name")
}

# beside NAME COMMAND...: starts it; joined NAME: waits for it, prints what it wrote, is its status.
LOGS="$(mktemp -d -t weightd-tests-XXXXXX)"
declare -A beside_pid
stop_all() {
  local pid
  for pid in "${beside_pid[@]}"; do kill -- "-$pid" 2>/dev/null || true; done
  rm -rf "$LOGS"
}
trap stop_all EXIT
beside() {
  local name="$1"
  shift
  step "$name: starts beside the next steps"
  set -m  # a process group of its own, so that stop_all finds its children
  (
    begin=$SECONDS
    trap 'say "$name took $((SECONDS - begin)) s"' EXIT
    "$@"
  ) > "$LOGS/$name" 2>&1 < /dev/null &
  beside_pid["$name"]=$!
  set +m
}
joined() {
  local status=0
  wait "${beside_pid[$1]}" || status=$?
  unset "beside_pid[$1]"
  step "$1"
  cat "$LOGS/$1"
  return "$status"
}

install_python() {
  setup_python .venv torch==2.13.0 transformers==5.19.0 numpy safetensors pytest
  if [ "$END_TO_END" = 1 ]; then setup_vllm .venv; fi
}

setup_packages
beside "Python packages" install_python
setup_build test all
BUILD="$ROOT/build/test"
joined "Python packages"

export WEIGHTD_BIN="$BUILD/bin/weightd" WEIGHTCTL_BIN="$BUILD/bin/weightctl"
export WEIGHTD_LIBRARY="$BUILD/bin/libweightd.so" WEIGHTD_BUILD_DIR="$BUILD"
export WEIGHTD_SHARED="${WEIGHTD_SHARED:-$ROOT/../shared}" PYTHONPATH="$ROOT/client/python:$ROOT"
PYTEST=(.venv/bin/python -m pytest -q -p no:cacheprovider --durations=10 --durations-min=5)
NO_ENGINE=(tests/vllm/test_{convert,imports,quiet_wait,shadow,trace_cost,trace_golden,trainer}.py)

run "the house: format, includes, sizes" "${PYTEST[@]}" tests/house
beside "Python unit tests" "${PYTEST[@]}" tests/unit/python
run "C++ unit tests" ctest --test-dir "$BUILD" --output-on-failure
if [ "$END_TO_END" = 1 ]; then
  run "end to end: real trainers, daemon and engines" "${PYTEST[@]}" tests/e2e
  joined "Python unit tests" || failed+=("Python unit tests")
  beside "vLLM's own parts, without engines" "${PYTEST[@]}" "${NO_ENGINE[@]}"
  run "faults: kill matrix, frozen peers, catch-up" "${PYTEST[@]}" tests/faults
  joined "vLLM's own parts, without engines" || failed+=("vLLM's own parts, without engines")
  run "vLLM: real engines, one at a time" "${PYTEST[@]}" tests/vllm "${NO_ENGINE[@]/#/--ignore=}"
  if [ "${WEIGHTD_FULL:-}" != 1 ]; then
    step "left out without WEIGHTD_FULL=1: the cases that tests/vllm/test_architectures.py named above"
  fi
else
  joined "Python unit tests" || failed+=("Python unit tests")
  step "left out by --no-e2e: tests/e2e tests/faults tests/vllm"
fi
step "not run here: asan and tsan presets (cmake --preset asan, tsan), benchmarks (tests/bench), GPU tests (no GPU)"

if [ ${#failed[@]} -gt 0 ]; then
  printf '\nFAILED: %s\n' "${failed[@]}"
  exit 1
fi
step "all tests passed"
