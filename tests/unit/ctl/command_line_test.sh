#!/bin/sh
# Exit codes and output of the command line, as documented in client/README.md.
# Usage: command_line_test.sh WEIGHTCTL
set -u
ctl=$1
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
nobody=unix:$dir/none.sock
failed=0

# expect CODE PATTERN ARGUMENTS...: exit code, and a text in standard output or error.
expect() {
  code=$1 pattern=$2
  shift 2
  "$ctl" "$@" >"$dir/out" 2>&1
  got=$?
  if [ $got -ne "$code" ] || ! grep -q -- "$pattern" "$dir/out"; then
    echo "FAILED: weightctl $*: exit code $got, wanted $code and '$pattern' in:"
    cat "$dir/out"
    failed=1
  fi
}

expect 0 '^weightctl [0-9]' version
expect 0 '"weightctl":' version -o json
expect 0 'Exit codes: 0 ok' --help
expect 0 'interval' status --help
expect 2 'required' 
expect 0 'trace' loader check --help
expect 2 'Exit\|help' frobnicate
expect 2 'output' -o yaml status
expect 2 'timeout' --timeout 0s status
expect 2 'timeout' --timeout 5y status
expect 2 '"exit_code": 2' -o json frobnicate
expect 4 'cannot reach weightd' --address "$nobody" status
expect 4 'remedy: there is no such socket' --address "$nobody" engines
expect 4 '"reason": "DAEMON_LOST"' -o json --address "$nobody" versions
expect 4 'cannot reach weightd' health --engine e0 --address "$nobody"
expect 4 'cannot reach weightd' plan show --address "$nobody" --tensor x
WEIGHTD_ADDRESS=$nobody expect 4 'none.sock' status --timeout 3s

expect 0 'LlamaForCausalLM' loader list
expect 0 '"loaders"' loader list -o json
expect 1 'none.rules' loader check "$dir/none.rules"
expect 2 'PATH' loader check
printf 'no rule file\n' >"$dir/bad.rules"
expect 1 'bad.rules:1' loader check "$dir/bad.rules"
expect 1 '"ok": *false' loader check "$dir/bad.rules" -o json
expect 1 'bad.rules:1' loader list --loaders-dir "$dir"
expect 2 'case' plan export
expect 1 'none.json' plan export --case "$dir/none.json"
expect 1 '"exit_code": 1' plan export --case "$dir/none.json" -o json

expect 2 'DIR' push
expect 2 'version' push "$dir" --version 0
expect 1 "no file config.json in $dir" push "$dir" --address "$nobody"
expect 1 'remedy: name the directory' push "$dir/none" --address "$nobody"
expect 1 '"reason": "CHECKPOINT"' -o json push "$dir/none" --address "$nobody"
exit $failed
