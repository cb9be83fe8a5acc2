#!/usr/bin/env python3
"""Builds the weightd wheel: the Python package, libweightd.so, the program of the worker and every
library that they need.

    build_wheel.py BUILD_DIR [--out dist]

BUILD_DIR is a CMake build directory with a built libweightd.so; if it has a built weightd, that lies
beside the library, where `worker="spawn"` finds it. The wheel is pure ctypes, so one
serves every Python from 3.10 on. Libraries that are not part of glibc or of the compiler's runtime
are copied beside libweightd.so under names that carry a hash of their content, so that they never
meet another copy of gRPC in the same process. The same inputs give the same bytes. Needs ldd and
patchelf.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import os
import platform
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE_DIR = Path(__file__).resolve().parent
LIBRARY = "libweightd.so"
PROGRAM = "weightd"
LIBRARY_DIR = "weightd/_lib"
# Part of every glibc system, or (libstdc++, libgcc_s) of every system that can load torch.
SYSTEM_LIBRARIES = re.compile(
    r"(ld-linux[\w.-]*|linux-vdso|libc|libm|libpthread|libdl|librt|libresolv|libutil|libnsl|libanl"
    r"|libstdc\+\+|libgcc_s)\.so(\.[\d.]+)?$"
)
# The oldest time that a zip archive can hold; with it archives do not depend on when they are made.
ZIP_TIME = (1980, 1, 1, 0, 0, 0)


class BuildError(Exception):
    """A wheel cannot be built; the message says why and what to do."""


def project_field(name: str) -> str:
    """Reads one quoted value of the [project] table of pyproject.toml."""
    text = (PACKAGE_DIR / "pyproject.toml").read_text(encoding="utf-8")
    match = re.search(rf'^{re.escape(name)} = "([^"]*)"', text, re.MULTILINE)
    if match is None:
        raise BuildError(f"pyproject.toml has no {name}; add it to its [project] table")
    return match.group(1)


def entry_points() -> str:
    """Returns the entry points of pyproject.toml as a wheel states them."""
    text = (PACKAGE_DIR / "pyproject.toml").read_text(encoding="utf-8")
    groups = re.findall(
        r'^\[project\.entry-points\."([^"]+)"\]\n((?:[^\[\n].*\n)*)', text, re.MULTILINE
    )
    return "".join(f"[{name}]\n{body.replace(chr(34), '')}" for name, body in groups)


def run(*command: str) -> str:
    """Runs a tool and returns what it printed.

    Raises:
        BuildError: it is not installed or failed.
    """
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
    except FileNotFoundError as cause:
        raise BuildError(f"{command[0]} is missing; apt-get install {command[0]}") from cause
    except subprocess.CalledProcessError as cause:
        raise BuildError(f"{' '.join(command)} failed: {cause.stderr.strip()}") from cause


def find_library(build_dir: Path) -> Path:
    """Returns the libweightd.so of a build directory.

    Raises:
        BuildError: there is none, or several.
    """
    found = sorted(path.resolve() for path in build_dir.rglob(LIBRARY))
    unique = sorted(set(found))
    if len(unique) != 1:
        raise BuildError(
            f"{len(unique)} files named {LIBRARY} under {build_dir}; build the client library "
            "first and give its own build directory"
        )
    return unique[0]


def needed(library: Path) -> list[str]:
    """Returns the names of the libraries that one library links directly."""
    return run("patchelf", "--print-needed", str(library)).split()


def resolve(library: Path) -> dict[str, Path]:
    """Returns where the loader finds each library of the closure that has to be bundled.

    Raises:
        BuildError: one is not found.
    """
    places: dict[str, Path] = {}
    for line in run("ldd", str(library)).splitlines():
        name, arrow, rest = line.strip().partition(" => ")
        if not arrow or SYSTEM_LIBRARIES.match(name):
            continue
        if rest.startswith("not found"):
            raise BuildError(f"{library.name} needs {name}, which is not installed; install it")
        places[name] = Path(rest.split(" (")[0]).resolve()
    return places


def hashed_name(soname: str, content: bytes) -> str:
    """Returns e.g. libgrpc-1a2b3c4d.so.29 for libgrpc.so.29."""
    stem, _, version = soname.partition(".so")
    return f"{stem}-{hashlib.sha256(content).hexdigest()[:8]}.so{version}"


def bundle(library: Path, program: Path, folder: Path) -> None:
    """Copies the library, the program if it is there, and their closure into a folder.

    Closure libraries are renamed, and everything is linked to what lies there.
    """
    roots = {LIBRARY: library}
    if program.is_file():
        roots[PROGRAM] = program
    places = {soname: path for root in roots.values() for soname, path in resolve(root).items()}
    names = {soname: hashed_name(soname, path.read_bytes()) for soname, path in places.items()}
    copies = {names[soname]: path for soname, path in places.items()} | roots
    for name, source in sorted(copies.items()):
        target = folder / name
        shutil.copyfile(source, target)
        target.chmod(0o755)
        renames = [(old, names[old]) for old in needed(target) if old in names]
        arguments = [part for old, new in renames for part in ("--replace-needed", old, new)]
        # One operation a call: patchelf ignores others beside --set-soname.
        if name != PROGRAM:
            run("patchelf", "--set-soname", name, str(target))
        if arguments:
            run("patchelf", *arguments, str(target))
        run("patchelf", "--set-rpath", "$ORIGIN", str(target))


def check_bundle(folder: Path) -> None:
    """Makes sure that the folder needs nothing but itself and the system's libraries."""
    present = {path.name for path in folder.iterdir()}
    for path in sorted(folder.iterdir()):
        missing = [n for n in needed(path) if n not in present and not SYSTEM_LIBRARIES.match(n)]
        if missing:
            raise BuildError(
                f"{path.name} would need {', '.join(missing)} from outside of the wheel"
            )


def metadata(tag: str) -> dict[str, bytes]:
    """Returns the files of the wheel's dist-info folder, without RECORD."""
    name, version = project_field("name"), project_field("version")
    folder = f"{name}-{version}.dist-info"
    info = (
        f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        f"Summary: {project_field('description')}\nLicense: Apache-2.0\n"
        f"Requires-Python: {project_field('requires-python')}\n"
    )
    wheel = (
        f"Wheel-Version: 1.0\nGenerator: weightd build_wheel\nRoot-Is-Purelib: false\nTag: {tag}\n"
    )
    files = {
        f"{folder}/METADATA": info.encode(),
        f"{folder}/WHEEL": wheel.encode(),
        f"{folder}/entry_points.txt": entry_points().encode(),
    }
    licence = PACKAGE_DIR.parents[1] / "LICENSE"
    if licence.is_file():
        files[f"{folder}/LICENSE"] = licence.read_bytes()
    return files


def record(files: dict[str, bytes], path: str) -> bytes:
    """Returns RECORD: path, hash and size of every file."""
    lines = []
    for name, content in sorted(files.items()):
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        lines.append(f"{name},sha256={digest},{len(content)}")
    return "\n".join([*lines, f"{path},,", ""]).encode()


def write_wheel(path: Path, files: dict[str, bytes]) -> None:
    """Writes the archive (entries sorted, fixed times and modes) and moves it into place."""
    partial = path.with_suffix(".partial")
    with zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED, compresslevel=6) as archive:
        for name, content in sorted(files.items()):
            entry = zipfile.ZipInfo(name, ZIP_TIME)
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.create_system = 3
            mode = 0o755 if name == f"{LIBRARY_DIR}/{PROGRAM}" else 0o644
            entry.external_attr = (stat.S_IFREG | mode) << 16
            archive.writestr(entry, content)
    os.replace(partial, path)


def build(build_dir: Path, out: Path) -> Path:
    """Builds the wheel and returns its path.

    Raises:
        BuildError: see the message.
    """
    tag = f"py3-none-linux_{platform.machine()}"
    files = metadata(tag)
    for path in sorted((PACKAGE_DIR / "weightd").rglob("*")):
        if path.suffix == ".py" or path.name == "py.typed":
            files[path.relative_to(PACKAGE_DIR).as_posix()] = path.read_bytes()
    with tempfile.TemporaryDirectory(prefix="weightd-wheel-") as name:
        folder = Path(name)
        bundle(find_library(build_dir), build_dir / "bin" / PROGRAM, folder)
        check_bundle(folder)
        for path in sorted(folder.iterdir()):
            files[f"{LIBRARY_DIR}/{path.name}"] = path.read_bytes()
    project, version = project_field("name"), project_field("version")
    listing = f"{project}-{version}.dist-info/RECORD"
    files[listing] = record(files, listing)
    out.mkdir(parents=True, exist_ok=True)
    wheel = out / f"{project}-{version}-{tag}.whl"
    write_wheel(wheel, files)
    return wheel


def main() -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("build_dir", type=Path, help="CMake build directory with libweightd.so")
    parser.add_argument("--out", type=Path, default=Path("dist"), help="folder for the wheel")
    arguments = parser.parse_args()
    try:
        wheel = build(arguments.build_dir, arguments.out)
    except BuildError as error:
        print(f"build_wheel: {error}", file=sys.stderr)
        return 1
    print(f"{wheel} ({wheel.stat().st_size / 1e6:.1f} MB)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
