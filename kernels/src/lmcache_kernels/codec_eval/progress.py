"""Bars for what takes minutes, on stderr."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, TypeVar

from lmcache_core import ConfigError

T = TypeVar("T")


class Progress(Protocol):
    """Passes things through, and shows how many of them have been."""

    def __call__(self, things: Iterable[T], label: str) -> Iterable[T]: ...


def silent(things: Iterable[T], label: str) -> Iterable[T]:  # noqa: ARG001
    """Shows nothing."""
    return things


def bars(things: Iterable[T], label: str) -> Iterable[T]:
    """A bar for each call; things with a length have an end.

    Raises:
        ConfigError: tqdm isn't installed.
    """
    try:
        from tqdm import tqdm
    except ImportError:
        raise ConfigError("progress needs tqdm: pip install lmcache-kernels[eval]") from None
    shown: Iterable[T] = tqdm(things, desc=label, dynamic_ncols=True)
    return shown
