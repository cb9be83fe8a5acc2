"""A daemon with failpoints, one trainer and engines around it, and what must hold after a fault."""

from __future__ import annotations

import collections
import json
import os
import signal
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Callable, Optional

from tests.support.cluster import Cluster
from tests.support.fault_roles import Player
from weightd import new_group

SURVIVOR_SECONDS = 5.0
_POLL_SECONDS = 0.01
_HIT_SECONDS = 20.0
_SETTLE_SECONDS = 15.0
_SETTINGS = '[limits]\nwindow_bytes = "4KiB"\n\n[worker]\nthreads = 1\n'
WORLD_SIZE = 2
TP_SIZE = 2


def poll(what: str, done: Callable[[], bool], seconds: float = _SETTLE_SECONDS) -> None:
    """Waits until ``done()``.

    Raises:
        AssertionError: it did not come true in time.
    """
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, f"did not happen within {seconds} s: {what}"
        time.sleep(_POLL_SECONDS)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def _descriptors(pid: int) -> collections.Counter[str]:
    """Counts the open descriptors of a process by what they are."""
    kinds: collections.Counter[str] = collections.Counter()
    for entry in os.scandir(f"/proc/{pid}/fd"):
        try:
            target = os.readlink(entry.path)
            kinds["lent" if "torch" in target else target.split(":[", 1)[0]] += 1
        except OSError:
            continue  # closed meanwhile
    return kinds


class Failpoints:
    """The folder through which a test stops daemon and worker; see daemon/base/failpoint.h."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)

    def arm(self, name: str) -> None:
        """The next process that comes to the point stops there."""
        (self.folder / f"{name}.hit").unlink(missing_ok=True)
        (self.folder / f"{name}.arm").touch()

    def wait(self, name: str) -> None:
        """Waits until a process has stopped at the point."""
        poll(f"failpoint {name} is hit", (self.folder / f"{name}.hit").exists, _HIT_SECONDS)

    def release(self, name: str) -> None:
        """Lets the process go on."""
        (self.folder / f"{name}.arm").unlink(missing_ok=True)


class Scene:
    """One model with a trainer of two ranks and engine ``e0`` of two ranks, as processes.

    Attributes:
        cluster: the daemon.
        points: its failpoints.
        actors: by rank.
        engines: by (engine name, tensor-parallel rank).
    """

    model = "m"

    def __init__(
        self,
        folder: Path,
        settings: str = "",
        devices: tuple[str, ...] = ("host",),
        worker: str = "daemon",
        staged_engines: bool = False,
        pulled_engines: str = "",
    ) -> None:
        """Starts the daemon.

        Args:
            folder: of the failpoints.
            settings: TOML appended to the configuration, whole sections.
            devices: that the daemon serves, one worker each. Trainer rank i and, from the end,
                engine rank i have their memory on the i-th of them.
            worker: ``spawn``: the daemon serves none of them, ranks start the workers; their
                sockets are under ``sockets``.
            staged_engines: engines receive their projections in stages.
            pulled_engines: ``some`` or ``all`` parameters of engines lie in memory that no worker
                can map.
        """
        self._spawns: dict[str, Any] = {}
        self.sockets = folder / "run"
        if worker == "spawn":
            self.sockets.mkdir()
            environment = {
                "WEIGHTD_FAILPOINT_DIR": str(folder / "points"),
                "XDG_RUNTIME_DIR": str(self.sockets),
            }
            self._spawns = {"worker": worker, "environment": environment}
        self.devices = devices
        self._of_engines = {"staged": staged_engines, "pulled": pulled_engines}
        self.points = Failpoints(folder / "points")
        os.environ["WEIGHTD_FAILPOINT_DIR"] = str(self.points.folder)
        try:
            self.cluster = Cluster(
                f"{_SETTINGS}devices = {json.dumps([] if self._spawns else devices)}\n\n{settings}"
            )
        finally:
            del os.environ["WEIGHTD_FAILPOINT_DIR"]
        self.actors: dict[int, Player] = {}
        self.engines: dict[tuple[str, int], Player] = {}
        self._players: list[Player] = []
        self._settings = settings
        self._pids: set[int] = set()

    # ---- who takes part

    def start_daemon(self) -> None:
        """Starts the daemon again after it was killed."""
        os.environ["WEIGHTD_FAILPOINT_DIR"] = str(self.points.folder)
        try:
            self.cluster.start_daemon()
        finally:
            del os.environ["WEIGHTD_FAILPOINT_DIR"]

    def start_actors(self, staged: bool = False) -> None:
        """Starts a trainer; an earlier one is superseded."""
        group = new_group()
        for rank in range(WORLD_SIZE):
            self.begin_actor(rank, group, staged)
        for actor in self.actors.values():
            actor.answer()

    def begin_actor(self, rank: int, group: str, staged: bool = False) -> Player:
        """Starts one rank of a trainer, which then registers."""
        actor = self._player(f"actor {rank}", "actor")
        self.actors[rank] = actor
        actor.begin(
            "register",
            address=self.cluster.address,
            model=self.model,
            group=group,
            rank=rank,
            world_size=WORLD_SIZE,
            staged=staged,
            device=self.devices[rank % len(self.devices)],
            **self._spawns,
        )
        return actor

    def start_engine(self, engine: str = "e0") -> None:
        """Starts every rank of an engine."""
        ranks = [self.begin_engine(tp_rank, engine) for tp_rank in range(TP_SIZE)]
        for rank in ranks:
            rank.answer()

    def begin_engine(
        self, tp_rank: int, engine: str = "e0", device: Optional[str] = None
    ) -> Player:
        """Starts one rank of an engine, which then registers; its memory lies as `Scene` says."""
        player = self._player(f"engine {engine} tp {tp_rank}", "engine")
        self.engines[engine, tp_rank] = player
        player.begin(
            "register",
            address=self.cluster.address,
            model=self.model,
            engine=engine,
            tp_rank=tp_rank,
            tp_size=TP_SIZE,
            device=device or self.devices[(tp_rank - TP_SIZE) % len(self.devices)],
            **self._spawns,
            **self._of_engines,
        )
        return player

    def _player(self, name: str, role: str) -> Player:
        player = Player(name, role)
        self._players.append(player)
        self._pids.add(player.pid)
        return player

    # ---- syncs

    def begin_sync(self, version: int, **options: Any) -> None:
        """Lets every actor call sync()."""
        for actor in self.actors.values():
            actor.begin("sync", version=version, **options)

    def sync(self, version: int, **options: Any) -> list[dict[str, Any]]:
        """Syncs on all actors; returns what each got."""
        self.begin_sync(version, **options)
        return [actor.answer() for actor in self.actors.values()]

    def sync_ok(self, version: int, engines: tuple[str, ...] = ("e0",)) -> None:
        """Syncs and checks, bit by bit, that every rank of every engine holds the version."""
        for answer in self.sync(version):
            assert answer["ack"] is not None, f"{answer}\n{self.cluster.logs()}"
            committed = {r["engine"] for r in answer["ack"] if r["committed"]}
            assert committed == set(engines), answer
        self.assert_serving(version, engines)

    def assert_serving(self, version: int, engines: tuple[str, ...] = ("e0",)) -> None:
        """Every rank of the engines serves exactly this version, and the daemon says so."""
        for (engine, _), player in self.engines.items():
            if engine not in engines:
                continue
            state = player.call("wait", version=version)
            assert (state["state"], state["version"]) == ("SERVING", version), state
            assert player.call("differences", version=version) == []
        for engine in engines:
            shown = self.engine_status(engine)
            assert (shown["state"], shown["version"], shown["ready"]) == (
                "SERVING",
                version,
                True,
            ), shown

    # ---- what the daemon shows

    def status(self) -> dict[str, Any]:
        """What ``weightctl status -o json`` prints."""
        command = [weightctl(), "--address", self.cluster.address, "status", "-o", "json"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def model_status(self) -> dict[str, Any]:
        """The part of the status that is about this scene's model."""
        found = [model for model in self.status()["models"] if model["model"] == self.model]
        return found[0] if found else {}

    def engine_status(self, engine: str = "e0") -> dict[str, Any]:
        """State, version and readiness of an engine, as integers and names without prefix."""
        for shown in self.model_status().get("engines", []):
            if shown["engine"] == engine:
                return {
                    "state": shown["state"].removeprefix("ENGINE_STATE_"),
                    "version": int(shown.get("version", 0)),
                    "ready": bool(shown.get("ready", False)),
                    "registered": int(shown.get("registered", 0)),
                }
        return {"state": "GONE", "version": 0, "ready": False, "registered": 0}

    def registered_actors(self) -> int:
        """Ranks of the current trainer group that are registered."""
        return int(self.model_status().get("actors", {}).get("registered", 0))

    def worker(self, device: str = "host") -> dict[str, Any]:
        """The worker of a device as the daemon shows it."""
        workers = [worker for worker in self.status()["workers"] if worker["device"] == device]
        return workers[0] if workers else {}

    def worker_pid(self, device: str = "host") -> int:
        """Process id of the device's attached worker; waits for one."""
        poll("a worker is attached", lambda: bool(self.worker(device).get("attached")))
        pid = int(self.worker(device)["pid"])
        self._pids.add(pid)
        return pid

    # ---- what must hold

    def assert_truthful(self) -> None:
        """No rank that reports ready holds anything but exactly the version that it reports."""
        living = {key: player for key, player in self.engines.items() if _alive(player.pid)}
        for key, player in living.items():
            state = player.call("state")
            poisoned = state["state"] == "POISONED"
            assert not (state["state"] == "SERVING" and state["dirty"]), (key, state)
            assert state["dirty"] or not poisoned, (key, state)
            if state["state"] == "SERVING":
                assert player.call("differences", version=state["version"]) == [], (key, state)
        for engine in {name for name, _ in self.engines}:
            shown = self.engine_status(engine)
            assert shown["ready"] == (shown["state"] == "SERVING"), shown
            if not shown["ready"]:
                continue
            for tp_rank in range(TP_SIZE):
                player = living[engine, tp_rank]
                assert player.call("differences", version=shown["version"]) == [], shown

    def descriptors(self) -> dict[str, collections.Counter[str]]:
        """Open descriptors of daemon and worker."""
        return {
            "daemon": _descriptors(self.cluster.daemon_pid),
            "worker": _descriptors(self.worker_pid()),
        }

    def assert_descriptors(self, before: dict[str, collections.Counter[str]]) -> None:
        """Daemon and worker have as many descriptors of each kind as before."""
        now = before

        def same() -> bool:
            nonlocal now
            now = self.descriptors()
            return now == before

        try:
            poll("descriptors are as before", same)
        except AssertionError:
            assert now == before

    def assert_sockets(self) -> None:
        """The runtime folder has the daemon's socket and its living workers', and no other."""
        for device in self.devices:
            self.worker_pid(device)
        names = {path.name for path in self.cluster.folder.glob("*.sock")}
        assert "weightd.sock" in names and len(names) == 1 + len(self.devices), names
        for device in self.devices:
            start = f"worker-{device}-{self.cluster.daemon_pid}-"
            assert any(name.startswith(start) for name in names), names

    def close(self) -> None:
        """Ends everything and checks that nothing is left."""
        for player in self._players:
            player.close()
        self._pids.add(self.cluster.daemon_pid)
        self.cluster.stop_daemon(signal.SIGTERM)
        left = sorted(path.name for path in self.cluster.folder.glob("*.sock"))
        left += [path.name for path in self.sockets.glob("*")]
        processes = [pid for pid in self._pids if _alive(pid)]
        marks = [f"_{pid}_" for pid in self._pids]
        shared = [
            name for name in os.listdir("/dev/shm") if any(mark in f"{name}_" for mark in marks)
        ]
        self.cluster.close()
        assert (left, processes, shared) == ([], [], [])

    def __enter__(self) -> Scene:
        return self

    def __exit__(
        self,
        kind: Optional[type[BaseException]],
        error: Optional[BaseException],
        trace: Optional[TracebackType],
    ) -> None:
        if error is None:
            self.close()
            return
        error.add_note(self.cluster.logs()) if hasattr(error, "add_note") else None
        for player in self._players:
            player.kill()
        self.cluster.close()


def weightctl() -> str:
    """Path of the operator CLI: WEIGHTCTL, or the one that was built beside the client library."""
    if "WEIGHTCTL" in os.environ:
        return os.environ["WEIGHTCTL"]
    library = Path(os.environ["WEIGHTD_LIBRARY"])
    places = (library.parent / "weightctl", library.parents[1] / "ctl" / "weightctl")
    return str(next((path for path in places if path.is_file()), places[0]))
