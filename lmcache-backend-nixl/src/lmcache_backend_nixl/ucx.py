"""One NIXL agent with its UCX plugin: transfers between our memory and peers', and what ends them.

NIXL can't be waited for, only asked. And it can't be stopped: what it calls releasing or removing
leaves UCX writing into our memory (seen with 1.5.1). Only the end of the agent ends everything, and
an agent lives as long as any handle of it; so handles are let go of first.

Knows NIXL's calls and errors. Knows nothing about regions, ranges and descriptors.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Final, Literal

from lmcache_backend_nixl.agent import as_rejection
from lmcache_core import BackendError, BackendRejected, BackendUnavailable

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Places = npt.NDArray[np.uint64]
    """Rows of address, length and device, which is 0 for host memory."""

_PLUGIN: Final = "UCX"
_AT_WORK_S: Final = 20e-6
"""A look that takes longer has moved something."""
_SHORTEST_PAUSE_S: Final = 20e-6
_LONGEST_PAUSE_S: Final = 0.001


class Pace:
    """How long to wait before the next look: not at all while looks move something, then longer and
    longer, up to ``longest_s``."""

    def __init__(self, longest_s: float) -> None:
        self._longest_s = longest_s
        self._pause_s = 0.0
        self._looked_at = time.perf_counter()

    def begin(self) -> None:
        """A look begins."""
        self._looked_at = time.perf_counter()

    def pause_s(self) -> float:
        """It has ended."""
        if time.perf_counter() - self._looked_at > _AT_WORK_S:
            self._pause_s = 0.0
        else:
            self._pause_s = min(max(2 * self._pause_s, _SHORTEST_PAUSE_S), self._longest_s)
        return self._pause_s


class UcxAgent:
    """An agent with UCX. Thread-safe."""

    def __init__(self, name: str, params: dict[str, str]) -> None:
        """Start it.

        Raises:
            BackendRejected: NIXL lacks UCX or refuses its parameters.
        """
        from nixl import nixl_agent, nixl_agent_config
        from nixl._api import nixl_thread_sync_t

        strict = nixl_thread_sync_t.NIXL_THREAD_SYNC_STRICT
        # NIXL's own thread would never rest: a whole CPU for an agent that does nothing. Without
        # it, peers are answered by whoever looks: `notes`, again and again.
        config = nixl_agent_config(enable_prog_thread=False, backends=[], sync_mode=strict)
        self.name = name
        self._agent: Any = nixl_agent(name, config)
        self._lock = threading.Condition()
        self._users = 0
        self._ending = False
        self._ended = False
        if _PLUGIN not in self._agent.get_plugin_list():
            raise BackendRejected(f"this build of NIXL has no plugin {_PLUGIN}")
        with as_rejection(
            f"NIXL can't start its plugin {_PLUGIN} with {params or 'its defaults'}: the lines "
            "above, from UCX, may say why; check devices and transport, UCX_NET_DEVICES and UCX_TLS"
        ):
            self._agent.create_backend(_PLUGIN, params)

    def register(self, address: int, nbytes: int) -> None:
        """Let transfers touch that memory, until the agent ends.

        Raises:
            BackendRejected: NIXL refuses.
        """
        with self._use() as agent, as_rejection(f"NIXL can't register {nbytes} bytes of memory"):
            agent.register_memory([(address, nbytes, 0, "")], "DRAM", backends=[_PLUGIN])

    def metadata(self) -> bytes:
        """What peers need to reach what is registered so far."""
        with self._use() as agent:
            found: bytes = agent.get_agent_metadata()
            return found

    def add(self, metadata: bytes) -> str:
        """Make a peer known; its name.

        Raises:
            BackendRejected: NIXL can't make sense of it.
        """
        with self._use() as agent, as_rejection("NIXL refuses a peer's metadata"):
            name = agent.add_remote_agent(metadata)
            return name if isinstance(name, str) else bytes(name).decode()

    def remove(self, peer: str) -> None:
        """Forget a peer. Harmless where it is gone already."""
        # NIXL's errors have no narrower base, and what it says against it helps nobody.
        with self._use() as agent, suppress(Exception):
            agent.remove_remote_agent(peer)

    def notify(self, peer: str, note: bytes) -> None:
        """Send a message alone.

        Raises:
            BackendUnavailable: the peer is gone.
        """
        with self._use() as agent, _as_unavailable(peer, "a note"):
            agent.send_notif(peer, note)  # with a backend's name, NIXL 1.5.1 fails

    def notes(self) -> list[tuple[str, bytes]]:
        """Messages that have come, each with its sender's name.

        Raises:
            BackendUnavailable: NIXL fails, or the agent has ended.
        """
        with self._use() as agent, _as_unavailable("a peer", "receiving notes"):
            found = agent.get_new_notifs([_PLUGIN])
        return [
            (name if isinstance(name, str) else bytes(name).decode(errors="replace"), bytes(data))
            for name, several in found.items()
            for data in several
        ]

    def move(
        self,
        op: Literal["READ", "WRITE"],
        peer: str,
        ours: Places,
        theirs: Places,
        note: bytes = b"",
        *,
        give_up: Callable[[], bool] = bool,
    ) -> bool:
        """Move everything, and return True once it has ended.

        ``give_up`` is asked now and then; where it says so, answers False and leaves the transfer
        under way, until the agent ends.

        Raises:
            BackendUnavailable: the peer is gone, or the agent ended. Memory is free.
        """
        what = f"{op} of {int(ours[:, 1].sum())} bytes in {len(ours)} ranges"
        with self._use() as agent, _as_unavailable(peer, what):
            handle = agent.initialize_xfer(
                op,
                agent.get_xfer_descs(ours, "DRAM"),
                agent.get_xfer_descs(theirs, "DRAM"),
                peer,
                note,
                backends=[_PLUGIN],
            )
            try:
                pace = Pace(_LONGEST_PAUSE_S)
                state = agent.transfer(handle)
                while state == "PROC":
                    pace.begin()
                    state = agent.check_xfer_state(handle)
                    if self._ending or give_up():
                        break
                    time.sleep(pace.pause_s())
            finally:
                with suppress(Exception):  # as in `remove`
                    agent.release_xfer_handle(handle)
                del handle
        if state == "PROC" and self._ending:
            self._wait_for_the_end()
            raise BackendUnavailable(f"{peer}: {what} was under way when the channel was closed")
        if state not in ("DONE", "PROC"):
            raise BackendUnavailable(f"{peer}: {what} failed: {state}")
        return bool(state == "DONE")

    def end(self) -> None:
        """End all transfers and the agent; memory is at rest afterwards. Idempotent."""
        with self._lock:
            self._ending = True
            while self._users:
                self._lock.wait()
            self._agent = None  # the last reference: NIXL's destructor works here
            self._ended = True
            self._lock.notify_all()

    @contextmanager
    def _use(self) -> Iterator[Any]:
        with self._lock:
            if self._ending:
                raise BackendUnavailable("the nixl channel is closed")
            self._users += 1
            agent = self._agent
        try:
            yield agent
        finally:
            del agent
            with self._lock:
                self._users -= 1
                self._lock.notify_all()

    def _wait_for_the_end(self) -> None:
        with self._lock:
            while not self._ended:
                self._lock.wait()


@contextmanager
def _as_unavailable(peer: str, what: str) -> Iterator[None]:
    """Within, what NIXL raises means that the peer can't be reached."""
    try:
        yield
    except BackendError:
        raise
    except Exception as error:
        raise BackendUnavailable(
            f"peer {peer}: {what} failed in NIXL ({error or type(error).__name__})"
        ) from error
