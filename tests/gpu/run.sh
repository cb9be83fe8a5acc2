#!/usr/bin/env bash
# Runs the GPU tests, the memory checkers and benchmark P11 unattended on a machine with a GPU.
#   tests/gpu/run.sh                       with the binaries of build/test
#   tests/gpu/run.sh --pack FOLDER         copies script, binaries, libraries and data into FOLDER, which runs
#                                          elsewhere (x86-64, a driver for CUDA 13, nothing else installed)
#   FOLDER/run.sh [tests] [sanitizer] [bench [ARGUMENTS OF box_bench]]    some of it; by default all
# Writes logs and figures (one line of JSON each) below $OUT, by default ./gpu-results. Exits 77 with the reason where
# there is no GPU, 1 if anything failed.
set -uo pipefail
HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
SANITIZED_SEEDS=2

pack() {
  local to="$1" build="$HERE/../../build/test/gpu" binary
  mkdir -p "$to/lib" "$to/data/casts" || exit 1
  cp "$HERE/run.sh" "$build"/* "$to/" && cp "$HERE"/../data/casts/* "$to/data/casts/" || exit 1
  for binary in "$build"/*; do
    # Everything but the C library, which belongs to the machine.
    ldd "$binary" | awk '$2 == "=>" { print $3 }' | grep -vE '/(libc|libm|libdl|librt|libpthread)\.so' |
      xargs -r cp -L -t "$to/lib" || exit 1
  done
  du -sh "$to"
}

if [ "${1:-}" = "--pack" ]; then
  pack "${2:?a folder}"
  exit 0
fi

BIN="$HERE"
if [ -d "$HERE/lib" ]; then
  export LD_LIBRARY_PATH="$HERE/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}" WEIGHTD_TEST_DATA="$HERE/data"
else
  BIN="$HERE/../../build/test/gpu"
fi
OUT="${OUT:-$PWD/gpu-results}"
mkdir -p "$OUT"
STEPS=" $* "
[ $# -gt 0 ] || STEPS=" tests sanitizer bench "
failed=0

step() {
  local name="$1"
  shift
  local begin=$SECONDS
  "$@" > "$OUT/$name.log" 2>&1
  local code=$?
  echo "$name: exit $code after $((SECONDS - begin)) s"
  if [ $code -eq 77 ]; then
    cat "$OUT/$name.log"
    exit 77
  fi
  if [ $code -ne 0 ]; then
    tail -n 40 "$OUT/$name.log"
    failed=1
  fi
}

nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,clocks.mem --format=csv > "$OUT/machine.log" 2>&1
cat "$OUT/machine.log"
[[ "$STEPS" == *" tests "* ]] && step tests "$BIN/gpu_test"
if [[ "$STEPS" == *" sanitizer "* ]]; then
  if command -v compute-sanitizer > "$OUT/sanitizer-path.log"; then
    export WEIGHTD_GPU_TEST_SEEDS=$SANITIZED_SEEDS
    for tool in memcheck racecheck; do
      step "$tool" compute-sanitizer --tool "$tool" --error-exitcode 1 "$BIN/gpu_test" "~boxes beyond four gigabytes*" "~errors name*"
    done
    unset WEIGHTD_GPU_TEST_SEEDS
  else
    echo "sanitizer: left out, no compute-sanitizer on the PATH"
  fi
fi
if [[ "$STEPS" == *" bench "* ]]; then
  step bench "$BIN/box_bench" ${STEPS##* bench }
  cat "$OUT/bench.log"
fi
exit $failed
