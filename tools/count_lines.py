"""How long each package is: all lines, and those that are code.

    python3 tools/count_lines.py             every package
    python3 tools/count_lines.py --folders   and each folder and module at its top

Code is what is left without comments, docstrings and empty lines, so that nobody saves on those.
Core's kits (``lmcache_core.testing``) are for plugin authors and are counted by themselves. Tests,
examples, tools and what is compiled aren't counted. Only the standard library is needed.
"""

from __future__ import annotations

import argparse
import ast
import io
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
KITS = "testing"
_NO_CODE = {
    *(tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT),
    *(tokenize.ENCODING, tokenize.ENDMARKER),
}


class Lines(NamedTuple):
    """``files`` together have ``all`` lines, of which ``code`` have code."""

    files: int = 0
    all: int = 0
    code: int = 0

    def plus(self, other: Lines) -> Lines:
        """Both together."""
        return Lines(*(one + more for one, more in zip(self, other, strict=True)))


def lines_of(source: str) -> Lines:
    """One file's.

    Raises:
        SyntaxError: it isn't Python.
    """
    docstrings = {
        number
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
        for number in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    code = {
        number
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type not in _NO_CODE
        for number in range(token.start[0], token.end[0] + 1)
    }
    return Lines(1, len(source.splitlines()), len(code - docstrings))


def counted(paths: Iterator[Path]) -> Lines:
    """Several files'."""
    total = Lines()
    for path in paths:
        total = total.plus(lines_of(path.read_text(encoding="utf-8")))
    return total


def packages(root: Path) -> Iterator[tuple[str, Path]]:
    """The name and the folder of each package's modules."""
    for project in sorted(root.glob("*/pyproject.toml")):
        for folder in sorted((project.parent / "src").glob("*/__init__.py")):
            yield project.parent.name, folder.parent


def table(root: Path, *, folders: bool) -> Iterator[tuple[str, Lines]]:
    """What is printed, a row at a time; rows with an indent are parts of the one above."""
    for name, package in packages(root):
        kits = package / KITS
        own = (path for path in sorted(package.rglob("*.py")) if kits not in path.parents)
        yield name, counted(own)
        if kits.exists():
            yield f"{name}, kits", counted(iter(sorted(kits.rglob("*.py"))))
        if folders:
            for part in sorted(package.iterdir(), key=lambda path: (path.is_file(), path.name)):
                if part.is_dir() and part != kits and any(part.rglob("*.py")):
                    yield f"  {part.name}/", counted(part.rglob("*.py"))
                elif part.suffix == ".py":
                    yield f"  {part.stem}", counted(iter([part]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folders", action="store_true", help="each package's folders and modules")
    arguments = parser.parse_args()
    print(f"{'':40}{'files':>8}{'lines':>8}{'code':>8}")
    for name, lines in table(ROOT, folders=arguments.folders):
        print(f"{name:40}{lines.files:8,}{lines.all:8,}{lines.code:8,}")


if __name__ == "__main__":
    main()
