"""Starts of new packages, one for each kind of plugin: what ``lmcache new-plugin`` writes.

Each is a working plugin that passes its kit, with something small where the real thing goes. The
files are `string.Template` texts: ``$name``, ``$Name``, ``$kind`` and ``$what`` are filled in.
Standard library only.
"""

from __future__ import annotations

import re
from pathlib import Path
from string import Template

KINDS = {
    "backend": "Keeps LMCache's chunks in",
    "serde": "Encodes LMCache's chunks:",
    "policy": "Decides which chunks leave LMCache's host memory:",
    "connector": "Connects LMCache to the engine",
    "channel": "Moves LMCache's chunks between processes over",
    "cli": "Adds to the lmcache command:",
}
"""Kind → how a package's description begins."""
_NAME = re.compile(r"[a-z][a-z0-9]*")


def render(kind: str, name: str, into: Path) -> Path:
    """Write a package for a plugin called ``name`` below ``into``; return the new folder.

    Raises:
        ValueError: ``kind`` is none of `KINDS`, or ``name`` isn't a lower-case word.
        FileExistsError: the folder is there already.
    """
    if kind not in KINDS:
        raise ValueError(f"{kind!r} is no kind of plugin; there are {', '.join(KINDS)}")
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} can't be a package and a class; take one lower-case word")
    package = into / f"lmcache-{kind}-{name}"
    module = f"lmcache_{kind}_{name}"
    words = {"name": name, "Name": name.capitalize(), "kind": kind, "what": KINDS[kind]}
    package.mkdir(parents=True)
    here = Path(__file__).parent
    targets = {
        "pyproject.toml": package / "pyproject.toml",
        "README.md": package / "README.md",
        "package.py": package / "src" / module / "__init__.py",
        "test.py": package / "tests" / f"test_{name}.py",
    }
    for folder in (here / "common", here / kind):
        for source in sorted(folder.glob("*.txt")):
            plain = source.name.removesuffix(".txt")
            target = targets.get(plain, package / "src" / module / plain)
            target.parent.mkdir(parents=True, exist_ok=True)
            text = Template(source.read_text(encoding="utf-8")).substitute(words)
            target.write_text(text, encoding="utf-8")
    (package / "src" / module / "py.typed").touch()
    return package
