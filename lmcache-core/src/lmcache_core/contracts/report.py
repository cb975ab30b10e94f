"""What a plugin has to say in ``lmcache doctor``, and how bad it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Severity = Literal["ok", "warn", "FAIL"]


@dataclass(frozen=True)
class ReportLine:
    """One line. With a ``FAIL``, ``lmcache doctor`` exits with 1: something won't work."""

    severity: Severity
    text: str
