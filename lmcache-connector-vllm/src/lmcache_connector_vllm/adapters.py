"""Which adapter a request computes with: asked by the scheduler, known by the workers.

vLLM loads an adapter in its workers, in the step that first needs it or when it is told to, keeps
it whatever happens to its files, forgets the least recently used, and loads in place when asked
to. So a name taken from the files may not be what computes. The first worker publishes what it
has loaded (`Board`); what it hasn't is digested here, on a thread, because it will be loaded from
these files. A plan carries the digest that it was made for, and `adapter_watch` refuses what
doesn't agree with it. That check is what is exact: what is here makes it succeed.

vLLM's own prefix cache names blocks by an adapter's name and path, and keeps what was computed
before other weights were loaded under them. What rests on such blocks is left alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmcache_core import (
    AdapterFacts,
    DaemonPool,
    UnnamedError,
    adapter_identity,
    attempted,
    init_logger,
)

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.lora.request import LoRARequest
    from vllm.v1.request import Request

logger = init_logger(__name__)


@dataclass(frozen=True)
class AdapterUse:
    """Which adapter a plan was made for: vLLM's number, and what has to be loaded under it."""

    number: int
    content: str
    """`adapter_identity` of its files."""


@dataclass
class Published:
    """What a worker has loaded, as others may know it. JSON values only."""

    pid: int = 0
    loaded: dict[str, str] = field(default_factory=dict)
    """For each number, the content, or an empty string if that can't be named."""
    replaced: list[list[str]] = field(default_factory=list)
    """Names and paths under which there was more than one content."""

    @classmethod
    def of(cls, text: str) -> Published:
        """What was published as JSON.

        Raises:
            ValueError: ``text`` is anything else.
        """
        try:
            found = cls(**json.loads(text))
        except (TypeError, RecursionError) as error:
            raise ValueError(str(error)) from error
        pid = found.pid
        if not isinstance(pid, int) or not 0 <= pid < 1 << 31:
            raise ValueError(f"{pid!r} is no process")
        if not isinstance(found.loaded, dict) or not isinstance(found.replaced, list):
            raise ValueError("it isn't what a worker publishes")
        return found

    def content(self, use: AdapterUse) -> str | None:
        """What is loaded under the number, if anything is."""
        return self.loaded.get(str(use.number))


def board_folder() -> Path:
    """A folder that only this user writes in, on this machine.

    Raises:
        OSError: there is none.
    """
    folder = Path(tempfile.gettempdir(), f"lmcache-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if found.st_uid != os.getuid() or found.st_mode & 0o022 or folder.is_symlink():
        raise PermissionError(f"{folder} isn't this user's alone")
    return folder


class Board:
    """A small file on which the first worker of an engine writes and its scheduler reads."""

    def __init__(self, engine: str, folder: Callable[[], Path] = board_folder) -> None:
        self._engine = engine
        self._folder = folder
        self._file: Path | None = None
        self._seen: tuple[int, int] | None = None
        self._read = Published()

    def write(self, published: Published) -> None:
        """Replace what is on it.

        Raises:
            OSError: it can't be written. What is read then is nothing, or out of date.
        """
        published.pid = os.getpid()
        text = json.dumps(vars(published))
        place = self._place()
        fd, name = tempfile.mkstemp(dir=place.parent, prefix=".")
        with os.fdopen(fd, "w") as file:
            file.write(text)
        os.replace(name, place)

    def read(self) -> Published | None:
        """What is on it; ``None`` if nobody has written. One stat, where nothing has changed."""
        try:
            place = self._place()
            found = os.stat(place)
            if self._seen != (found.st_ino, found.st_mtime_ns):
                self._read = Published.of(place.read_text())
                self._seen = (found.st_ino, found.st_mtime_ns)
        except (OSError, ValueError):
            return None
        return self._read

    def remove(self) -> None:
        """Take it away, and what engines left behind that are gone."""
        with contextlib.suppress(OSError):
            place = self._place()
            place.unlink(missing_ok=True)
            for other in place.parent.glob("*.json"):
                if not _alive(other):
                    other.unlink(missing_ok=True)

    def _place(self) -> Path:
        if self._file is None:
            self._file = self._folder() / f"{self._engine}.json"
        return self._file


def _alive(board: Path) -> bool:
    try:
        os.kill(Published.of(board.read_text()).pid, 0)
    except (ProcessLookupError, ValueError):
        return False
    except OSError:
        pass  # somebody else's, or gone meanwhile
    return True


def adapter_facts(vllm_config: VllmConfig, lora: LoRARequest) -> dict[str, Any]:
    """What vLLM's configuration changes about every adapter; as they are by default: nothing."""
    config = vllm_config.lora_config
    if config is None:
        return {}
    dtype = str(config.lora_dtype).removeprefix("torch.")
    same = ("auto", str(vllm_config.model_config.dtype).removeprefix("torch."))
    facts = {
        "dtype": "" if dtype in same else dtype,
        "modules": sorted(config.target_modules or ()),
        "tower": config.enable_tower_connector_lora,
        "fused_experts": config.enable_mixed_moe_lora_format and lora.is_3d_lora_weight,
        "shared_experts": config.enable_moe_shared_loras,
    }
    return {name: value for name, value in facts.items() if value}


class RequestAdapter:
    """What one request computes with, as far as the scheduler can know."""

    def __init__(self, names: AdapterNames, request: Request, lora: LoRARequest) -> None:
        self.use: AdapterUse | None = None
        """``None`` while it isn't known, and if the request isn't cached."""
        self.fact = ""
        """What names it in the request's chain."""
        self._names = names
        self._request = request
        self._lora = lora
        self._until_s = names.clock() + names.deadline_s
        self._files: Future[str] | None = None
        self._planned = False

    def settle(self) -> bool:
        """Find out, until a load is planned, what will be computed with; False: ask again."""
        if self._planned:
            return True
        found = self._poll()
        if found is None:
            return False
        if found != self.use:
            self._names.note(self._lora, found)
        if isinstance(found, str):
            self.leave_alone()
        elif found != self.use:
            self.use, self.fact = found, self._names.fact(self._lora, found)
        return True

    def plan(self) -> None:
        """A load is planned, or the request begins without one: it stays with what it has."""
        self._planned = True

    def leave_alone(self) -> None:
        """The request isn't cached."""
        self.use, self.fact, self._planned = None, "", True

    def holds(self, computed: int) -> bool:
        """Whether the name is that of the ``computed`` tokens that vLLM has itself, too."""
        return not self._names.stale(self._request, self._lora, computed)

    def offered(self, asynchronous: bool) -> bool:
        """Whether something may be loaded for it.

        Once: if that fails, or vLLM preempts the request, another adapter may be loaded, and what
        is loaded for this one would be refused without end. And an asynchronous load comes before
        vLLM loads an adapter that isn't there, when nobody can check.
        """
        if self._planned or self.use is None:
            return False
        board = self._names.board.read()
        return not asynchronous or (board is not None and board.content(self.use) is not None)

    def changed(self, board: Published | None) -> bool:
        """Whether something else was loaded in its place since a load was planned."""
        if self.use is None or not self._planned or self._lora.load_inplace:
            return False  # the last are loaded anew in every step
        return board is None or board.content(self.use) not in (None, self.use.content)

    def _poll(self) -> AdapterUse | str | None:
        """A string says why nobody knows."""
        board = self._names.board.read()
        if board is None:
            return "the worker can't say what it has loaded"
        number = self._lora.lora_int_id
        loaded = board.loaded.get(str(number))
        if loaded is not None and not self._lora.load_inplace:
            return AdapterUse(number, loaded) if loaded else "nobody knows what was loaded"
        if self._files is None:
            self._files = self._names.digest(self._lora.lora_path)
        if not self._files.done():
            late = self._names.clock() > self._until_s
            return "its files weren't read in time" if late else None
        error = self._files.exception()
        return AdapterUse(number, self._files.result()) if error is None else str(error)


class AdapterNames:
    """The scheduler's half. All calls come from the scheduler's thread."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        board: Board,
        *,
        deadline_s: float,
        resolve: Callable[[str], str] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.board = board
        self.clock = clock
        self.deadline_s = deadline_s
        self._config = vllm_config
        self._resolve = resolve or _resolved
        self._pool = DaemonPool(1, "lmcache-adapters")
        self._pending: dict[str, Future[str]] = {}
        self._used: dict[tuple[str, str], str] = {}
        self._mixed: set[tuple[str, str]] = set()
        self._said: set[str] = set()

    def of(self, request: Request, cacheable: bool) -> RequestAdapter | None:
        """What is known of a request's adapter, if it has one."""
        if (lora := request.lora_request) is None:
            return None
        adapter = RequestAdapter(self, request, lora)
        if not cacheable:
            self.note(lora, "")
            adapter.leave_alone()
        return adapter

    def digest(self, path: str) -> Future[str]:
        """The content of an adapter's files; those who ask at the same time share the answer."""
        found = self._pending.get(path)
        if found is None or found.done():
            found = self._pending[path] = self._pool.submit(_digested, self._resolve, path)
            self._pending = {path: one for path, one in self._pending.items() if not one.done()}
        return found

    def fact(self, lora: LoRARequest, use: AdapterUse) -> str:
        """What names the adapter in a request's chain."""
        return AdapterFacts(use.content, adapter_facts(self._config, lora)).name()

    def note(self, lora: LoRARequest, use: AdapterUse | str) -> None:
        """A request is going to compute with ``use``; say once if it isn't cached, and why."""
        key = (lora.lora_name, lora.lora_path)
        content = use.content if isinstance(use, AdapterUse) else ""
        if self._used.setdefault(key, content) != content:
            self._mixed.add(key)
        if isinstance(use, str) and f"{key} {use}" not in self._said:
            self._said.add(f"{key} {use}")
            logger.warning("Requests with the adapter %s aren't cached: %s", lora.lora_name, use)

    def stale(self, request: Request, lora: LoRARequest, computed: int) -> bool:
        """Whether ``computed`` tokens that vLLM has itself may be another adapter's."""
        published = self.board.read()
        key = (lora.lora_name, lora.lora_path)
        if published is not None and list(key) not in published.replaced and key not in self._mixed:
            return False
        config = self._config.lora_config
        towers = config is not None and config.enable_tower_connector_lora
        return computed > 0 or bool(towers and request.mm_features)

    def close(self) -> None:
        """Let the thread end."""
        self._pool.shutdown()


def _digested(resolve: Callable[[str], str], path: str) -> str:
    folder = attempted(resolve, path)
    if folder.value is None:
        raise UnnamedError(f"{path}: {folder.error}") from folder.error
    return adapter_identity(Path(folder.value))


def _resolved(path: str) -> str:
    """The folder that vLLM loads from: of a hub's adapter, its newest download."""
    from vllm.lora.utils import get_adapter_absolute_path

    return str(get_adapter_absolute_path(path))
