"""Stops coroutines at each of their awaits, to see what becomes of a request that ends there.

Nothing in the code under test is touched: an event loop's task factory wraps coroutines of the
modules in question, and sees every time that one of them waits. Where it waits is a chain of
`Point`s, from the task's outermost coroutine to the innermost, each named by its function, by
what it awaits, and by how many such awaits the function has before; not by lines.
"""

from __future__ import annotations

import ast
import asyncio
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import CoroutineType, ModuleType
from typing import Any

Chain = tuple[str, ...]


@dataclass(frozen=True)
class Point:
    """One ``await`` of the source."""

    name: str
    first: int
    last: int
    awaited: str


class Sources:
    """The awaits of modules, as their source has them."""

    def __init__(self, modules: Iterable[ModuleType]) -> None:
        self._functions: dict[tuple[str, int], list[Point]] = {}
        self.names: set[str] = set()
        for module in modules:
            assert module.__file__
            tree = ast.parse(Path(module.__file__).read_text())
            self._visit(tree, module.__file__, module.__name__.rpartition(".")[2], [])

    def has(self, coro: object) -> bool:
        """Whether a coroutine is one of these modules'."""
        if not isinstance(coro, CoroutineType):
            return False
        return (coro.cr_code.co_filename, coro.cr_code.co_firstlineno) in self._functions

    def point(self, coro: CoroutineType[Any, Any, Any]) -> str | None:
        """Which await a suspended coroutine waits in."""
        frame, code = coro.cr_frame, coro.cr_code
        points = self._functions.get((code.co_filename, code.co_firstlineno))
        if points is None or frame is None:
            return None
        near = [one for one in points if one.first <= frame.f_lineno <= one.last]
        inner = coro.cr_await
        if isinstance(inner, CoroutineType):
            near = [one for one in near if one.awaited == inner.cr_code.co_name] or near
        assert near, f"{code.co_name}, line {frame.f_lineno}: no await there"
        return min(near, key=lambda one: one.last - one.first).name

    def chain(self, coro: object) -> Chain:
        """All of them, from ``coro`` inwards."""
        found: list[str] = []
        while isinstance(coro, CoroutineType):
            point = self.point(coro)
            if point is not None:
                found.append(point)
            coro = coro.cr_await
        return tuple(found)

    def inside(self, coro: object) -> str:
        """The innermost coroutine, whosever it is."""
        while isinstance(coro, CoroutineType) and isinstance(coro.cr_await, CoroutineType):
            coro = coro.cr_await
        return coro.cr_code.co_name if isinstance(coro, CoroutineType) else ""

    def _visit(self, node: ast.AST, file: str, where: str, points: list[Point]) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.AsyncFunctionDef, ast.FunctionDef, ast.ClassDef)):
                inner: list[Point] = []
                if isinstance(child, ast.AsyncFunctionDef):
                    self._functions[file, child.lineno] = inner
                self._visit(child, file, f"{where}.{child.name}", inner)
                continue
            if isinstance(child, ast.Await):
                call = child.value
                text = ast.unparse(call.func if isinstance(call, ast.Call) else call)
                same = sum(one.name.split(" ")[1] == text for one in points)
                name = f"{where}: {text} {same + 1}".replace(": ", " ", 1)
                last = child.end_lineno or child.lineno
                points.append(Point(name, child.lineno, last, text.rpartition(".")[2]))
                self.names.add(name)
            self._visit(child, file, where, points)


class Stepped(Coroutine[Any, Any, Any]):
    """A coroutine that says each time that it waits."""

    def __init__(self, inner: Coroutine[Any, Any, Any], waits: Callable[[Stepped], None]) -> None:
        self.inner = inner
        self.task: asyncio.Task[Any] | None = None
        self.error: BaseException | None = None
        self._waits = waits

    def send(self, value: Any) -> Any:
        return self._step(lambda: self.inner.send(value))

    def throw(self, *error: Any) -> Any:
        return self._step(lambda: self.inner.throw(*error))

    def close(self) -> None:
        self.inner.close()

    def __await__(self) -> Any:
        return self.inner.__await__()

    def _step(self, step: Callable[[], Any]) -> Any:
        waited_for = step()
        self._waits(self)
        while self.error is not None:
            error, self.error = self.error, None
            if waited_for is not None:
                waited_for._asyncio_future_blocking = False  # nobody waits for it any more
            waited_for = self.inner.throw(error)
            self._waits(self)
        return waited_for


class Steps:
    """Counts how often tasks of ``sources`` wait where; calls ``fault`` first time at ``at``."""

    def __init__(self, sources: Sources) -> None:
        self.sources = sources
        self.seen: dict[Chain, int] = {}
        self.at: Chain | None = None
        self.fault: Callable[[Stepped], None] | None = None
        self.on_wait: Callable[[Chain], None] = lambda chain: None

    def watch(self, loop: asyncio.AbstractEventLoop) -> None:
        """Wrap what runs on ``loop`` from now on."""

        def factory(loop: asyncio.AbstractEventLoop, coro: Any, **more: Any) -> asyncio.Task[Any]:
            if not self.sources.has(coro):
                return asyncio.Task(coro, loop=loop, **more)
            stepped = Stepped(coro, self._waits)
            stepped.task = asyncio.Task(stepped, loop=loop, **more)
            return stepped.task

        loop.set_task_factory(factory)

    def _waits(self, stepped: Stepped) -> None:
        chain = self.sources.chain(stepped.inner)
        self.seen[chain] = self.seen.get(chain, 0) + 1
        self.on_wait(chain)
        if chain == self.at and self.fault is not None:
            fault, self.fault = self.fault, None
            fault(stepped)
