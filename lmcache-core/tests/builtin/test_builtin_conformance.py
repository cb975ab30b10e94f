"""The built-in backends and serdes keep their own contracts, in every configuration."""

from __future__ import annotations

from pathlib import Path

import pytest

from lmcache_core.builtin.filesystem import FilesystemBackend, FilesystemConfig
from lmcache_core.builtin.memory import MemoryBackend, MemoryConfig
from lmcache_core.builtin.raw import RawSerde
from lmcache_core.testing.serde import MakeSerde, SerdeTests
from lmcache_core.testing.storage import MakeBackend, StorageBackendTests


class TestMemory(StorageBackendTests):
    @pytest.fixture
    def make_backend(self) -> MakeBackend:
        return lambda: MemoryBackend(MemoryConfig())


class TestFilesystem(StorageBackendTests):
    @pytest.fixture
    def make_backend(self, tmp_path: Path) -> MakeBackend:
        return lambda: FilesystemBackend(FilesystemConfig(path=tmp_path, min_free_gib=0))


class TestFilesystemBounded(StorageBackendTests):
    @pytest.fixture
    def make_backend(self, tmp_path: Path) -> MakeBackend:
        return lambda: FilesystemBackend(
            FilesystemConfig(path=tmp_path, min_free_gib=0, max_size_gib=0.0625)
        )


class TestFilesystemDirect(StorageBackendTests):
    @pytest.fixture
    def make_backend(self, tmp_path: Path) -> MakeBackend:
        return lambda: FilesystemBackend(
            FilesystemConfig(path=tmp_path, min_free_gib=0, direct_io=True, fsync=True)
        )


class TestRaw(SerdeTests):
    @pytest.fixture
    def make_serde(self) -> MakeSerde:
        return lambda: RawSerde()
