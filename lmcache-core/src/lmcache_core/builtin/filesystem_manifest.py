"""``manifest.json`` in a namespace's folder: for people, what the chunks in it are of.

Never trusted: nothing that is loaded depends on it, and a damaged one is written anew. Its time
says when the namespace was last used, to whoever looks for chunks that nobody needs.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from lmcache_core.builtin.filesystem_io import FULL, ChunkFiles
from lmcache_core.chunks.keys import CacheNamespace
from lmcache_core.plugins.discovery import core_version

logger = logging.getLogger(__name__)

NAME = "manifest.json"
FORMAT = 1
_MOST_BYTES = 1 << 16


def facts(namespace: CacheNamespace) -> dict[str, object]:
    """What a manifest says of ``namespace``."""
    return {
        "format": FORMAT,
        "version": core_version(),
        "fingerprint": namespace.fingerprint,
        **namespace.facts(),
    }


def keep(folder: Path, namespace: CacheNamespace, files: ChunkFiles, name: str) -> None:
    """Have the manifest of ``namespace`` in its folder; ``name`` is who says so if it was damaged.

    Raises:
        OSError: the folder failed; a full disk isn't an error.
    """
    wanted = facts(namespace)
    found = read(folder)
    if found is None and (folder / NAME).exists():
        logger.warning("%s: %s was damaged; it is written anew", name, folder / NAME)
    if found != wanted:
        text = json.dumps(wanted, indent=1, sort_keys=True) + "\n"
        try:
            files.write(folder / NAME, memoryview(text.encode()))
        except OSError as error:
            if error.errno not in FULL:
                raise
    used(folder)


def read(folder: Path) -> Mapping[str, object] | None:
    """What the manifest in ``folder`` says; ``None`` if there is none, or it is damaged."""
    try:
        with (folder / NAME).open("rb") as file:
            said = json.loads(file.read(_MOST_BYTES))
    except (OSError, ValueError, RecursionError):
        return None
    return said if isinstance(said, dict) else None


def described(folder: Path) -> str:
    """In a few words, what the chunks in ``folder`` are of, as far as its manifest says."""
    said = read(folder)
    if said is None:
        return "no manifest says what of"
    if "model" not in said:
        text = str(said.get("known_to", "its manifest says nothing of a model"))
    else:
        layout = said.get("layout")
        tokens = layout.get("tokens_per_chunk") if isinstance(layout, dict) else None
        called = f" ({said['label']})" if said.get("label") else ""
        text = f"model {said['model']}{called}, {tokens} tokens a chunk, {said.get('place')}"
    return "".join(one if one.isprintable() else "?" for one in text[:300])


def used(folder: Path) -> None:
    """Say that the namespace of ``folder`` is in use."""
    with suppress(OSError):
        os.utime(folder / NAME)


def last_used_s(folder: Path) -> float:
    """When somebody said so last, in seconds since 1970; 0 if nobody did."""
    try:
        return os.stat(folder / NAME).st_mtime
    except OSError:
        return 0.0
