#!/usr/bin/env bash
# clang-tidy with the repository's .clang-tidy over every source of the product; prints what is wrong, exits 1 if anything is.
# Minutes, so not part of tests/run.sh. Needs clang-tidy 14 and the configured preset test (its compile_commands.json).
#   tests/tidy.sh            all files
#   tests/tidy.sh FILE...    these
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
BUILD="${WEIGHTD_BUILD_DIR:-build/test}"
FILES=("$@")
[ ${#FILES[@]} -gt 0 ] || mapfile -t FILES < <(git ls-files 'daemon/*.cc' 'client/*.cc' 'loaders/*.cc')
printf '%s\0' "${FILES[@]}" |
  xargs -0 -n 1 -P "$(nproc)" sh -c 'clang-tidy -p "$0" --quiet "$1" 2>/dev/null' "$BUILD"
