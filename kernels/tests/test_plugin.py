"""What the plugin offers to core."""

from __future__ import annotations

import subprocess
import sys

import pytest

from lmcache_core.chunks.chunk_index import DictIndex
from lmcache_core.contracts import eviction
from lmcache_core.errors import ConfigError
from lmcache_core.plugins.manager import Plugins
from lmcache_kernels import plugin
from lmcache_kernels.cpu import CpuKernels, usable_cpus
from lmcache_kernels.index import ChunkIndex


def test_core_finds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(plugin.THREADS_VARIABLE, "3")
    kernels = Plugins().kernels("cpu")
    assert isinstance(kernels, CpuKernels)
    assert (kernels.name, kernels.threads) == ("native-cpu", 3)


def test_core_finds_index_and_policies() -> None:
    plugins = Plugins()
    assert plugins.host_kernels() is not None
    assert isinstance(plugins.chunk_index(8), ChunkIndex)
    for name in ("LRU", "fifo", "MRU"):
        assert plugins.make_cache_policy(name).__class__.__module__ == "lmcache_kernels.index"
    assert plugins.conflicts() == []
    without = Plugins(disabled=["kernels"])
    assert without.host_kernels() is None
    assert isinstance(without.chunk_index(8), DictIndex)
    assert isinstance(without.make_cache_policy("LRU"), eviction.LRU)


def test_other_devices_are_others_business(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(plugin.TRITON_VARIABLE, raising=False)
    assert plugin.lmcache_kernels("meta") is None
    assert plugin.lmcache_kernels("cuda") is None


def test_triton_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="pip install lmcache-kernels[triton]")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv(plugin.TRITON_VARIABLE, "1")
    kernels = plugin.lmcache_kernels("cuda")
    assert kernels is not None
    assert kernels.name == "triton"


def test_threads_by_default() -> None:
    assert CpuKernels().threads == min(2, usable_cpus())


@pytest.mark.parametrize("text", ["0", "-1", "two", "", "257", "1.5", "²"])
def test_threads_that_cannot_be(text: str) -> None:
    with pytest.raises(ConfigError, match="LMCACHE_KERNEL_THREADS="):
        plugin.threads_from({plugin.THREADS_VARIABLE: text})


def test_report() -> None:
    (line,) = plugin.lmcache_report()
    assert line.startswith("lmcache-kernels 0.")
    assert "SIMD" in line
    assert "thread" in line


def test_the_plugin_imports_no_torch() -> None:
    code = "import sys, lmcache_kernels.plugin; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
