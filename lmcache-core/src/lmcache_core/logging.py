"""Log lines in the form that operators of LMCache know.

    [2025-12-26 18:27:07,860] LMCache INFO: message (module.py:131:package.module)

Modules of core use plain ``logging.getLogger(__name__)`` and configure nothing.
Whoever owns a process (an engine connector, a command) calls `init_logger`
once. Knows nothing about what is logged.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable

LEVEL_VARIABLE = "LMCACHE_LOG_LEVEL"
_FORMAT = "[%(asctime)s] LMCache %(levelname)s: %(message)s (%(filename)s:%(lineno)d:%(name)s)"
_CORE = "lmcache_core"


class FallbackHandler(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes to standard error, but only while the application hasn't set logging up itself.

    Asked for each line, because engines configure logging before or after they load us.
    """

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter(_FORMAT))

    def filter(self, record: logging.LogRecord) -> bool | logging.LogRecord:  # type: ignore[override]
        """Let ``record`` through unless the root logger has handlers, which print it anyway."""
        return False if logging.getLogger().handlers else super().filter(record)


class Seldom:
    """Warns of what others bring about, at most once in ``every_s`` for each kind. Thread-safe.

    ``kind`` is one of a few that the caller knows, never something that a peer said.
    """

    def __init__(
        self,
        logger: logging.Logger,
        every_s: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._logger = logger
        self._every_s = every_s
        self._clock = clock
        self._lock = threading.Lock()
        self._said: dict[str, tuple[float, int]] = {}

    def warn(self, kind: str, text: str, *arguments: object) -> bool:
        """Say it, and how often it wasn't said since the last time; or count it, and say so."""
        now = self._clock()
        with self._lock:
            last, kept = self._said.get(kind, (now - self._every_s, 0))
            if now - last < self._every_s:
                self._said[kind] = last, kept + 1
                return False
            self._said[kind] = now, 0
        more = f" ({kept} more since the last such line)" if kept else ""
        self._logger.warning("%s%s", text % arguments, more, stacklevel=2)
        return True


def init_logger(name: str) -> logging.Logger:
    """The logger ``name``; lines of its package and of core are shown from now on.

    The level is ``LMCACHE_LOG_LEVEL`` (default ``INFO``); a level that doesn't exist is reported
    once and means ``INFO``. A name outside of LMCache's packages is left as it is. Calling this
    again changes nothing.
    """
    for family in dict.fromkeys((_CORE, name.partition(".")[0])):
        if family.startswith("lmcache"):
            _show(logging.getLogger(family))
    return logging.getLogger(name)


def _show(family: logging.Logger) -> None:
    if any(isinstance(handler, FallbackHandler) for handler in family.handlers):
        return
    family.addHandler(FallbackHandler())
    if family.level != logging.NOTSET:
        return  # the application chose a level
    wanted = os.environ.get(LEVEL_VARIABLE, "").strip().upper() or "INFO"
    level = logging.getLevelName(wanted)
    if isinstance(level, int):
        family.setLevel(level)
        return
    family.setLevel(logging.INFO)
    family.warning("%s=%s is no log level; INFO is used instead", LEVEL_VARIABLE, wanted)
