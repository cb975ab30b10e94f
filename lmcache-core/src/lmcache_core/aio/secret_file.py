"""Files whose content is secret: remarks on those that every user of the machine can read."""

from __future__ import annotations

import logging
import stat
from pathlib import Path

logger = logging.getLogger(__name__)


def remark_if_public(file: Path, what: str) -> None:
    """Warn if everybody may read ``file``, which is a ``what``; nothing if it can't be found."""
    try:
        mode = file.stat().st_mode
    except OSError:
        return
    if mode & stat.S_IROTH:
        logger.warning("%s %s can be read by every user of this machine: chmod 600 it", what, file)
