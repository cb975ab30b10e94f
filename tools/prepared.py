"""Directories that are expensive to make, made once, whole or not at all.

Knows where they live, how one is recognised as finished, how two runs keep out of each other's
way, and how a long step shows that it is alive. Knows nothing about what goes into them. Standard
library only: it runs before anything is installed.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
MARKER = ".finished"
NIXL = ("nixl", "nixl-cu12")
"""Installed without their dependencies, which are a CUDA build of torch, and numpy, which is there.
"""


class PreparationError(Exception):
    """A step failed. The message says which, shows the end of its output and names the log."""


def cache_root() -> Path:
    """Where prepared directories live: ``$LMCACHE_ENVS``, else under the user's cache folder."""
    chosen = os.environ.get("LMCACHE_ENVS")
    if chosen:
        return Path(chosen).expanduser().absolute()
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache).expanduser() if cache else Path.home() / ".cache") / "lmcache-envs"


def recipe_digest(*parts: str | bytes) -> str:
    """12 hex digits that change when any part of a recipe does."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()[:12]


def say(message: str) -> None:
    """Progress goes to stderr; stdout is for what a caller captures."""
    print(message, file=sys.stderr, flush=True)


def need_room(directory: Path, nbytes: int) -> None:
    """Say so now if there isn't room for that in ``directory``, which needn't exist.

    Raises:
        PreparationError: there isn't.
    """
    there = next(one for one in (directory, *directory.parents) if one.exists())
    free = shutil.disk_usage(there).free
    if free < nbytes:
        raise PreparationError(
            f"{directory}: this takes {nbytes / 1e9:.0f} GB while it is made, and there are "
            f"{free / 1e9:.1f} GB free. Make room, or use another place: a clone elsewhere; "
            "LMCACHE_ENVS for engines and models"
        )


def prepare(directory: Path, build: Callable[[Path], None], *, room_bytes: int = 0) -> Path:
    """Return ``directory``, calling ``build`` to fill it unless an earlier run finished that.

    The marker is written last, so a directory without one is what a killed run left behind and is
    built anew. A lock beside the directory makes a second run wait for the first.

    Raises:
        PreparationError: there is less than ``room_bytes`` for it, or ``build`` raised that.
    """
    if (directory / MARKER).exists():
        return directory
    directory.parent.mkdir(parents=True, exist_ok=True)
    with _locked(directory.with_name(directory.name + ".lock")):
        if (directory / MARKER).exists():
            return directory
        if directory.exists():
            say(f"{directory} was left unfinished; building it anew")
            shutil.rmtree(directory)
        need_room(directory, room_bytes)
        directory.mkdir()
        build(directory)
        (directory / MARKER).touch()
    return directory


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    # The file stays: removing it would let two runs hold locks on two files of one name.
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"another run is preparing {path.with_suffix('')}; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def run_step(
    title: str, command: Sequence[str | Path], log: Path, *, cwd: Path | None = None
) -> None:
    """Run one command with its output in ``log``; say that it started and, at times, that it lives.

    Raises:
        PreparationError: it couldn't be started or answered with an error.
    """
    say(f"  {title}")
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as output, _heartbeat():
        output.write(f"$ {' '.join(map(str, command))}\n")
        output.flush()
        try:
            done = subprocess.run(
                list(map(str, command)),
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                cwd=cwd,
                check=False,
            )
        except OSError as error:
            raise PreparationError(f"{title}: can't run {command[0]}: {error}") from error
    if done.returncode:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-25:])
        raise PreparationError(f"{title}: exit code {done.returncode}\n{tail}\n(all of it: {log})")


@contextlib.contextmanager
def _heartbeat(every_s: float = 20.0) -> Iterator[None]:
    finished = threading.Event()
    started = time.monotonic()

    def beat() -> None:
        while not finished.wait(every_s):
            say(f"    … {time.monotonic() - started:.0f} s")

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        finished.set()
        thread.join()
