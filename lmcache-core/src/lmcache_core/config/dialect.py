"""What a plugin tells core of how other software writes our options.

Knows the steps of `load_config` in which other names can be understood, and no such name.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from typing import TYPE_CHECKING

from lmcache_core.config.layers import Layer, Merged

if TYPE_CHECKING:
    from lmcache_core.plugins.manager import Plugins


class Dialect(ABC):
    """Understands the keys and variables of other software, and makes options of ours of them.

    Its methods raise nothing: what is wrong is appended to ``problems``, and what the user should
    know to ``notices``.
    """

    names: Collection[str] = ()
    """Its keys at the top level, for suggestions."""
    switches: Collection[str] = ()
    """``LMCACHE_…`` variables that say nothing to us: neither read nor mentioned."""
    foreign_variables: tuple[str, ...] = ()
    """Beginnings of ``LMCACHE_…`` variables that are others', as it knows: not read, mentioned."""
    engine_keys: Collection[str] = ()
    """Keys of an engine's extra configuration that are for others, with their prefix if they have
    one."""

    def option_of_engine_key(self, key: str, value: object) -> tuple[str, object] | None:  # noqa: ARG002
        """Our option and its value, if ``key`` of an engine's extra configuration means one."""
        return None

    def why_without_effect(self, key: str) -> str:  # noqa: ARG002 - for those that override it
        """Why ``lmcache.KEY`` of an engine's extra configuration does nothing; empty if it does."""
        return ""

    @abstractmethod
    def rename(
        self, layer: Layer, plugins: Plugins, problems: list[str], notices: list[str]
    ) -> Layer:
        """``layer`` with the present names of its keys.

        Runs on each layer, so that an old name in a strong one still beats a new one in a weak one.
        """

    @abstractmethod
    def upgrade(
        self, merged: Merged, plugins: Plugins, problems: list[str], notices: list[str]
    ) -> None:
        """Rewrite its keys among all layers, in place, into options and sections of ours."""
