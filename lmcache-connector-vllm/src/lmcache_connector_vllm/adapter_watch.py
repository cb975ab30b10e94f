"""Sees in a worker which adapters are loaded, and refuses what isn't about them.

vLLM offers no hook for that, so the methods that load and forget adapters are wrapped while the
engine runs. What is loaded is named by its files, digested before and after: if they change in
between, nobody knows what was loaded, and it has no name. Knows nothing about chunks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmcache_connector_vllm.adapters import AdapterUse, Board, Published
from lmcache_core import FileDigests, UnnamedError, adapter_identity, attempted, init_logger

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

logger = init_logger(__name__)

_LOADS = "_load_adapter"
_PATIENCE_S = 5.0
"""For another process that hashes the same adapter: requests wait for this one."""
_CHANGES = ("add_adapter", "remove_adapter", "remove_all_adapters")


@dataclass(frozen=True)
class _Loaded:
    """What is under a number: ``turn`` counts the contents that were."""

    content: str
    turn: int


class AdapterWatch:
    """See the module. One for a worker; all calls come from its thread."""

    def __init__(self, board: Board | None) -> None:
        """``board`` is what the scheduler reads: the first worker's only."""
        self._board = board
        self._digests = FileDigests(patience_s=_PATIENCE_S)
        self._loaded: dict[int, _Loaded] = {}
        self._last: dict[int, _Loaded] = {}
        self._fresh: dict[int, str] = {}
        self._contents: dict[tuple[str, str], str] = {}
        self._published = Published()
        self._replaced: list[list[str]] = []
        self._bound: dict[str, _Loaded] = {}
        self._wrapped: list[tuple[type, str, Any, Any]] = []
        self._lost = False

    # -- watching --------------------------------------------------------------------------

    def install(self) -> bool:
        """Wrap vLLM's methods; whether they are there."""
        from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager, WorkerLoRAManager

        classes = (WorkerLoRAManager, LRUCacheWorkerLoRAManager)
        found = [
            (cls, name, method)
            for cls in classes
            for name in (_LOADS, *_CHANGES)
            if (method := vars(cls).get(name)) is not None
        ]
        if not {_LOADS, *_CHANGES} <= {name for _, name, _ in found}:
            return False
        for cls, name, method in found:
            wrapper = self._loading(method) if name == _LOADS else self._changing(method)
            setattr(cls, name, wrapper)
            self._wrapped.append((cls, name, method, wrapper))
        self._publish()
        return True

    def close(self) -> None:
        """Leave vLLM as it was."""
        for cls, name, method, wrapper in self._wrapped:
            if vars(cls).get(name) is wrapper:
                setattr(cls, name, method)
        self._wrapped.clear()
        if self._board is not None:
            self._board.remove()

    def _loading(self, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def load(manager: Any, lora: LoRARequest) -> Any:
            before = self._content(lora)
            loaded = method(manager, lora)
            after = self._content(lora)
            self._note(lora, before if before == after else "")
            return loaded

        return load

    def _changing(self, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def change(manager: Any, *args: Any) -> Any:
            try:
                return method(manager, *args)
            finally:
                self._settle(manager.list_adapters())

        return change

    def _content(self, lora: LoRARequest) -> str:
        from vllm.lora.utils import get_adapter_absolute_path

        folder = attempted(get_adapter_absolute_path, lora.lora_path)
        if folder.value is None:
            return ""
        try:
            return adapter_identity(Path(folder.value), self._digests)
        except UnnamedError:
            return ""

    def _note(self, lora: LoRARequest, content: str) -> None:
        """An adapter was read, and is about to be put in its place."""
        self._fresh[lora.lora_int_id] = content
        key = (lora.lora_name, lora.lora_path)
        other = self._contents.setdefault(key, content) != content or not content
        if other and list(key) not in self._replaced:
            self._replaced = [*self._replaced, list(key)]

    def _settle(self, numbers: Iterable[int]) -> None:
        """Take in which adapters are there after a change."""
        loaded = {}
        for number in numbers:
            last = self._last.get(number, _Loaded("", 0))
            content = self._fresh.get(number)
            if content is not None and (content != last.content or not content):
                last = self._last[number] = _Loaded(content, last.turn + 1)
            loaded[number] = last
        self._fresh.clear()
        if loaded != self._loaded or self._replaced != self._published.replaced:
            self._loaded = loaded
            self._publish()

    def _publish(self) -> None:
        self._published = Published(
            loaded={str(number): one.content for number, one in self._loaded.items()},
            replaced=self._replaced,
        )
        if self._board is None or self._lost:
            return
        try:
            self._board.write(self._published)
        except OSError as error:
            self._lost = True
            self._board.remove()
            logger.warning("Requests with adapters aren't cached any more: %s", error)

    # -- checking --------------------------------------------------------------------------

    def agrees(self, request_id: str, use: AdapterUse) -> bool:
        """Whether ``use`` is what is loaded, and was for all of the request so far."""
        loaded = self._loaded.get(use.number)
        if self._lost or loaded is None or not loaded.content or loaded.content != use.content:
            # It never agrees again: what was computed meanwhile is another adapter's.
            self._bound[request_id] = _Loaded("", 0)
            return False
        return self._bound.setdefault(request_id, loaded) == loaded

    def forget(self, request_ids: Iterable[str]) -> None:
        """Requests have ended."""
        for request_id in request_ids:
            self._bound.pop(request_id, None)
