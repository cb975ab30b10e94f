"""Isolated backends keep the contract, with buffers that aren't shared with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lmcache_core.builtin.filesystem import FilesystemConfig
from lmcache_core.builtin.memory import MemoryConfig
from lmcache_core.isolation.backend import IsolatedBackend
from lmcache_core.metrics import Counters
from lmcache_core.testing.storage import MakeBackend, StorageBackendTests


def isolated(kind: str, options: Any) -> IsolatedBackend:
    return IsolatedBackend(
        kind, options, where="backends.test", deadline_s=30.0, counters=Counters()
    )


class TestMemory(StorageBackendTests):
    @pytest.fixture
    def make_backend(self) -> MakeBackend:
        return lambda: isolated("memory", MemoryConfig())


class TestFilesystem(StorageBackendTests):
    @pytest.fixture
    def make_backend(self, tmp_path: Path) -> MakeBackend:
        options = FilesystemConfig(path=tmp_path, min_free_gib=0)
        return lambda: isolated("filesystem", options)
