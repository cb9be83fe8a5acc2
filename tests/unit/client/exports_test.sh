#!/bin/sh
# The shared library exports the C ABI and nothing else, and all of it: exports_test.sh LIBRARY HEADER
set -eu
exported=$(nm -D --defined-only "$1" | awk '$2 ~ /[TBDVW]/ {print $3}' | sed 's/@.*//' | sort -u)
declared=$(grep -oE '\bweightd_[a-z_]+\(' "$2" | tr -d '(' | sort -u)
if [ "$exported" != "$declared" ]; then
  echo "exported:" $exported
  echo "declared:" $declared
  exit 1
fi
