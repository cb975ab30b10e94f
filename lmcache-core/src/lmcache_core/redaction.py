"""Hides what is secret in addresses, before anybody reads them in an error, a log or a table.

Knows how addresses say secrets: before an ``@``, and as options of a query. Knows nothing about
which options are secret by themselves.
"""

from __future__ import annotations

import re
from typing import Final

HIDDEN: Final = "***"
_SECRET = r"tok|pas|pw|secr|cred|auth|key|sig"  # noqa: S105  also of names mistyped
_OPTION = re.compile(rf"([?&;][\w.%-]*(?:{_SECRET})[\w.%-]*=)[^&;\s'\"]*", re.IGNORECASE)
_WHOLE_OPTION = re.compile(rf"([?&;][\w.%-]*(?:{_SECRET})[\w.%-]*=)[^&;]*", re.IGNORECASE)
_LOGIN = re.compile(r"(://)[^\s'\"]*@")
_WHOLE_LOGIN = re.compile(r"(://).*@", re.DOTALL)
_QUOTED_LOGIN = re.compile(r"(['\"])(?![\w+.-]*://)[^\s'\"]*@")


def without_password(value: str) -> str:
    """``value``, which may be an address, with user, password and secret options hidden."""
    return _WHOLE_LOGIN.sub(rf"\1{HIDDEN}@", _WHOLE_OPTION.sub(rf"\1{HIDDEN}", value))


def without_passwords_in(text: str) -> str:
    """The same for a sentence with addresses in it, and with quoted parts of them."""
    text = _OPTION.sub(rf"\1{HIDDEN}", text)
    text = _LOGIN.sub(rf"\1{HIDDEN}@", text)
    return _QUOTED_LOGIN.sub(rf"\1{HIDDEN}@", text)
