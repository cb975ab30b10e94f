"""The examples in the documentation run as they stand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(
    ("page", "count"), [("docs/python-api.md", None), ("README.md", None), ("docs/transfer.md", 1)]
)
def test_examples(
    page: str, count: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of them, or the first ``count``: the others are parts of something."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LMCACHE_MAX_LOCAL_CPU_SIZE", "0.1")
    blocks = BLOCK.findall((ROOT / page).read_text())[:count]
    assert blocks
    names: dict[str, Any] = {}
    for number, block in enumerate(blocks, 1):
        exec(compile(block, f"{page} example {number}", "exec"), names)  # noqa: S102
