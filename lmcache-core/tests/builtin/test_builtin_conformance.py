"""The built-in backends and serdes keep their own contracts, in every configuration."""

from __future__ import annotations

from pathlib import Path

import pytest

from lmcache_core.builtin.filesystem import FilesystemBackend, FilesystemConfig
from lmcache_core.builtin.memory import MemoryBackend, MemoryConfig
from lmcache_core.builtin.raw import RawSerde
from lmcache_core.testing.serde import MakeSerde, SerdeTests
from lmcache_core.testing.storage import VALUE_BYTES, MakeBackend, StorageBackendTests


class TestMemory(StorageBackendTests):
    @pytest.fixture
    def make_backend(self) -> MakeBackend:
        return lambda: MemoryBackend(MemoryConfig())

    @pytest.fixture
    def make_small(self) -> MakeBackend:
        return lambda: MemoryBackend(MemoryConfig(max_size_gib=100 * VALUE_BYTES / 2**30))


class TestFilesystem(StorageBackendTests):
    @pytest.fixture
    def make_backend(self, tmp_path: Path) -> MakeBackend:
        return lambda: FilesystemBackend(FilesystemConfig(path=tmp_path, min_free_gib=0))

    @pytest.fixture
    def make_small(self, tmp_path: Path) -> MakeBackend:
        bound = 100 * VALUE_BYTES
        options = FilesystemConfig(path=tmp_path, min_free_gib=0, max_size_gib=bound / 2**30)
        return lambda: FilesystemBackend(options)

    @pytest.fixture
    def make_unreachable(self, tmp_path: Path) -> MakeBackend:
        (tmp_path / "file").touch()
        options = FilesystemConfig(path=tmp_path / "file" / "folder", min_free_gib=0)
        return lambda: FilesystemBackend(options)


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
