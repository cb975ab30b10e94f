"""Names a model, the same in whatever program looks at it, and an adapter.

Whatever changes KV values must be in a name, or two things that differ share bytes; whatever
doesn't must stay out, or things that are equal don't share. So a name is made of facts that no
engine owns, and a fact that is as the checkpoint says adds nothing: another engine, or an
application, comes to the same name. What can't be named raises, and isn't cached.

Knows files, addresses and facts. Knows nothing about engines or tokens.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lmcache_core.chunks.digests import Digested, FileDigests
from lmcache_core.chunks.object_weights import is_address, listed
from lmcache_core.errors import UnnamedError

__all__ = [
    "AdapterFacts",
    "ModelFacts",
    "adapter_identity",
    "config_identity",
    "is_address",
    "weights_identity",
]

logger = logging.getLogger(__name__)

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
_NO_WEIGHTS = frozenset(
    {"training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.pt", "scaler.pt"}
)
"""Left behind by training; no engine loads them."""
_FACTS = re.compile(
    r"(config|params|adapter_config|.*quant.*config|.*preprocessor_config|processor_config)\.json"
    r"|.*\.index\.json|.*\.py"
)
"""Files beside the weights that say how to compute with them."""
_IGNORED = re.compile(r"\..*|original|checkpoint-\d+")
"""Folders of a model that no engine looks into."""
_COMMIT = re.compile(r"[0-9a-f]+")


@dataclass(frozen=True)
class ModelFacts:
    """All that KV values of a model depend on besides tokens and layout."""

    weights: str
    """`weights_identity`."""
    dtype: str
    """Of the computation: ``bfloat16``, ``float16``, ``float32``."""
    quantization: str = ""
    """Of the weights, made while they are loaded. Empty: as the checkpoint has them."""
    kv_dtype: str = ""
    """Of the KV cache, where it isn't ``dtype``: ``fp8_e4m3``, ``fp8_e5m2``."""
    draft: str = ""
    """The `name` of the draft model whose layers are in the same cache."""
    overrides: Mapping[str, Any] = field(default_factory=dict)
    """What is set otherwise than the checkpoint's configuration says: RoPE, windows."""
    more: Mapping[str, Any] = field(default_factory=dict)
    """Anything else that changes numbers, by a name that says what it is."""

    def name(self) -> str:
        """A digest of the facts, for `CacheNamespace.model`.

        Raises:
            UnnamedError: a fact isn't a plain value, so that nobody else would write it alike.
        """
        return _digest(vars(self))


@dataclass(frozen=True)
class AdapterFacts:
    """All that an adapter adds to a model."""

    weights: str
    """`adapter_identity`."""
    more: Mapping[str, Any] = field(default_factory=dict)
    """What an engine does otherwise than the adapter says, by a name that says what it is."""

    def name(self) -> str:
        """A digest of the facts, for a request's chain.

        Raises:
            UnnamedError: a fact isn't a plain value.
        """
        return _digest(vars(self))


def _digest(facts: Mapping[str, Any]) -> str:
    given = {name: value for name, value in facts.items() if value}
    try:
        canonical = json.dumps(given, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UnnamedError(f"its configuration has a value without a name: {error}") from None
    return hashlib.sha256(canonical.encode()).hexdigest()


def weights_identity(
    model: str,
    commit: str | None = None,
    *,
    config: Path | None = None,
    digests: FileDigests | None = None,
) -> str:
    """What ``model`` holds: a folder or a file, an address in object storage, a name on a hub.

    A folder is named by the contents of its weights and of the files that say how to compute with
    them, so that a copy elsewhere has the same name and a checkpoint trained further hasn't:
    SHA-256 of a line ``path digest`` for each file, sorted; see `digests`. An address
    (``s3://``, ``gs://``, ``az://``) by itself and what its store says of each object
    (`object_weights`), with the configuration files in the folder ``config``; a hub model by its
    name and ``commit``.

    Raises:
        UnnamedError: there are no weights, or nothing says which they are.
    """
    digests = digests if digests is not None else FileDigests()
    if is_address(model):
        lines = [f"{model.rstrip('/')}/", *listed(model)]
        if config is not None:
            lines += _contents(config, _facts_in(config), digests)[0]
        return _sealed(lines)
    path = Path(model)
    if path.is_file():
        return _sealed(_told(model, _contents(path.parent, [path], digests)))
    if path.is_dir():
        files = sorted(_weights_in(path))
        if not files:
            raise UnnamedError(f"{model} has no weights ({', '.join(_WEIGHTS)})")
        return _sealed(_told(model, _contents(path, files + _facts_in(path), digests)))
    if path.is_absolute() or not commit:
        raise UnnamedError(
            f"{model} is no folder here"
            + ("" if path.is_absolute() else ", and nothing says which commit of it was loaded")
        )
    if not _COMMIT.fullmatch(commit):
        raise UnnamedError(f"{model} at {commit!r}: only a commit stays what it is")
    return f"{model}@{commit}"


def config_identity(
    source: str, commit: str | None = None, digests: FileDigests | None = None
) -> str:
    """What a configuration that lies elsewhere than its weights says: a folder, or a hub's commit.

    Raises:
        UnnamedError: there is none, or nothing says which.
    """
    folder = Path(source)
    if folder.is_dir():
        return _sealed(
            _contents(folder, _facts_in(folder), digests if digests is not None else FileDigests())[
                0
            ]
        )
    return weights_identity(source, commit, digests=digests)


def adapter_identity(folder: Path, digests: FileDigests | None = None) -> str:
    """What the adapter in ``folder`` holds: weights, and ``adapter_config.json`` with its scaling.

    Raises:
        UnnamedError: there is none, or it changes while it is read.
    """
    return _sealed(_adapter(folder, digests if digests is not None else FileDigests()))


def _adapter(folder: Path, digests: FileDigests) -> list[str]:
    try:
        files = sorted(file for file in folder.iterdir() if file.suffix in _WEIGHTS)
    except OSError as error:
        raise UnnamedError(f"{folder}: {error.strerror}") from None
    facts = folder / "adapter_config.json"
    if not files or not facts.is_file():
        raise UnnamedError(f"{folder} has no adapter (adapter_config.json and weights)")
    return _contents(folder, [*files, facts], digests)[0]


def _weights_in(folder: Path) -> Iterator[Path]:
    """Those of the folder itself, and safetensors of models within the model."""
    for where, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not _IGNORED.fullmatch(name)]
        top = Path(where) == folder
        suffixes = _WEIGHTS if top else (".safetensors",)
        for name in names:
            if name.endswith(suffixes) and name not in _NO_WEIGHTS:
                yield Path(where, name)


def _facts_in(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if _FACTS.fullmatch(file.name))


def _contents(
    folder: Path, files: Sequence[Path], digests: FileDigests
) -> tuple[list[str], Digested]:
    found = digests.of(files)
    names = (file.relative_to(folder).as_posix() for file in files)
    lines = [f"{name} {digest}" for name, digest in zip(names, found.digests, strict=True)]
    return sorted(lines), found


def _told(model: str, contents: tuple[list[str], Digested]) -> list[str]:
    """Say what naming ``model`` cost."""
    lines, found = contents
    if found.hashed_bytes:
        logger.info(
            "Named %.1f GiB of weights (%s) in %.1f s; %s",
            found.total_bytes / 2**30,
            model,
            found.seconds,
            "cached" if found.kept else "not cached, so named again at the next start",
        )
    return lines


def _sealed(lines: Sequence[str]) -> str:
    return hashlib.sha256("".join(f"{line}\n" for line in lines).encode()).hexdigest()
