#!/usr/bin/env bash
# Sets everything up and runs all tests. May be run again; leaves nothing behind but build/ and .venv.
#   tests/run.sh            everything
#   tests/run.sh --no-e2e   without the end-to-end and fault tests
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../deploy/setup.sh"
cd "$ROOT"
END_TO_END=1
[ "${1:-}" = "--no-e2e" ] && END_TO_END=0
START=$SECONDS
step() { say "[$((SECONDS - START)) s] $*"; }

setup_packages
setup_python .venv torch==2.13.0 transformers==5.19.0 numpy safetensors pytest
setup_build test all
BUILD="$ROOT/build/test"

failed=()
run() {
  local name="$1"
  shift
  step "$name"
  "$@" || failed+=("$name")
}

export WEIGHTD_BIN="$BUILD/bin/weightd" WEIGHTCTL_BIN="$BUILD/bin/weightctl"
export WEIGHTD_LIBRARY="$BUILD/bin/libweightd.so" WEIGHTD_BUILD_DIR="$BUILD"
export WEIGHTD_SHARED="${WEIGHTD_SHARED:-$ROOT/../shared}" PYTHONPATH="$ROOT/client/python:$ROOT"
PYTEST=(.venv/bin/python -m pytest -q -p no:cacheprovider)

run "the house: format, includes, sizes" "${PYTEST[@]}" tests/house
run "C++ unit tests" ctest --test-dir "$BUILD" --output-on-failure
run "Python unit tests" "${PYTEST[@]}" tests/unit/python
if [ "$END_TO_END" = 1 ]; then
  run "end to end: real trainers, daemon and engines" "${PYTEST[@]}" tests/e2e
  run "faults: kill matrix, frozen peers, catch-up" "${PYTEST[@]}" tests/faults
  setup_vllm .venv
  run "vLLM: real engines, one at a time" "${PYTEST[@]}" tests/vllm
else
  step "left out by --no-e2e: tests/e2e tests/faults tests/vllm"
fi
step "not run here: asan and tsan presets (cmake --preset asan, tsan), benchmarks (tests/bench), GPU tests (no GPU)"

if [ ${#failed[@]} -gt 0 ]; then
  printf '\nFAILED: %s\n' "${failed[@]}"
  exit 1
fi
step "all tests passed"
