"""weightd beside torch, gRPC, transformers and vLLM, in either order, before and after fork and
spawn: imports work, start no thread and open no device, and the native library still works.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.support.vllm_engine import missing_parts

pytestmark = pytest.mark.skipif(bool(missing_parts()), reason=missing_parts() or "-")

_ROOT = Path(__file__).resolve().parents[2]
# grpcio is not required by weightd or vLLM; where it is installed its own gRPC must not disturb ours.
_OTHERS = ["torch", "transformers", "vllm"] + ["grpc"] * bool(importlib.util.find_spec("grpc"))

_SCRIPT = """
import importlib, multiprocessing, os, sys

def threads():
    return sorted(os.listdir("/proc/self/task"))

def devices():
    links = [os.path.join("/proc/self/fd", name) for name in os.listdir("/proc/self/fd")]
    targets = [os.readlink(link) for link in links if os.path.islink(link)]
    return sorted(t for t in targets if t.startswith("/dev/") and t not in ("/dev/null", "/dev/tty"))

def import_weightd():
    before = (threads(), devices())
    import weightd, weightd.vllm
    assert (threads(), devices()) == before, (before, threads(), devices())
    assert "weightd._native" in sys.modules
    with open("/proc/self/maps") as maps:
        assert "libweightd" not in maps.read(), "the native library is loaded at import"

def use_native():
    from weightd import Actor, errors
    try:
        Actor("unix:/nonexistent/weightd.sock", model="m", rank=0, world_size=1, connect_timeout=0.2)
    except errors.UnavailableError:
        return 0
    raise AssertionError("an actor without a daemon")

def work(order):
    for name in order:
        import_weightd() if name == "weightd" else importlib.import_module(name)
    return use_native()

def child_of_fork(order):
    pid = os.fork()
    if pid == 0:
        try:
            code = work(order)
        except BaseException:
            import traceback
            traceback.print_exc()
            code = 1
        sys.stderr.flush()
        os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0

if __name__ == "__main__":
    order = sys.argv[2].split(",")
    if sys.argv[1] == "fork":
        child_of_fork(order)  # before any import
        work(order)
        child_of_fork([])     # after all of them, with the native library in use
    else:
        work(order)
        process = multiprocessing.get_context("spawn").Process(target=work, args=(order,))
        process.start()
        process.join()
        assert process.exitcode == 0
    print("fine")
"""


@pytest.mark.parametrize("start", ["fork", "spawn"])
@pytest.mark.parametrize("first", [True, False], ids=["weightd-first", "weightd-last"])
def test_imports_in_either_order(tmp_path: Path, start: str, first: bool) -> None:
    script = tmp_path / "imports.py"
    script.write_text(textwrap.dedent(_SCRIPT))
    order = ["weightd", *_OTHERS] if first else [*_OTHERS, "weightd"]
    environment = dict(os.environ)
    if "WEIGHTD_INSTALLED" not in environment:
        environment["PYTHONPATH"] = str(_ROOT / "client" / "python")
    run = subprocess.run(
        [sys.executable, str(script), start, ",".join(order)],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0 and "fine" in run.stdout, run.stdout + run.stderr


@pytest.mark.parametrize("used", [True, False])
def test_workers_are_spawned_where_forked_ones_could_not_connect(used: bool) -> None:
    script = "import os; from weightd import _native; from weightd.vllm import register; "
    script += "_native.library(); " * used
    script += "register(); print(os.environ.get('VLLM_WORKER_MULTIPROC_METHOD'))"
    environment = {**os.environ, "PYTHONPATH": str(_ROOT / "client" / "python")}
    environment.pop("VLLM_WORKER_MULTIPROC_METHOD", None)
    run = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=200
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split()[-1] == ("spawn" if used else "None")
