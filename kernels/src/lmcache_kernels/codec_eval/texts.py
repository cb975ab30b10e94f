"""The texts that models are calibrated and measured with, and pieces of them.

Calibration reads the first half of each text and evaluation the second, so that they never share
any, whatever files are named.
"""

from __future__ import annotations

import ast
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor

from lmcache_core import ConfigError

Half = Literal["calibration", "evaluation"]
_CHARACTERS_A_TOKEN = 8
"""More than any text needs on average; what is cut out is tokenised and shortened."""


@dataclass(frozen=True)
class Text:
    """A text and where it came from."""

    name: str
    content: str


def read(paths: Sequence[Path]) -> list[Text]:
    """The files' texts; those of Python's standard library if none is named.

    Raises:
        ConfigError: one can't be read, or isn't text.
    """
    if not paths:
        return standard_library()
    return [_file(path) for path in paths]


def _file(path: Path) -> Text:
    try:
        return Text(path.name, path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--text {path}: {error}; name a file of plain text") from None


def standard_library() -> list[Text]:
    """What every Python brings along: its modules' documentation strings, and their code.

    Both change with Python's version: name files to compare results.
    """
    prose, code = [], []
    for path in sorted(Path(os.__file__).parent.glob("*.py")):
        source = path.read_text("utf-8", errors="replace")
        code.append(source)
        prose += _docstrings(source)
    # Alternate modules are far apart in the alphabet otherwise: a half should have of everything.
    return [
        Text("python documentation", "\n\n".join(prose[::2] + prose[1::2])),
        Text("python code", "\n\n".join(code[::2] + code[1::2])),
    ]


def _docstrings(source: str) -> list[str]:
    try:
        tree = ast.parse(source)
    except SyntaxError:  # a module for another version
        return []
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))
    return [text for text in found if text and len(text) > 200]


def windows(
    texts: Sequence[Text],
    half: Half,
    count: int,
    length: int,
    tokens: Callable[[str], Tensor],
) -> list[Tensor]:
    """``count`` pieces of ``length`` tokens, taken from the texts in turn, evenly spaced in each.

    Raises:
        ConfigError: a text is too short for its share.
    """
    found = []
    for number in range(count):
        text = texts[number % len(texts)]
        part = _half(text, half)
        share = len(range(number % len(texts), count, len(texts)))
        start, end = (len(part) * (number // len(texts) + n) // share for n in (0, 1))
        if start:  # where a line begins, which is where prompts begin
            start = part.find("\n", start, end) + 1 or start
        ids = tokens(part[start : min(end, start + length * _CHARACTERS_A_TOKEN)])[:length]
        if len(ids) < length:
            raise ConfigError(
                f"text {text.name!r} is too short: of its {half} half {share} x {length} tokens "
                f"are needed, and a {share}th of its {len(part)} characters has {len(ids)}; name "
                "longer texts with --text, or ask for less"
            )
        found.append(ids)
    return found


def _half(text: Text, half: Half) -> str:
    middle = text.content.find("\n", len(text.content) // 2) + 1 or len(text.content) // 2
    return text.content[:middle] if half == "calibration" else text.content[middle:]
