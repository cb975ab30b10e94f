"""One line of what ``lmcache doctor`` reports."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Verdict = Literal["ok", "warn", "FAIL"]


@dataclass(frozen=True)
class Finding:
    """A verdict, and what it is about; a failure's text ends with the remedy."""

    verdict: Verdict
    text: str
