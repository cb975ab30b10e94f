"""The memory that chunks live in: one mapping a process, cut into equal slots.

Knows pages, huge pages, NUMA nodes and CUDA registration. Knows nothing about
what a slot holds, nor about who uses it: that is the planner's business.
"""

from __future__ import annotations

import ctypes
import fcntl
import logging
import mmap
import os
import sys
from pathlib import Path
from typing import Any

from lmcache_core.contracts.storage import HostRegion
from lmcache_core.errors import ConfigError

logger = logging.getLogger(__name__)

PAGE_BYTES = 4096
"""Slots start and end at multiples of this, as O_DIRECT and RDMA registration want it."""
HUGE_PAGE_BYTES = 2 << 20
_MAP_HUGETLB = 0x40000  # asm-generic/mman.h; Python has no name for it
_MADV_POPULATE_WRITE = 23  # Linux 5.14
_MPOL_PREFERRED = 1  # a full node is no reason to be killed, as it would be with MPOL_BIND
_MBIND = {"x86_64": 237, "aarch64": 235, "riscv64": 235}
# linux/memfd.h and linux/fcntl.h: Pythons built against an older libc lack os.memfd_create and
# these names (conda's and uv's do), while the libc that they run on has the function.
_MFD_CLOEXEC, _MFD_ALLOW_SEALING, _MFD_HUGETLB_2MB = 1, 2, 4 | 21 << 26
_F_ADD_SEALS, _F_SEAL_SEAL, _F_SEAL_SHRINK, _F_SEAL_GROW = 1033, 1, 2, 4
_F_SEAL_FUTURE_WRITE = 0x10  # Linux 5.1
_OFF = ("never", "deny")
_SHARED_HUGEPAGES = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")


class OwnedRegion:
    """A `HostRegion` and the right to give it back.

    ``notices`` says, in sentences, what was asked for and couldn't be had; they were logged too.
    Without `close` the memory goes when the last memoryview of it does.
    """

    def __init__(self, region: HostRegion, mapping: _Mapping, notices: tuple[str, ...]) -> None:
        self.region = region
        self.notices = notices
        self._mapping: _Mapping | None = mapping

    def close(self) -> None:
        """Give the memory back, or leave that to the last memoryview of it. Idempotent."""
        mapping, self._mapping = self._mapping, None
        if mapping is None:
            return
        mapping.unregister()
        self.region.view.release()
        try:
            mapping.close()
        except BufferError:
            logger.debug("host memory is still in use; it goes with the last view of it")


class HostArena:
    """A region cut into ``slots`` slots of ``slot_bytes`` each, rounded up to whole pages.

    Raises:
        ConfigError: the region doesn't hold a single slot.
    """

    def __init__(self, region: HostRegion, slot_bytes: int) -> None:
        self.slot_bytes = _rounded(max(slot_bytes, 1), PAGE_BYTES)
        self._region = region
        self._start = -region.address % PAGE_BYTES
        self.slots = max(0, region.nbytes - self._start) // self.slot_bytes
        if not self.slots:
            raise ConfigError(
                f"{_size(region.nbytes)} of host memory (max_local_cpu_size) don't hold one chunk, "
                f"which takes {_size(self.slot_bytes)}; raise max_local_cpu_size or lower "
                "chunk_size"
            )

    def slot(self, index: int) -> memoryview:
        """All bytes of a slot. A view, not a copy.

        Raises:
            IndexError: there is no such slot.
        """
        start = self._offset(index)
        return self._region.view[start : start + self.slot_bytes]

    def address(self, index: int) -> int:
        """Where a slot starts, as an address in this process.

        Raises:
            IndexError: there is no such slot.
        """
        return self._region.address + self._offset(index)

    def _offset(self, index: int) -> int:
        if not 0 <= index < self.slots:
            raise IndexError(f"slot {index}: there are {self.slots}")
        return self._start + index * self.slot_bytes


def allocate_region(
    nbytes: int,
    *,
    hugepages: bool = False,
    numa_mode: str | None = None,
    populate: bool = False,
    shared: bool = False,
) -> OwnedRegion:
    """Map ``nbytes`` of memory, rounded up to whole pages and zero until written.

    It is private to this process, unless it is to be ``shared``: then it is a file that only
    exists in memory, and ``region.fd`` is what another process maps it by (see `attach`).

    A page costs memory when it is first written; with ``populate`` all of it is there at once.
    ``hugepages`` asks for reserved 2 MiB pages, and where there aren't enough of them for
    transparent ones. ``numa_mode="auto"`` prefers the node that this process's CPUs are on. What
    can't be had is a notice, not an error.

    Where torch has initialised CUDA in this process, the region is registered with it, so that
    copies are asynchronous. That part wasn't run on hardware, only against a stand-in.

    Raises:
        ConfigError: there isn't that much memory, or the arguments make no sense.
    """
    if nbytes < 1:
        raise ConfigError(f"max_local_cpu_size: {nbytes} bytes of host memory can't be allocated")
    if numa_mode not in (None, "auto"):
        raise ConfigError(f"numa_mode: {numa_mode!r} isn't known; use auto, or leave it out")
    nbytes = _rounded(nbytes, HUGE_PAGE_BYTES if hugepages else PAGE_BYTES)
    _refuse_more_than_there_is(nbytes)
    notices: list[str] = []
    mapping = _map(nbytes, hugepages, shared, notices)
    if numa_mode == "auto":
        _prefer_own_node(mapping, notices)
    if populate:
        _populate(mapping)
    mapping.register(notices)
    for notice in notices:
        logger.warning("host memory: %s", notice)
    return OwnedRegion(mapping.region(), mapping, tuple(notices))


def share(nbytes: int) -> HostRegion:
    """Map ``nbytes``, rounded up to whole pages, that other processes can `attach`; no options.

    Raises:
        OSError: the system doesn't give it.
    """
    return _shared_mapping(_rounded(nbytes, PAGE_BYTES)).region()


def attach(fd: int, nbytes: int) -> HostRegion:
    """Map, in another process, a shared region that ``fd`` was inherited for. Takes over ``fd``.

    The address differs from process to process; offsets are the same.

    Raises:
        OSError: ``fd`` is no such region, or shorter than ``nbytes``.
        ValueError: the same, as `mmap` puts it.
    """
    mapping = _Mapping(fd, nbytes, flags=mmap.MAP_SHARED)
    mapping.fd = fd
    return mapping.region()


def memfd(name: str, nbytes: int, *, reserved: bool = False) -> int:
    """The descriptor of a file of ``nbytes`` that only exists in memory.

    Nobody can make it longer or shorter. Its mode lets its owner read it and nobody write it: what
    this descriptor can, none can that is opened from another process's copy of it. ``reserved``:
    of 2 MiB pages.

    Raises:
        OSError: the system doesn't give it.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    flags = _MFD_CLOEXEC | _MFD_ALLOW_SEALING | (_MFD_HUGETLB_2MB if reserved else 0)
    fd = int(libc.memfd_create(name.encode(), ctypes.c_uint(flags)))
    if fd < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    try:
        os.ftruncate(fd, nbytes)
        os.fchmod(fd, 0o400)
        fcntl.fcntl(fd, _F_ADD_SEALS, _F_SEAL_SHRINK | _F_SEAL_GROW)
    except OSError:
        os.close(fd)
        raise
    return fd


def keep_writers_out(fd: int) -> None:
    """Let nobody write what `memfd` gave but by mappings that there are; nor undo this.

    Raises:
        OSError: the kernel is older than Linux 5.1, or it is no such file.
    """
    fcntl.fcntl(fd, _F_ADD_SEALS, _F_SEAL_FUTURE_WRITE | _F_SEAL_SEAL)


def reader_of(fd: int) -> int | None:
    """Another descriptor of the same file, by which it can be read and mapped but not written.

    ``None``: the system doesn't give one, as without ``/proc``.
    """
    try:
        return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None


def available_bytes(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Memory that this process could still take without swapping or being killed for it.

    The smaller of the machine's MemAvailable and what the process's control groups (version 2)
    have left. File pages count as available: the kernel drops them first. ``sys.maxsize`` where the
    system doesn't say.
    """
    available = _field(proc / "meminfo", "MemAvailable:") * 1024 or sys.maxsize
    for line in _lines(proc / "self/cgroup"):
        if not line.startswith("0::"):
            continue
        group = cgroups / line[3:].lstrip("/")
        while group == cgroups or cgroups in group.parents:
            limit = "".join(_lines(group / "memory.max")).strip()
            if limit.isdigit():
                used = int("".join(_lines(group / "memory.current")).strip() or 0)
                files = _field(group / "memory.stat", "inactive_file")
                available = min(available, max(0, int(limit) - used + files))
            group = group.parent
    return available


def own_node(sysfs: Path = Path("/sys/devices/system/node")) -> tuple[int | None, str]:
    """The NUMA node that all CPUs of this process are on; or ``None``, and why there is none."""
    nodes = sorted(int(path.name[4:]) for path in sysfs.glob("node[0-9]*"))
    if len(nodes) < 2:
        return None, "this machine has one NUMA node"
    mine = os.sched_getaffinity(0)
    used = [node for node in nodes if mine & _cpus(sysfs / f"node{node}" / "cpulist")]
    if len(used) != 1:
        return None, (
            f"this process may run on NUMA nodes {used}; bind it to one (numactl --cpunodebind)"
        )
    return used[0], ""


def address_of(buffer: memoryview) -> int:
    """Where ``buffer`` starts; 0 where Python doesn't say, as for read-only or empty memory."""
    if buffer.readonly or not buffer.nbytes:
        return 0
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


class _Mapping(mmap.mmap):
    """A mapping that ends its CUDA registration, and its file descriptor, before it ends."""

    cudart: Any = None
    fd: int | None = None
    """What a shared mapping was made from; closed with it."""

    @property
    def address(self) -> int:
        return ctypes.addressof(ctypes.c_char.from_buffer(self))

    def region(self) -> HostRegion:
        return HostRegion(self.address, len(self), memoryview(self), self.fd)

    def register(self, notices: list[str]) -> None:
        """Register with CUDA, if torch is in this process and has a CUDA context already.

        Never the first to touch CUDA: that would make a context, of some 600 MiB, on a device that
        the engine may not have chosen. Not run on hardware.
        """
        torch: Any = sys.modules.get("torch")
        if torch is None or not torch.cuda.is_initialized():
            return
        cudart = torch.cuda.cudart()
        status = int(cudart.cudaHostRegister(self.address, len(self), 0))
        if status:
            notices.append(f"CUDA error {status} on registering it; copies will be synchronous")
        else:
            self.cudart = cudart

    def unregister(self) -> None:
        cudart, self.cudart = self.cudart, None
        if cudart is not None:
            cudart.cudaHostUnregister(self.address)

    def __del__(self) -> None:
        # A region from the hook has no owner to close it. mmap unmaps only after this.
        self.unregister()
        if self.fd is not None:
            os.close(self.fd)


def _private_mapping(nbytes: int, *, reserved: bool = False) -> _Mapping:
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    return _Mapping(-1, nbytes, flags=flags | _MAP_HUGETLB if reserved else flags)


def _shared_mapping(nbytes: int, *, reserved: bool = False) -> _Mapping:
    """A mapped memfd: a process that got it can't shrink it under the others' feet."""
    fd = memfd("lmcache", nbytes, reserved=reserved)
    try:
        mapping = _Mapping(fd, nbytes, flags=mmap.MAP_SHARED)
    except OSError:
        os.close(fd)
        raise
    mapping.fd = fd
    return mapping


def _map(nbytes: int, hugepages: bool, shared: bool, notices: list[str]) -> _Mapping:
    make = _shared_mapping if shared else _private_mapping
    if hugepages:
        try:
            return make(nbytes, reserved=True)
        except OSError as error:
            notices.append(
                f"no {nbytes // HUGE_PAGE_BYTES} reserved huge pages ({error.strerror}); "
                "transparent ones are used where the kernel has them. See vm.nr_hugepages"
            )
    try:
        mapping = make(nbytes)
    except OSError as error:
        raise ConfigError(
            f"{_size(nbytes)} of host memory (max_local_cpu_size) can't be mapped: "
            f"{error.strerror}; lower max_local_cpu_size"
        ) from error
    if hugepages:
        try:
            mapping.madvise(mmap.MADV_HUGEPAGE)
        except OSError as error:
            notices.append(f"no transparent huge pages either: {error.strerror}")
        if shared and any(f"[{off}]" in "".join(_lines(_SHARED_HUGEPAGES)) for off in _OFF):
            notices.append(
                "no transparent huge pages for memory that is shared with other processes: "
                f"write advise to {_SHARED_HUGEPAGES}"
            )
    return mapping


def _refuse_more_than_there_is(nbytes: int) -> None:
    available = available_bytes()
    if nbytes > available:
        raise ConfigError(
            f"max_local_cpu_size asks for {_size(nbytes)} of host memory ({nbytes} bytes), but "
            f"only {_size(available)} ({available} bytes) are available (MemAvailable, or what the "
            "control group has left); lower max_local_cpu_size, which counts for each process"
        )


def _prefer_own_node(mapping: _Mapping, notices: list[str]) -> None:
    node, why = own_node()
    if node is None:
        notices.append(f"numa_mode has no effect: {why}")
        return
    failed = _mbind(mapping.address, len(mapping), node)
    if failed:
        notices.append(f"numa_mode has no effect: mbind to node {node}: {os.strerror(failed)}")


def _mbind(address: int, nbytes: int, node: int) -> int:
    """Prefer ``node`` for pages that aren't touched yet; answers an errno. No libnuma needed."""
    number = _MBIND.get(os.uname().machine)
    if number is None:
        return 38  # ENOSYS, whatever this architecture calls it
    words = node // 64 + 1
    mask = (ctypes.c_uint64 * words)()
    mask[node // 64] = 1 << node % 64
    libc = ctypes.CDLL(None, use_errno=True)
    status = libc.syscall(
        ctypes.c_long(number),
        ctypes.c_void_p(address),
        ctypes.c_ulong(nbytes),
        ctypes.c_int(_MPOL_PREFERRED),
        mask,
        ctypes.c_ulong(words * 64 + 1),  # the kernel reads one bit less than it is told
        ctypes.c_uint(0),
    )
    return ctypes.get_errno() if status else 0


def _populate(mapping: _Mapping) -> None:
    try:
        mapping.madvise(_MADV_POPULATE_WRITE)
    except OSError:  # an older kernel, or one that has no such pages left
        with memoryview(mapping) as view, view[::PAGE_BYTES] as pages:
            pages[:] = bytes(len(pages))


def _cpus(path: Path) -> set[int]:
    """The CPUs of a list such as ``0-3,8``."""
    cpus: set[int] = set()
    for part in filter(None, "".join(_lines(path)).strip().split(",")):
        first, _, last = part.partition("-")
        cpus.update(range(int(first), int(last or first) + 1))
    return cpus


def _field(path: Path, name: str) -> int:
    for line in _lines(path):
        words = line.split()
        if len(words) > 1 and words[0] == name:
            return int(words[1])
    return 0


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def _rounded(nbytes: int, unit: int) -> int:
    return -(-nbytes // unit) * unit


def _size(nbytes: int) -> str:
    return f"{nbytes / 2**30:.2f} GiB" if nbytes >= 2**29 else f"{nbytes / 2**20:.2f} MiB"
