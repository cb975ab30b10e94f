"""The newthing backend keeps the contract. Run it against the real thing, started here."""

from __future__ import annotations

import pytest

from lmcache_backend_newthing.backend import NewthingBackend
from lmcache_backend_newthing.config import NewthingConfig
from lmcache_core.testing.storage import MakeBackend, StorageBackendTests


class TestNewthing(StorageBackendTests):
    @pytest.fixture
    def make_backend(self) -> MakeBackend:
        return lambda: NewthingBackend(NewthingConfig())
