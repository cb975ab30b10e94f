"""The committed reference pages are those that the code makes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lmcache_core.config.models import CoreConfig
from lmcache_core.dialect.table import ALIASES, KEYS

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "configuration.md"


@pytest.mark.parametrize("tool", ["config_reference.py", "public_surface.py"])
def test_the_page_is_current(tool: str) -> None:
    command = [sys.executable, str(ROOT / "tools" / tool), "--check"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_the_page_names_every_option_and_every_key_of_lmcache() -> None:
    text = PAGE.read_text(encoding="utf-8")
    missing = [n for n in (*CoreConfig.model_fields, *KEYS, *ALIASES) if f"`{n}`" not in text]
    assert missing == []
