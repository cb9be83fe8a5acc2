"""The wheel builder: bundles the closure under hashed names, and gives the same bytes twice."""

from __future__ import annotations

import ctypes
import importlib.util
import platform
import shutil
import subprocess
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

_SCRIPT = Path(__file__).resolve().parents[3] / "client" / "python" / "build_wheel.py"
_TOOLS = [tool for tool in ("gcc", "patchelf", "ldd") if shutil.which(tool) is None]
needs_tools = pytest.mark.skipif(bool(_TOOLS), reason=f"not installed: {', '.join(_TOOLS)}")


@pytest.fixture(scope="module")
def builder() -> ModuleType:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("build_wheel", _SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _compile(folder: Path, name: str, code: str, *flags: str) -> None:
    source = folder / f"{name}.c"
    source.write_text(code)
    command = ["gcc", "-shared", "-fPIC", "-o", str(folder / f"{name}.so"), str(source)]
    subprocess.run([*command, f"-Wl,-rpath,{folder}", f"-L{folder}", *flags], check=True)


@pytest.fixture
def build_dir(tmp_path: Path) -> Path:
    """A build directory whose libweightd.so needs a library that no system has."""
    folder = tmp_path / "build"
    folder.mkdir()
    _compile(folder, "libdeepest", "int deepest(void) { return 41; }", "-Wl,-soname,libdeepest.so")
    _compile(
        folder,
        "libhelper",
        "int deepest(void); int helper(void) { return deepest() + 1; }",
        "-Wl,-soname,libhelper.so",
        "-ldeepest",
    )
    code = "int helper(void); int weightd_abi_version(void) { return helper(); }"
    _compile(folder, "libweightd", code, "-lhelper")
    return folder


@needs_tools
def test_wheel_is_complete_and_loads_without_the_build_directory(
    builder: ModuleType, build_dir: Path, tmp_path: Path
) -> None:
    wheel = builder.build(build_dir, tmp_path / "dist")
    assert wheel.name == f"weightd-0.1.0-py3-none-linux_{platform.machine()}.whl"
    shutil.rmtree(build_dir)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
        names = archive.namelist()
        record = archive.read("weightd-0.1.0.dist-info/RECORD").decode()
    assert sorted(line.split(",")[0] for line in record.splitlines()) == sorted(names)
    assert "weightd/vllm/__init__.py" in names
    points = (tmp_path / "site" / "weightd-0.1.0.dist-info" / "entry_points.txt").read_text()
    assert points == "[vllm.general_plugins]\nweightd = weightd.vllm:register\n"
    libraries = sorted(name for name in names if "/_lib/" in name)
    assert [name.split("/")[-1].split("-")[0] for name in libraries] == [
        "libdeepest",
        "libhelper",
        "libweightd.so",
    ]
    library = ctypes.CDLL(str(tmp_path / "site" / "weightd" / "_lib" / "libweightd.so"))
    assert library.weightd_abi_version() == 42


@needs_tools
def test_program_of_the_worker_lies_beside_the_library_and_runs(
    builder: ModuleType, build_dir: Path, tmp_path: Path
) -> None:
    (build_dir / "bin").mkdir()
    source = tmp_path / "weightd.c"
    source.write_text("int helper(void); int main(void) { return helper(); }")
    program = str(build_dir / "bin" / "weightd")
    flags = [f"-Wl,-rpath,{build_dir}", f"-L{build_dir}", "-lhelper"]
    subprocess.run(["gcc", "-o", program, str(source), *flags], check=True)
    wheel = builder.build(build_dir, tmp_path / "dist")
    shutil.rmtree(build_dir)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
        modes = {entry.filename: entry.external_attr >> 16 for entry in archive.infolist()}
    assert modes["weightd/_lib/weightd"] & 0o111  # pip keeps that
    installed = tmp_path / "site" / "weightd" / "_lib" / "weightd"
    installed.chmod(0o755)
    assert subprocess.run([str(installed)], check=False).returncode == 42


@needs_tools
def test_same_input_gives_the_same_bytes(
    builder: ModuleType, build_dir: Path, tmp_path: Path
) -> None:
    first = builder.build(build_dir, tmp_path / "one").read_bytes()
    assert builder.build(build_dir, tmp_path / "two").read_bytes() == first


@needs_tools
def test_missing_dependency_is_named(builder: ModuleType, build_dir: Path, tmp_path: Path) -> None:
    (build_dir / "libdeepest.so").unlink()
    with pytest.raises(builder.BuildError, match="libdeepest.so, which is not installed"):
        builder.build(build_dir, tmp_path / "dist")


def test_build_directory_without_the_library_is_refused(
    builder: ModuleType, tmp_path: Path
) -> None:
    with pytest.raises(builder.BuildError, match="0 files named libweightd.so"):
        builder.build(tmp_path, tmp_path / "dist")
