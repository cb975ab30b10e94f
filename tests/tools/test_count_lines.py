"""What `tools/count_lines.py` takes for code."""

from __future__ import annotations

from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / "tools"
MODULE = '''"""A module.

Two paragraphs.
"""
# a comment

import os  # with a comment


class A:
    """Has a docstring."""

    x = """not
    one"""
    """What x is."""

    def f(self):
        """One line."""
        return (
            os
        )
'''


@pytest.fixture(autouse=True)
def _tools_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(TOOLS))


def test_comments_docstrings_and_empty_lines_are_no_code() -> None:
    from count_lines import Lines, lines_of

    assert lines_of(MODULE) == Lines(files=1, all=21, code=8)
    assert lines_of("") == Lines(files=1, all=0, code=0)


def test_kits_are_counted_by_themselves(tmp_path: Path) -> None:
    from count_lines import Lines, table

    package = tmp_path / "lmcache-x" / "src" / "lmcache_x"
    (package / "testing").mkdir(parents=True)
    (package / "inner").mkdir()
    (tmp_path / "lmcache-x" / "pyproject.toml").touch()
    for name in ("__init__", "testing/kit", "inner/one", "inner/two"):
        (package / f"{name}.py").write_text("a = 1\n")
    (tmp_path / "lmcache-x" / "tests.py").write_text("a = 1\n")
    assert list(table(tmp_path, folders=True)) == [
        ("lmcache-x", Lines(3, 3, 3)),
        ("lmcache-x, kits", Lines(1, 1, 1)),
        ("  inner/", Lines(2, 2, 2)),
        ("  __init__", Lines(1, 1, 1)),
    ]
