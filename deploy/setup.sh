#!/usr/bin/env bash
# Set-up shared by deploy/quickstart.sh and tests/run.sh. Source it; it only defines functions and ROOT.
#   setup_packages            Debian packages, if any is missing (needs root or sudo)
#   setup_python VENV PKG...  a virtual environment with these packages
#   setup_build PRESET TARGET...  configures and builds
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

PACKAGES=(g++ cmake ninja-build ccache pkg-config git ca-certificates patchelf
  libgrpc++-dev protobuf-compiler-grpc protobuf-compiler libprotobuf-dev libspdlog-dev libcli11-dev
  libtomlplusplus-dev prometheus-cpp-dev libcivetweb-dev nlohmann-json3-dev libxxhash-dev
  libsystemd-dev zlib1g-dev catch2 libbenchmark-dev clang-format python3 python3-venv)

say() { printf '\n==> %s\n' "$*"; }

setup_packages() {
  local missing=()
  for package in "${PACKAGES[@]}"; do
    dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
  done
  [ ${#missing[@]} -eq 0 ] && return 0
  say "installing ${#missing[@]} Debian packages: ${missing[*]}"
  local sudo=()
  [ "$(id -u)" -eq 0 ] || sudo=(sudo)
  "${sudo[@]}" apt-get update -qq
  DEBIAN_FRONTEND=noninteractive "${sudo[@]}" apt-get install -y -qq --no-install-recommends \
    "${missing[@]}" >/dev/null
}

setup_python() {
  local venv="$1"
  shift
  local stamp="$venv/.weightd-packages"
  if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$*" ]; then return 0; fi
  say "Python environment $venv: $*"
  python3 -m venv "$venv"
  "$venv/bin/pip" install -q --disable-pip-version-check "$@"
  echo "$*" > "$stamp"
}

setup_build() {
  local preset="$1"
  shift
  say "building preset $preset: $*"
  # Objects are found again by other checkouts of the same sources.
  export CCACHE_BASEDIR="$ROOT" CCACHE_NOHASHDIR=1
  (cd "$ROOT" && cmake --preset "$preset" >/dev/null && cmake --build --preset "$preset" --target "$@" -- --quiet)
}
