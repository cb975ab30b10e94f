"""One NIXL agent with one storage plugin, and the memory that it may move.

Knows NIXL's calls, what has to be registered, and how to say what went wrong: NIXL itself only says
``NIXL_ERR_BACKEND``. Knows nothing about chunks, pools and buckets.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
import time
import uuid
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from queue import SimpleQueue
from typing import Any, Final, Literal

from lmcache_backend_nixl.config import PAGE_BYTES
from lmcache_core import BackendError, BackendRejected, BackendUnavailable, DaemonPool, HostRegion

Kind = Literal["FILE", "OBJ"]
Op = Literal["READ", "WRITE"]
_EAGER_S: Final = 0.004
"""So long a transfer is looked at all the time: a pause takes at least 50 µs, as 1 MiB does."""
_WORTH_A_THREAD: Final = 4 << 20
"""A shorter part isn't moved by a thread of its own: see decision 17."""
_POLL_SHARE: Final = 0.02
"""Then it is looked at again after this part of the time that it has taken so far."""
_LONGEST_PAUSE_S: Final = 0.001


class TransferFailed(BackendUnavailable):
    """A batch failed, in part or as a whole: NIXL doesn't say which."""


class Moves:
    """What one transfer moves: descriptors as NIXL has them, of memory and of places."""

    __slots__ = ("memory", "nbytes", "places")

    def __init__(self) -> None:
        self.memory: list[tuple[int, int, int]] = []
        self.places: list[tuple[int, int, int]] = []
        self.nbytes = 0

    def add(self, address: int, place: int, nbytes: int, device: int) -> None:
        """``nbytes`` between memory and the offset ``place`` of a file or an object.

        ``device`` is what NIXL knows that by: its descriptor, or the number it was registered as.
        """
        self.memory.append((address, nbytes, 0))
        self.places.append((place, nbytes, device))
        self.nbytes += nbytes

    def extend(self, others: Moves) -> None:
        """Have these moved too."""
        self.memory += others.memory
        self.places += others.places
        self.nbytes += others.nbytes


class Agent:
    """An agent with one plugin. Thread-safe."""

    def __init__(self, plugin: str, params: dict[str, str]) -> None:
        """Start the plugin.

        Raises:
            BackendRejected: NIXL lacks the plugin or refuses its parameters.
        """
        from nixl import nixl_agent, nixl_agent_config
        from nixl._api import nixl_thread_sync_t

        self._name = f"lmcache-{uuid.uuid4().hex}"
        strict = nixl_thread_sync_t.NIXL_THREAD_SYNC_STRICT
        self._agent: Any = nixl_agent(self._name, nixl_agent_config(backends=[], sync_mode=strict))
        self._plugin = plugin
        known = self._agent.get_plugin_list()
        if plugin not in known:
            raise BackendRejected(
                f"this build of NIXL has no plugin {plugin}; it has {', '.join(sorted(known))}"
            )
        with as_rejection(
            f"NIXL can't start its plugin {plugin} with the parameters "
            f"{', '.join(sorted(params)) or '(none)'}: the line above, from NIXL, may say why; "
            "check nixl_backend_params, and that the plugin's libraries are installed"
        ):
            self._agent.create_backend(plugin, params)

    def register(self, kind: str, descriptors: Sequence[tuple[int, int, int, str]]) -> Any:
        """Tell NIXL about memory (``DRAM``), files or objects; the answer is for `deregister`.

        Raises:
            BackendRejected: NIXL refuses.
        """
        with as_rejection(f"NIXL's {self._plugin} can't register {len(descriptors)} × {kind}"):
            return self._agent.register_memory(list(descriptors), kind, backends=[self._plugin])

    def deregister(self, registered: Any) -> None:
        """Undo `register`. What NIXL says against it helps nobody."""
        with suppress(Exception):  # NIXL's errors have no narrower base
            self._agent.deregister_memory(registered, backends=[self._plugin])

    def transfer(self, op: Op, kind: Kind, moves: Moves) -> None:
        """Move everything, and return once it has ended.

        Raises:
            TransferFailed: some of it, or all, didn't move.
        """
        if not moves.nbytes:
            return
        agent = self._agent
        handle = None
        try:
            handle = agent.initialize_xfer(
                op,
                agent.get_xfer_descs(moves.memory, "DRAM"),
                agent.get_xfer_descs(moves.places, kind),
                self._name,
                backends=[self._plugin],
            )
            began = time.perf_counter()
            state = agent.transfer(handle)
            # NIXL has nothing to wait on; and some plugins only go on when they are asked. Buffered
            # files are often done by now, so the first question comes at once.
            while state == "PROC" and (state := agent.check_xfer_state(handle)) == "PROC":
                took = time.perf_counter() - began
                # Either way others have the interpreter's lock meanwhile.
                time.sleep(0 if took < _EAGER_S else min(took * _POLL_SHARE, _LONGEST_PAUSE_S))
        except Exception as error:
            raise self._failed(op, moves, error) from error
        finally:
            if handle is not None:
                with suppress(Exception):  # NIXL's errors have no narrower base
                    agent.release_xfer_handle(handle)
        if state != "DONE":
            raise self._failed(op, moves, state)

    def present(self, kind: Kind, names: Sequence[str]) -> list[bool]:
        """Say which files or objects there are.

        Raises:
            TransferFailed: it can't be found out.
        """
        if not names:
            return []
        asked = [(0, 0, 0, name) for name in names]
        try:
            found = self._agent.query_memory(asked, self._plugin, kind)
        except Exception as error:
            raise TransferFailed(
                f"NIXL's {self._plugin} can't say which of {len(names)} there are: {error}"
            ) from error
        return [one is not None for one in found]

    def close(self) -> None:
        """Let NIXL go. Call nothing afterwards."""
        self._agent = None

    def _failed(self, op: str, moves: Moves, what: object) -> TransferFailed:
        return TransferFailed(
            f"{op} of {moves.nbytes} bytes in {len(moves.memory)} descriptors failed in NIXL's "
            f"{self._plugin}: {what or type(what).__name__}"
        )


class Agents:
    """Agents of one plugin, which move parts of the same values at the same time. Thread-safe.

    An agent copies one transfer at a time, in the thread that asks.
    """

    def __init__(self, agents: Sequence[Agent], *, calls: int) -> None:
        """As many ``calls`` at a time are made from outside."""
        self._agents = agents
        self._turn = itertools.cycle(agents)
        self._threads = DaemonPool(calls * (len(agents) - 1), "lmcache-nixl-parts")

    def register(self, kind: str, descriptors: Sequence[tuple[int, int, int, str]]) -> list[Any]:
        """Tell all of them about memory or files; the answer is for `deregister`.

        Raises:
            BackendRejected: NIXL refuses.
        """
        return [agent.register(kind, descriptors) for agent in self._agents]

    def deregister(self, registered: Sequence[Any]) -> None:
        """Undo `register`."""
        for agent, one in zip(self._agents, registered, strict=True):
            agent.deregister(one)

    def transfer(self, op: Op, kind: Kind, parts: Sequence[Moves]) -> None:
        """Move everything, long parts by an agent each, and return once all has ended.

        Raises:
            TransferFailed: some of it, or all, didn't move.
        """
        first, *others = parts
        elsewhere: list[Future[None]] = []
        agents = [next(self._turn) for _ in parts]
        try:
            for agent, part in zip(agents[1:], others, strict=True):
                if part.nbytes >= _WORTH_A_THREAD:
                    elsewhere.append(self._threads.submit(agent.transfer, op, kind, part))
                else:
                    first.extend(part)
            agents[0].transfer(op, kind, first)
        finally:
            failed = [part.exception() for part in elsewhere]  # until then it uses our buffers
        for error in failed:
            if error is not None:
                raise error

    def close(self) -> None:
        """Let NIXL go. Call nothing afterwards."""
        self._threads.shutdown()
        for agent in self._agents:
            agent.close()


class Lane:
    """Registered memory for one call: a page for each value, and room for a few whole values."""

    def __init__(self, memory: mmap.mmap, address: int, values: int, slot_bytes: int) -> None:
        self.values = values
        self.slot_bytes = slot_bytes
        self.slots = (len(memory) - values * PAGE_BYTES) // slot_bytes
        self._memory = memory
        self._address = address

    def page(self, index: int) -> tuple[int, memoryview]:
        """Address and content of a page."""
        return self._part(index * PAGE_BYTES, PAGE_BYTES)

    def slot(self, index: int) -> tuple[int, memoryview]:
        """Address and content of the room for one value."""
        return self._part(self.values * PAGE_BYTES + index * self.slot_bytes, self.slot_bytes)

    def _part(self, start: int, nbytes: int) -> tuple[int, memoryview]:
        return self._address + start, memoryview(self._memory)[start : start + nbytes]


class Memory:
    """What NIXL may read and write: core's host memory, and lanes for what lies elsewhere."""

    def __init__(
        self,
        agents: Agents,
        region: HostRegion | None,
        *,
        lanes: int,
        values: int,
        slot_bytes: int,
        buffer_bytes: int | None,
    ) -> None:
        """Register it. ``values`` is the most that one call moves at a time.

        Raises:
            BackendRejected: ``buffer_bytes`` hasn't room for one value.
        """
        if buffer_bytes is not None and buffer_bytes < slot_bytes:
            raise BackendRejected(
                f"buffer_bytes (nixl_buffer_size) is {buffer_bytes}, and a value may have up to "
                f"{slot_bytes}; set at least that"
            )
        lanes = lanes if buffer_bytes is None else min(lanes, buffer_bytes // slot_bytes)
        each = 1 if buffer_bytes is None else min(values, buffer_bytes // lanes // slot_bytes)
        self._region = region
        self._lanes: deque[Lane] = deque()
        self._free: SimpleQueue[None] = SimpleQueue()
        if region is not None:
            agents.register("DRAM", [(region.address, region.nbytes, 0, "")])
        for _ in range(lanes):
            nbytes = values * PAGE_BYTES + each * slot_bytes
            memory = mmap.mmap(-1, nbytes)  # costs nothing until it is used
            address = address_of(memoryview(memory))
            agents.register("DRAM", [(address, nbytes, 0, "")])
            self._put_back(Lane(memory, address, values, slot_bytes))

    @contextmanager
    def lane(self) -> Iterator[Lane]:
        """A lane of the caller's own; waits for one."""
        self._free.get()
        lane = self._lanes.pop()  # the one that was used last: its memory is in caches
        try:
            yield lane
        finally:
            self._put_back(lane)

    def _put_back(self, lane: Lane) -> None:
        self._lanes.append(lane)
        self._free.put(None)

    def registered(self, views: Sequence[memoryview], alignment: int) -> list[int | None]:
        """The address of each buffer that NIXL may use as it is; ``None`` for any other."""
        if self._region is None:
            return [None] * len(views)
        start, end = self._region.address, self._region.address + self._region.nbytes
        return [
            address
            if start <= (address := address_of(view)) <= end - view.nbytes
            and address % alignment == 0
            else None
            for view in views
        ]


def address_of(view: memoryview) -> int:
    """Where a buffer lies, also one that can't be written."""
    if not view.readonly and view.nbytes:
        return ctypes.addressof(ctypes.c_char.from_buffer(view))
    import numpy as np

    return int(np.frombuffer(view, np.uint8).__array_interface__["data"][0])


@contextmanager
def as_rejection(message: str) -> Iterator[None]:
    """Within, what NIXL raises becomes a `BackendRejected` that says ``message`` too."""
    try:
        yield
    except BackendError:
        raise
    except Exception as error:
        raise BackendRejected(f"{message} ({error or type(error).__name__})") from error
