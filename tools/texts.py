"""Prepares plain text for `lmcache codec`: English of three kinds, from Debian's packages.

    python3 tools/texts.py        prints a directory with handbook.txt, essays.txt and python.txt

Needs apt-get and dpkg, and no root: packages are unpacked, not installed. Standard library only.
"""

from __future__ import annotations

import gzip
import html
import re
import sys
from pathlib import Path

from prepared import PreparationError, cache_root, prepare, recipe_digest, run_step, say

RECIPE = "1"
SOURCES = {
    # A manual; essays; reference and tutorials with code.
    "handbook": ("debian-handbook", "usr/share/doc/debian-handbook/html/en-US/*.html"),
    "essays": ("anarchism", "usr/share/doc/anarchism/**/*"),
    "python": ("python3.11-doc", "usr/share/doc/python3.11/html/_sources/**/*.rst.txt"),
}
_SHORTEST = 3000
"""Characters of a page that isn't just a list of links."""


def texts() -> Path:
    """The directory with the texts."""
    packages = [package for package, _ in SOURCES.values()]
    return prepare(cache_root() / f"texts-{recipe_digest(RECIPE, *packages)}", _build)


def _build(directory: Path) -> None:
    say(f"texts: {directory}")
    log = directory / "build.log"
    for name, (package, pattern) in SOURCES.items():
        run_step(f"{package}", ["apt-get", "download", package], log, cwd=directory)
        (archive,) = directory.glob(f"{package}_*.deb")
        unpacked = directory / package
        run_step(f"{package}: unpack", ["dpkg", "-x", archive, unpacked], log)
        pages = [_plain(path) for path in sorted(unpacked.glob(pattern)) if path.is_file()]
        kept = [page for page in pages if len(page) >= _SHORTEST]
        if not kept:
            raise PreparationError(f"{package} has no text in {pattern}")
        (directory / f"{name}.txt").write_text("\n\n".join(kept), "utf-8")
        archive.unlink()


def _plain(path: Path) -> str:
    """A page's text; nothing of what isn't a page."""
    if not re.search(r"\.(html|txt|md|markdown)(\.gz)?$", path.name):
        return ""
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    text = raw.decode("utf-8", errors="replace")
    return _without_tags(text) if ".html" in path.name else text.strip()


def _without_tags(text: str) -> str:
    text = re.sub(r"(?s)<(script|style|head|nav)\b.*?</\1>", "", text)
    text = re.sub(r"(?i)<(p|div|h\d|li|br|tr|table|ul|ol|dt|dd|pre)\b[^>]*>", "\n", text)
    text = html.unescape(re.sub(r"(?s)<[^>]+>", "", text))
    text = re.sub(r" *\n *", "\n", re.sub(r"[ \t]+", " ", text))
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def main() -> int:
    """Print the directory."""
    try:
        print(texts())
    except PreparationError as error:
        say(f"error: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
