"""Host memory: what is mapped, what is refused, what is said about it."""

from __future__ import annotations

import ctypes
import gc
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmcache_core.builtin import host
from lmcache_core.contracts.storage import HostRegion
from lmcache_core.errors import ConfigError
from lmcache_core.memory import host_memory
from lmcache_core.memory.host_memory import (
    PAGE_BYTES,
    HostArena,
    allocate_region,
    attach,
    available_bytes,
    own_node,
    share,
)
from lmcache_core.plugins.manager import Plugins

MIB = 1 << 20


def region_of(nbytes: int, address: int = 0) -> HostRegion:
    return HostRegion(address, nbytes, memoryview(bytearray(nbytes)))


# -- allocation ----------------------------------------------------------------------------


def test_a_region_is_memory_at_its_address() -> None:
    owned = allocate_region(MIB)
    region = owned.region
    assert (region.nbytes, region.view.nbytes, region.view.format) == (MIB, MIB, "B")
    region.view[5:8] = b"abc"
    assert ctypes.string_at(region.address + 5, 3) == b"abc"
    owned.close()


def test_a_region_is_zero_and_whole_pages() -> None:
    owned = allocate_region(PAGE_BYTES + 1, populate=True)
    assert bytes(owned.region.view) == bytes(2 * PAGE_BYTES)
    owned.close()


def test_populating_by_hand_touches_and_keeps_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "_MADV_POPULATE_WRITE", 9999)  # as an older kernel answers
    owned = allocate_region(4 * PAGE_BYTES, populate=True)
    assert not any(owned.region.view)
    owned.close()


@pytest.mark.parametrize("nbytes", [0, -1])
def test_no_memory_at_all_is_refused(nbytes: int) -> None:
    with pytest.raises(ConfigError, match="max_local_cpu_size"):
        allocate_region(nbytes)


def test_more_than_there_is_is_refused_with_both_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "available_bytes", lambda: 3 << 30)
    with pytest.raises(ConfigError) as caught:
        allocate_region(5 << 30)
    for expected in ("max_local_cpu_size", "5.00 GiB", "3.00 GiB", str(5 << 30), str(3 << 30)):
        assert expected in str(caught.value)


def test_more_than_this_machine_has_is_refused() -> None:
    with pytest.raises(ConfigError, match="MemAvailable"):
        allocate_region(1 << 60)


def test_a_mapping_that_the_kernel_refuses_is_a_configuration_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(host_memory, "available_bytes", lambda: sys.maxsize)
    with pytest.raises(ConfigError, match="can't be mapped"):
        allocate_region(1 << 60)


def test_an_unknown_numa_mode_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"numa_mode.*'sideways'"):
        allocate_region(MIB, numa_mode="sideways")


def test_huge_pages_fall_back_with_a_notice(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real, calls = host_memory._Mapping, []

    def mapping(fd: int, nbytes: int, *, flags: int) -> Any:
        calls.append(flags)
        if len(calls) == 1:
            raise OSError(12, "Cannot allocate memory")
        return real(fd, nbytes, flags=flags)

    monkeypatch.setattr(host_memory, "_Mapping", mapping)
    owned = allocate_region(MIB, hugepages=True)
    assert [bool(flags & host_memory._MAP_HUGETLB) for flags in calls] == [True, False]
    assert owned.region.nbytes == 2 * MIB
    assert owned.notices[0].startswith("no 1 reserved huge pages (Cannot allocate memory)")
    assert owned.notices[0] in caplog.text
    owned.close()


def test_closing_twice_and_closing_while_in_use() -> None:
    owned = allocate_region(MIB)
    slot = HostArena(owned.region, PAGE_BYTES).slot(1)
    owned.close()
    owned.close()
    slot[0] = 7  # still memory: it goes with the last view
    assert slot[0] == 7


def test_the_hook_hands_out_memory_that_lives_as_long_as_its_view() -> None:
    wishes = {"hugepages": False, "numa_mode": None, "populate": False, "shared": False}
    view = host.lmcache_host_region(nbytes=MIB, **wishes).view
    gc.collect()
    view[-1] = 1
    assert view[-1] == 1


@pytest.mark.parametrize("shared", [False, True])
def test_the_hook_populates_when_it_is_asked_to(shared: bool) -> None:
    for populate in (False, True):
        region = Plugins(environ={}).host_region(8 * MIB, "cpu", populate=populate, shared=shared)
        assert resident_pages(region) == (8 * MIB // PAGE_BYTES if populate else 0)


def resident_pages(region: HostRegion) -> int:
    pages = (ctypes.c_ubyte * (region.nbytes // PAGE_BYTES))()
    address, nbytes = ctypes.c_void_p(region.address), ctypes.c_size_t(region.nbytes)
    assert ctypes.CDLL(None).mincore(address, nbytes, pages) == 0
    return sum(page & 1 for page in pages)


# -- shared with other processes -----------------------------------------------------------


def test_private_memory_has_no_descriptor() -> None:
    assert allocate_region(MIB).region.fd is None


def test_another_process_sees_and_changes_shared_memory() -> None:
    region = allocate_region(MIB, shared=True, populate=True).region
    region.view[7:10] = b"abc"
    code = (
        "import sys; from lmcache_core.memory.host_memory import attach\n"
        "view = attach(int(sys.argv[1]), 1 << 20).view\n"
        "view[7:10] = bytes(view[7:10]).upper()"
    )
    command = [sys.executable, "-c", code, str(region.fd)]
    subprocess.run(command, pass_fds=[region.fd or -1], check=True)
    assert bytes(region.view[7:10]) == b"ABC"


def test_a_descriptor_goes_with_its_memory() -> None:
    owned = allocate_region(MIB, shared=True)
    fd = owned.region.fd
    assert fd is not None
    view = owned.region.view[:1]
    owned.close()
    os.fstat(fd)
    del owned, view
    gc.collect()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_nobody_can_shrink_shared_memory() -> None:
    """Or a read of it would end the process with SIGBUS."""
    region = allocate_region(MIB, shared=True).region
    assert region.fd is not None
    with pytest.raises(PermissionError):
        os.ftruncate(region.fd, PAGE_BYTES)


def test_attaching_what_is_too_short_is_an_error() -> None:
    region = share(PAGE_BYTES)
    assert region.fd is not None
    fd = os.dup(region.fd)
    with pytest.raises(ValueError, match="greater than file size"):
        attach(fd, 2 * PAGE_BYTES)
    os.close(fd)


def test_shared_huge_pages_fall_back_with_notices(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real, asked = host_memory._shared_mapping, []

    def mapping(nbytes: int, *, reserved: bool = False) -> Any:
        asked.append(reserved)
        if reserved:
            raise OSError(12, "Cannot allocate memory")
        return real(nbytes)

    switch = tmp_path / "shmem_enabled"
    switch.write_text("always within_size advise [never] deny force\n")
    monkeypatch.setattr(host_memory, "_SHARED_HUGEPAGES", switch)
    monkeypatch.setattr(host_memory, "_shared_mapping", mapping)
    owned = allocate_region(MIB, hugepages=True, shared=True)
    assert asked == [True, False]
    assert owned.notices[0].startswith("no 1 reserved huge pages")
    assert str(switch) in owned.notices[-1]


# -- CUDA, against a stand-in --------------------------------------------------------------


class FakeCuda:
    def __init__(self, initialized: bool = True, status: int = 0) -> None:
        self.initialized = initialized
        self.status = status
        self.calls: list[tuple[str, int]] = []

    def is_initialized(self) -> bool:
        return self.initialized

    def cudart(self) -> FakeCuda:
        return self

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        self.calls.append(("register", address))
        return self.status

    def cudaHostUnregister(self, address: int) -> int:
        self.calls.append(("unregister", address))
        return 0


def with_cuda(monkeypatch: pytest.MonkeyPatch, cuda: FakeCuda) -> FakeCuda:
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    return cuda


def test_cuda_knows_the_region_until_it_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = with_cuda(monkeypatch, FakeCuda())
    owned = allocate_region(MIB)
    address = owned.region.address
    assert cuda.calls == [("register", address)]
    owned.close()
    assert cuda.calls == [("register", address), ("unregister", address)]


def test_cuda_forgets_a_region_that_nobody_closes(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = with_cuda(monkeypatch, FakeCuda())
    region = allocate_region(MIB).region
    address = region.address
    del region
    gc.collect()
    assert cuda.calls == [("register", address), ("unregister", address)]


def test_cuda_that_nobody_started_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = with_cuda(monkeypatch, FakeCuda(initialized=False))
    allocate_region(MIB).close()
    assert cuda.calls == []


def test_a_failed_registration_is_a_notice(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = with_cuda(monkeypatch, FakeCuda(status=2))
    owned = allocate_region(MIB)
    assert "CUDA error 2" in owned.notices[0]
    owned.close()
    assert [name for name, _ in cuda.calls] == ["register"]


# -- NUMA and limits, from made-up files ---------------------------------------------------


def sysfs(tmp_path: Path, *cpulists: str) -> Path:
    for node, cpulist in enumerate(cpulists):
        (tmp_path / f"node{node}").mkdir()
        (tmp_path / f"node{node}" / "cpulist").write_text(cpulist + "\n")
    return tmp_path


def test_the_node_of_this_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {9, 10})
    assert own_node(sysfs(tmp_path, "0-3,8", "4-7,9-15")) == (1, "")


def test_a_process_on_several_nodes_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 9})
    node, why = own_node(sysfs(tmp_path, "0-7", "8-15", ""))
    assert node is None
    assert "[0, 1]" in why


@pytest.mark.parametrize("cpulists", [(), ("0-7",)])
def test_one_node_is_no_choice(tmp_path: Path, cpulists: tuple[str, ...]) -> None:
    assert own_node(sysfs(tmp_path, *cpulists))[0] is None


def test_auto_binds_before_the_first_touch(monkeypatch: pytest.MonkeyPatch) -> None:
    bound: list[tuple[int, int]] = []
    monkeypatch.setattr(host_memory, "own_node", lambda: (1, ""))
    monkeypatch.setattr(host_memory, "_mbind", lambda a, n, node: bound.append((n, node)) or 0)
    monkeypatch.setattr(host_memory, "_populate", lambda mapping: bound.append((0, 0)))
    owned = allocate_region(MIB, numa_mode="auto", populate=True)
    assert bound == [(MIB, 1), (0, 0)]
    assert owned.notices == ()
    owned.close()


def test_a_refused_mbind_is_a_notice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "own_node", lambda: (700, ""))  # a real call, no such node
    owned = allocate_region(MIB, numa_mode="auto")
    assert "mbind to node 700" in owned.notices[0]
    owned.close()


def fake_system(tmp_path: Path, group: str = "0::/a/b") -> tuple[Path, Path]:
    proc, cgroups = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:    8000 kB\n")
    (proc / "self/cgroup").write_text(f"4:memory:/x\n{group}\n")
    (cgroups / "a/b").mkdir(parents=True)
    return proc, cgroups


def test_available_is_what_the_kernel_says(tmp_path: Path) -> None:
    assert available_bytes(*fake_system(tmp_path)) == 8000 * 1024


def test_available_is_bounded_by_the_control_groups_above(tmp_path: Path) -> None:
    proc, cgroups = fake_system(tmp_path)
    (cgroups / "a/b/memory.max").write_text("max\n")
    (cgroups / "a/memory.max").write_text("1000000\n")
    (cgroups / "a/memory.current").write_text("700000\n")
    (cgroups / "a/memory.stat").write_text("anon 1\ninactive_file 50000\n")
    assert available_bytes(proc, cgroups) == 350000


def test_a_group_over_its_limit_has_nothing_left(tmp_path: Path) -> None:
    proc, cgroups = fake_system(tmp_path, "0::/")
    (cgroups / "memory.max").write_text("1000\n")
    (cgroups / "memory.current").write_text("2000\n")
    assert available_bytes(proc, cgroups) == 0


def test_a_system_that_does_not_say_is_not_limited(tmp_path: Path) -> None:
    assert available_bytes(tmp_path, tmp_path) == sys.maxsize


# -- the arena -----------------------------------------------------------------------------


@given(
    pages=st.integers(1, 40),
    slack=st.integers(0, PAGE_BYTES - 1),
    offset=st.integers(0, PAGE_BYTES - 1),
    slot_bytes=st.integers(1, 3 * PAGE_BYTES),
)
def test_slots_are_aligned_apart_and_inside(
    pages: int, slack: int, offset: int, slot_bytes: int
) -> None:
    region = region_of(pages * PAGE_BYTES + slack, address=PAGE_BYTES + offset)
    try:
        arena = HostArena(region, slot_bytes)
    except ConfigError:
        assert region.nbytes < slot_bytes + 2 * PAGE_BYTES
        return
    assert slot_bytes <= arena.slot_bytes < slot_bytes + PAGE_BYTES
    ends = region.address
    for index in range(arena.slots):
        assert arena.address(index) % PAGE_BYTES == 0
        assert arena.address(index) >= ends
        ends = arena.address(index) + arena.slot_bytes
        view = arena.slot(index)
        assert view.nbytes == arena.slot_bytes
        view[:] = bytes([index + 1]) * view.nbytes
    assert ends <= region.address + region.nbytes
    for index in range(arena.slots):
        start = arena.address(index) - region.address
        assert region.view[start] == arena.slot(index)[-1] == index + 1


@pytest.mark.parametrize("index", [-1, 2])
def test_there_is_no_such_slot(index: int) -> None:
    arena = HostArena(region_of(2 * PAGE_BYTES), PAGE_BYTES)
    with pytest.raises(IndexError, match="there are 2"):
        arena.slot(index)
    with pytest.raises(IndexError, match="there are 2"):
        arena.address(index)


def test_a_region_without_room_for_a_slot_is_refused() -> None:
    with pytest.raises(ConfigError, match="max_local_cpu_size"):
        HostArena(region_of(PAGE_BYTES), PAGE_BYTES + 1)
