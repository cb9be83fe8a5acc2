#!/usr/bin/env bash
# Packs what tests/gpu/run_sync.sh needs on a GPU machine that has neither the sources nor gRPC: stripped binaries, their shared
# libraries, the Python package and the tests. Everything finds its libraries by a path relative to itself.
#   tests/gpu/bundle_sync.sh BUILD_DIR OUT_DIR     needs patchelf
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
build="$(realpath "${1:?usage: bundle_sync.sh BUILD_DIR OUT_DIR}")"
out="$(realpath -m "${2:?usage: bundle_sync.sh BUILD_DIR OUT_DIR}")"
rm -rf "$out"
mkdir -p "$out/bin" "$out/lib"

programs=("$build"/bin/{weightd,weightctl,libweightd.so,libsleep_pool.so})
for program in mapping/{mapping_owner,mapping_test} ipc/ipc_transport_test wire/wire_bench; do
  programs+=("$build/tests/gpu/$program")
done
for program in "${programs[@]}"; do
  cp "$program" "$out/bin/"
  strip --strip-unneeded "$out/bin/$(basename "$program")"
done

system='^(ld-linux|linux-vdso|libc|libm|libpthread|libdl|librt|libresolv|libutil|libstdc\+\+|libgcc_s)[.-]'
ldd "$out"/bin/* | awk '/=> \// {print $1, $3}' | sort -u | while read -r name path; do
  [[ "$name" =~ $system ]] && continue
  cp -L "$path" "$out/lib/$name"
  chmod u+w "$out/lib/$name"
  strip --strip-unneeded "$out/lib/$name"
  patchelf --set-rpath '$ORIGIN' "$out/lib/$name"
done
for program in "$out"/bin/*; do patchelf --set-rpath '$ORIGIN/../lib' "$program"; done

mkdir -p "$out/client" "$out/tests"
cp -r "$root/client/python" "$out/client/"
cp -r "$root"/tests/{__init__.py,support,gpu,bench} "$out/tests/"
find "$out" -name __pycache__ -prune -exec rm -rf {} +
du -sh "$out" | cut -f1
