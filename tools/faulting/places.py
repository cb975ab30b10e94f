"""The tiers that a run goes over, with their servers, and what is done to these from outside.

A `Place` lives as long as the run, so that its chunks outlive the caches that are opened on it.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import redis_servers
from lm_server import RunningServer

from faulting.kinds import DEADLINE_S
from faulting.link import Link, spoilt

MAX_DEATHS = 5
"""Of an isolated tier's process, in one round: each waits longer for its successor."""


class Place:
    """What a cache is opened on. Without tiers, host memory alone."""

    outages = False
    """Whether `harm` stops or ends something."""
    policies: tuple[str, ...] = ("harness", "LRU", "LFU")
    most = 1 << 30
    """Faults in one round that there can be."""
    longest_s = 60.0
    """So long a round waits for its faults."""

    def __init__(self, folder: Path, chance: random.Random) -> None:
        self.folder = folder
        self.chance = chance
        self.counts: Counter[str] = Counter()
        folder.mkdir(parents=True)

    def tiers(self) -> dict[str, dict[str, Any]]:
        """Sections of ``backends:``, in the order of the tiers."""
        return {}

    @contextmanager
    def used(self) -> Iterator[None]:
        """What a round needs besides."""
        yield

    def annoy(self) -> None:
        """One small thing, from outside."""

    def harm(self) -> None:
        """One outage. Blocks as long as it lasts."""

    def upset(self) -> None:
        """Let things go wrong from now on."""

    def mend(self) -> None:
        """Let everything work."""

    def close(self) -> None:
        """Let go of everything."""


class HostMemory(Place):
    """No tier: what a policy does wrong is all, and that not for long."""

    policies = ("harness",)
    most, longest_s = 5, 0.5  # what it breaks counts too, and soon LRU replaces it


class Memory(Place):
    """Memory, whose calls fail."""

    def tiers(self) -> dict[str, dict[str, Any]]:
        return {"first": {"inner": "memory", "options": {"max_size_gib": 0.01}}}


class Filesystem(Place):
    """Files, which others damage, on a system whose calls fail."""

    def tiers(self) -> dict[str, dict[str, Any]]:
        options = {
            "path": str(self.folder / "files"),
            "max_size_gib": 0.02,
            "min_free_gib": 0,
            "fsync": self.chance.random() < 0.5,
        }
        return {"first": {"inner": "filesystem", "options": options}}

    def annoy(self) -> None:
        damage(self.folder / "files", self.chance, self.counts)


class Two(Filesystem):
    """Memory, and files behind it."""

    def tiers(self) -> dict[str, dict[str, Any]]:
        memory = {"inner": "memory", "options": {"max_size_gib": 0.001}}
        return {"first": memory, "second": super().tiers()["first"]}


class Isolated(Filesystem):
    """The same in a process of its own, which is killed and stopped."""

    outages = True
    _deaths = 0

    def tiers(self) -> dict[str, dict[str, Any]]:
        return {"first": {**super().tiers()["first"], "isolated": True}}

    @contextmanager
    def used(self) -> Iterator[None]:
        self._deaths = 0
        yield

    def harm(self) -> None:
        for pid in children("lmcache_core.isolation"):
            if self.chance.random() < 0.5 and self._deaths < MAX_DEATHS:
                self._deaths += 1
                self.counts["child killed"] += 1
                _signal(pid, signal.SIGKILL)
            else:
                self.counts["child stopped"] += 1
                stopped(pid, self.chance.uniform(0.1, 3 * DEADLINE_S))


class Served(Place):
    """A tier behind a link to a server, which dies, hangs, and comes back with or without data."""

    outages = True
    unix = False
    _server: Any = None

    def __init__(self, folder: Path, chance: random.Random) -> None:
        super().__init__(folder, chance)
        self.link: Link | None = None
        self._lock = threading.Lock()
        self.start()

    def start(self) -> None:
        """Start the server, at the same address each time."""
        raise NotImplementedError

    def kill(self) -> None:
        """End it as a crash does."""
        if self._server is not None:
            self._server.kill()

    @property
    def pid(self) -> int:
        return _pid(self._server and self._server.process)

    @property
    def target(self) -> int | Path:
        """Where it listens."""
        raise NotImplementedError

    @property
    def data(self) -> Path:
        """Where it keeps what outlives it."""
        return self.folder / "data"

    @contextmanager
    def used(self) -> Iterator[None]:
        at = self.folder / "link" if self.unix else None
        self.link = Link(self.target, self.chance, at=at)
        self.link.breaks = False  # a peer that talks nonsense when a cache is opened is refused
        try:
            yield
        finally:
            self.link.close()
            self.counts.update(self.link.counts)
            self.link = None
            if at is not None:
                at.unlink()

    def annoy(self) -> None:
        if self.link is not None and self.chance.random() < 0.5:
            self.link.assail()

    def harm(self) -> None:
        with self._lock:
            kind = self.chance.choice(("stopped", "stopped", "restarted", "restarted empty"))
            self.counts[f"server {kind}"] += 1
            if kind == "stopped":
                stopped(self.pid, self.chance.uniform(0.1, 3 * DEADLINE_S))
                return
            self.kill()
            if kind.endswith("empty"):
                self.forget()
            self.start()

    def forget(self) -> None:
        """Lose its data; only while it is down."""
        shutil.rmtree(self.data, ignore_errors=True)

    def upset(self) -> None:
        if self.link is not None:
            self.link.breaks = True

    def mend(self) -> None:
        if self._server is None or self._server.process.poll() is not None:
            self.start()  # an outage that went wrong
        if self.link is not None:
            self.link.calm_down()

    def close(self) -> None:
        self.kill()


class Redis(Served):
    """A real Redis server, over TCP."""

    def start(self) -> None:
        if self._server is None:
            arguments = ["--appendonly", "yes", "--maxmemory", "64mb"]
            arguments += ["--maxmemory-policy", "allkeys-lru"]
            self._server = redis_servers.Server(self.data, arguments=arguments)
        self._server.start()

    @property
    def target(self) -> int:
        return 0 if self._server is None else self._server.port

    def tiers(self) -> dict[str, dict[str, Any]]:
        port = 0 if self.link is None else self.link.port
        options = {"url": f"redis://127.0.0.1:{port}", "connect_timeout_s": 0.5, "timeout_s": 0.5}
        return {"first": {"inner": "redis", "options": options}}


class Lm(Served):
    """A real ``lmcache_server`` with a disk tier, over TCP."""

    _port = 0

    def start(self) -> None:
        options = ["--memory-gib", "0.05", "--stall-timeout", "2", "--disk-gib", "0.05"]
        options += ["--unix", str(self.folder / "unix") if self.unix else "none"]
        self.data.mkdir(exist_ok=True)
        where = ("127.0.0.1", str(self._port), str(self.data))
        for last in (False, False, True):
            try:
                self._server = RunningServer(*where, *options)
                break
            except AssertionError:  # not in half a minute: a busy machine
                if last:
                    raise
        self._port = self._server.port

    @property
    def target(self) -> int | Path:
        return self._port

    def tiers(self) -> dict[str, dict[str, Any]]:
        options: dict[str, Any] = {"stall_timeout_s": 2.0, "connect_timeout_s": 0.5}
        if self.unix:
            options["path"] = str(self.folder / "link")
        else:
            options |= {"host": "127.0.0.1", "port": self.link.port if self.link else 0}
        return {"first": {"inner": "lm", "options": options}}


class LmUnix(Lm):
    """The same over a Unix socket, and memory that both have mapped."""

    unix = True

    @property
    def target(self) -> Path:
        return self.folder / "unix"


PLACES: dict[str, Callable[[Path, random.Random], Place]] = {
    "host": HostMemory,
    "memory": Memory,
    "filesystem": Filesystem,
    "redis": Redis,
    "lm-tcp": Lm,
    "lm-unix": LmUnix,
    "isolated": Isolated,
    "two": Two,
}


def sections(place: Place, serde: str) -> dict[str, dict[str, Any]]:
    """``backends:`` of a cache on ``place``."""
    facts = {"type": "harness", "serde": serde, "deadline_s": DEADLINE_S}
    return {name: facts | section for name, section in place.tiers().items()}


def damage(folder: Path, chance: random.Random, counts: Counter[str]) -> None:
    """Do something to one of the files below ``folder``, in place, as a failing disk does."""
    path, other = _some_file(folder, chance), _some_file(folder, chance)
    if path is None or other is None:
        return
    kind = chance.choice(("bits flipped", "truncated", "emptied", "swapped", "deleted", "overlong"))
    with suppress(OSError):  # it is gone already
        data = path.read_bytes()
        if kind == "bits flipped":
            place = chance.randrange(max(1, len(data)))
            with path.open("r+b") as file:
                file.seek(place)
                file.write(spoilt(data[place : place + 1] or b"\0", chance, 1))
        elif kind == "swapped":
            temporary = path.with_name(f".{path.name}.harness")
            os.rename(path, temporary)
            os.rename(other, path)
            os.rename(temporary, other)
        elif kind == "deleted":
            path.unlink()
        elif kind == "overlong":
            with path.open("ab") as file:
                file.write(data)
        else:
            os.truncate(path, 0 if kind == "emptied" else chance.randrange(max(1, len(data))))
        counts[f"file {kind}"] += 1


def _some_file(folder: Path, chance: random.Random) -> Path | None:
    """A file three levels below ``folder``, found without looking at all of them."""
    path = folder
    with suppress(OSError):  # nothing is there, or not any more
        for _ in range(3):
            path /= chance.choice([name for name in os.listdir(path) if name[0] != "."] or [""])
        return path if path.is_file() else None
    return None


def children(module: str = "") -> list[int]:
    """This process's children, which run ``module``."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        with suppress(OSError):
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == os.getpid() and module in (entry / "cmdline").read_text():
                found.append(int(entry.name))
    return found


def stopped(pid: int, seconds: float) -> None:
    """Stop a process for a while."""
    _signal(pid, signal.SIGSTOP)
    try:
        time.sleep(seconds)
    finally:
        _signal(pid, signal.SIGCONT)


def _signal(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def _pid(process: Any) -> int:
    if process is None:
        raise RuntimeError("the server wasn't started")
    return int(process.pid)
