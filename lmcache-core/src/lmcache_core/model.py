"""Names a model's weights, the same in whatever program looks at them.

Knows files. Knows nothing about engines, and nothing about what is computed with the weights.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

_WEIGHTS = (".safetensors", ".bin", ".pt", ".gguf")
_SAMPLES, _SAMPLE_BYTES = 16, 65536


def weights_identity(model: str, commit: str | None = None) -> str:
    """What ``model`` holds, if it is a folder; else its name on a hub, with ``commit``.

    A local folder is named by its files' names, lengths and samples of their bytes, so that a copy
    elsewhere has the same identity, and a retrained checkpoint under the old name hasn't.
    """
    folder = Path(model)
    if not folder.is_dir():
        return f"{model}@{commit}"
    state = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix in _WEIGHTS:
            state.update(f"{file.name} {file.stat().st_size}\n".encode())
            for sample in _samples(file):
                state.update(sample)
    return state.hexdigest()


def _samples(file: Path) -> Iterator[bytes]:
    """The file's start and evenly spaced pieces: a changed checkpoint changes everywhere."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        for part in range(_SAMPLES):
            opened.seek(size * part // _SAMPLES)
            yield opened.read(_SAMPLE_BYTES)
