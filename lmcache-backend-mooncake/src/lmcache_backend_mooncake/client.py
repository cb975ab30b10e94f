"""The client library: its import, its start, its codes, and when it may be called.

That is between its start and its end, and nobody else looks after it: so `Client.lend` counts who
is using it, and ``close`` waits for them. Knows nothing about chunks.
"""

from __future__ import annotations

import ctypes
import importlib
import logging
import math
import os
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from lmcache_backend_mooncake import machine
from lmcache_backend_mooncake.config import MooncakeConfig, host_and_port
from lmcache_core import BackendError, BackendRejected, BackendTimeout, BackendUnavailable

logger = logging.getLogger(__name__)

OK: Final = 0
NO_SPACE: Final = -200
BAD_PARAMETERS: Final = -600
NOT_READY: Final = -703
NOT_FOUND: Final = -704
EXISTS: Final = -705
LEASE_EXPIRED: Final = -707
TRANSFER_FAILED: Final = -800
RPC_FAILED: Final = -900
RPC_TIMED_OUT: Final = -901

INSTALL: Final = (
    "pip install mooncake-transfer-engine-non-cuda, or on a machine with CUDA: "
    "pip install mooncake-transfer-engine"
)


def library() -> Any:
    """The module ``mooncake.store``, of whichever wheel is installed.

    Raises:
        BackendRejected: there is none, or it can't be loaded; says what to install.
    """
    try:
        os.environ.setdefault("MC_LOG_LEVEL", "WARNING")
        return importlib.import_module("mooncake.store")
    except ModuleNotFoundError as error:
        raise BackendRejected(f"Mooncake's client isn't installed ({error}): {INSTALL}") from error
    except ImportError as error:
        text = str(error)
        remedy = "reinstall it: " + INSTALL
        if "libcud" in text or "libnv" in text:
            remedy = "this wheel is for another CUDA than there is here: " + INSTALL
        elif any(name in text for name in ("libibverbs", "libnuma", "libcurl")):
            remedy = "apt-get install libibverbs1 libnuma1 libcurl4"
        raise BackendRejected(f"Mooncake's client can't be loaded ({text}): {remedy}") from error


class Client:
    """One connected client. ``hostname`` is what the cluster calls its segment."""

    def __init__(self, store: Any, config: MooncakeConfig) -> None:
        self.hostname: str = store.get_hostname()
        self._store = store
        self._config = config
        self._users = 0
        self._closed = False
        self._suspect = False
        self._changed = threading.Condition()

    @contextmanager
    def lend(self) -> Iterator[Any]:
        """The library's store, which isn't closed before it is given back.

        Raises:
            BackendUnavailable: it is closed, or the master is still gone.
        """
        if self._suspect:
            # The library takes four seconds to find that out, in each call anew.
            reach(self._config.master_server_address, self._config, "master_server_address")
        with self._changed:
            if self._closed:
                raise BackendUnavailable("the backend isn't open")
            self._users += 1
        try:
            yield self._store
        finally:
            with self._changed:
                self._users -= 1
                self._changed.notify_all()

    def check(self, what: str, codes: Sequence[int], harmless: Sequence[int]) -> None:
        """Raise if every code is that of a failure; a negative one in ``harmless`` isn't."""
        self._suspect = bool(codes) and all(c in (RPC_FAILED, RPC_TIMED_OUT) for c in codes)
        if codes and all(code < 0 and code not in harmless for code in codes):
            raise self._error(what, codes[0])

    def _error(self, what: str, code: int) -> BackendError:
        master = self._config.master_server_address
        if code == RPC_TIMED_OUT:
            return BackendTimeout(
                f"{what}: the Mooncake master at {master} didn't answer within "
                f"{self._config.master_timeout_s:g} s (master_timeout_s)"
            )
        if code == RPC_FAILED:
            return BackendUnavailable(f"{what}: no Mooncake master answers at {master}")
        if code == TRANSFER_FAILED:
            return BackendUnavailable(
                f"{what}: the Mooncake client that holds the bytes doesn't send or take any. If it "
                f"runs: metadata_server ({self._config.metadata_server}) must be the same for all "
                "clients, and each one's local_hostname must resolve for the others"
            )
        return BackendError(f"{what}: Mooncake's client answers {code}")

    def close(self) -> None:
        """Wait for who uses it, then take its segment out of the cluster. Idempotent.

        The library does that with the interpreter's lock held: for a second or two, and for
        17 without a master. There is nothing to be taken out of then, so it is left alone.
        """
        with self._changed:
            if self._closed:
                return
            self._closed = True
            self._changed.wait_for(lambda: not self._users)
        try:
            reach(self._config.master_server_address, self._config, "master_server_address")
        except BackendUnavailable as error:
            logger.info("Mooncake's client isn't closed, %s", error)
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._store))  # its end is a close, too
        else:
            self._store.close()


def connect(module: Any, config: MooncakeConfig, *, lookup_only: bool) -> Client:
    """Start a client; one that only looks things up gives the cluster no memory.

    Raises:
        BackendUnavailable: the master or the metadata server can't be reached.
        BackendRejected: this machine can't give what the options ask for.
    """
    segment = 0 if lookup_only else config.global_segment_size
    copies = 0 if lookup_only else config.local_buffer_size
    check_memory(segment, copies)
    _check_devices(config)
    reach(config.master_server_address, config, "master_server_address")
    if config.metadata_server.startswith(("http://", "https://")):
        reach(config.metadata_server, config, "metadata_server")
    hostname, address = _own_place(config)
    more: dict[str, Any] = {}
    if config.storage_root_dir is not None and segment:
        _check_folder(config.storage_root_dir)
        more = {"enable_ssd_offload": True, "ssd_offload_path": str(config.storage_root_dir)}
    store = module.MooncakeDistributedStore()
    for name, value in _variables(config, address).items():
        os.environ.setdefault(name, value)
    code = store.setup(
        hostname,
        config.metadata_server,
        segment,
        copies,
        config.protocol,
        config.device_name,
        config.master_server_address,
        **more,
    )
    if code == BAD_PARAMETERS:
        raise BackendRejected(
            f"Mooncake's client refuses its options ({code}); global_segment_size is {segment} "
            f"bytes, local_buffer_size {copies}. Its own lines in the log say more"
        )
    if code != OK:
        raise BackendUnavailable(
            f"Mooncake's client can't start ({code}): protocol {config.protocol}, devices "
            f"{config.device_name or 'any'}, metadata_server {config.metadata_server}, "
            f"local_hostname {hostname}. Its own lines in the log say more"
        )
    return Client(store, config)


def check_memory(segment: int, copies: int) -> None:
    """Refuse what this machine can't give.

    Raises:
        BackendRejected: says how much there is.
    """
    available = machine.available_bytes()
    if available is None or segment + copies <= available:
        return
    parts = f"global_segment_size {_gib(segment)}"
    if copies:
        parts += f" and local_buffer_size {_gib(copies)}"
    raise BackendRejected(
        f"{parts}: this machine has {_gib(available)} of memory available, and each worker takes "
        "that much. Set global_segment_size to what it can spare, or to 0 to use only what others "
        "give"
    )


def reach(address: str, config: MooncakeConfig, option: str) -> None:
    """Whether somebody listens at ``HOST:PORT`` or a URL; anything else is the client's business.

    Raises:
        BackendUnavailable: nobody does.
    """
    scheme, separator, rest = address.rpartition("://")
    if separator and scheme not in ("http", "https"):
        return
    place = rest.partition("/")[0]
    if separator and not place.rpartition("]")[2].rpartition(":")[2].isdigit():
        place += ":443" if scheme == "https" else ":80"
    try:
        host, port = host_and_port(place)
        socket.create_connection((host, port), config.master_timeout_s).close()
    except TimeoutError:
        raise BackendUnavailable(f"nobody answers at {address} ({option})") from None
    except (OSError, ValueError) as error:
        raise BackendUnavailable(f"can't connect to {address} ({option}): {error}") from None


def _own_place(config: MooncakeConfig) -> tuple[str, str | None]:
    """What others call this machine, and the address to listen at, if it is known."""
    name = config.local_hostname
    try:
        if name is None:
            if "://" in config.master_server_address:
                name = socket.gethostname()
            else:
                name = machine.address_towards(*host_and_port(config.master_server_address))
        # The client would start with a name that doesn't resolve, and never be found.
        return name, machine.address_of(name)
    except OSError as error:
        raise BackendRejected(
            f"local_hostname: {name or config.master_server_address} doesn't resolve here "
            f"({error.strerror}); set it to a name or address that others reach this machine by"
        ) from None


def _variables(config: MooncakeConfig, address: str | None) -> dict[str, str]:
    """What the client reads from the environment, some of it when it starts and some of it later.

    A variable that is set already is left alone: it is the user's, or an earlier client's of this
    process, and the library wouldn't read it again.
    """
    timeout_ms = str(math.ceil(config.master_timeout_s * 1000))
    wanted = {
        "MC_STORE_CLIENT_SETUP_RETRIES": "1",  # core tries again; twenty times are 90 s
        "MC_RPC_TIMEOUT_MS": timeout_ms,
        "MC_RPC_CONNECT_TIMEOUT_MS": timeout_ms,
        "MC_TCP_PROGRESS_TIMEOUT_SEC": str(config.transfer_timeout),
        "MC_TCP_STATUS_TIMEOUT_SEC": str(config.transfer_timeout),
        "MC_SLICE_TIMEOUT": str(config.transfer_timeout),  # RDMA's
    }
    # Without it the client listens and advertises some interface, not this one.
    if address is not None:
        wanted["MC_TCP_BIND_ADDRESS"] = address
    return wanted


def _check_devices(config: MooncakeConfig) -> None:
    if config.protocol != "rdma":
        return
    here = machine.rdma_devices()
    wanted = [one.strip() for one in config.device_name.split(",") if one.strip()]
    if not here:
        raise BackendRejected("protocol rdma: this machine has no RDMA device; set protocol to tcp")
    if unknown := [one for one in wanted if one not in here]:
        raise BackendRejected(
            f"device_name: {', '.join(unknown)} isn't here; there are {', '.join(here)}"
        )


def _check_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BackendRejected(f"storage_root_dir: {folder}: {error.strerror}") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise BackendRejected(f"storage_root_dir: {folder} can't be written to")


def _gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:.1f} GiB"
