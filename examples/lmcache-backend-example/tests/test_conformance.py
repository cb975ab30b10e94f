"""The whole test suite of the example: core's kit, and a look at the entry point."""

from __future__ import annotations

import io
import tokenize
from importlib.metadata import entry_points
from pathlib import Path

import pytest

import lmcache_backend_example.plugin
from lmcache_backend_example.plugin import SqliteBackend, SqliteConfig
from lmcache_core import Plugins
from lmcache_core.testing.storage import MakeBackend, StorageBackendTests


class TestSqlite(StorageBackendTests):
    @pytest.fixture
    def make_backend(self, tmp_path: Path) -> MakeBackend:
        return lambda: SqliteBackend(SqliteConfig(path=tmp_path))


def test_core_finds_it() -> None:
    (entry_point,) = entry_points(group="lmcache.plugins", name="sqlite")
    assert entry_point.load() is lmcache_backend_example.plugin
    assert Plugins(environ={}).storage_backend("sqlite").create is SqliteBackend


def test_it_is_at_most_50_lines_of_code() -> None:
    """Lines with anything on them but comments and docstrings; imports count."""
    text = Path(lmcache_backend_example.plugin.__file__).read_text()
    lines: set[int] = set()
    first_of_statement = True
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT):
            first_of_statement = True
        elif token.type not in (tokenize.COMMENT, tokenize.NL, tokenize.ENDMARKER):
            if not (token.type == tokenize.STRING and first_of_statement):
                lines.update(range(token.start[0], token.end[0] + 1))
            first_of_statement = False
    assert len(lines) <= 50
