"""Which profile a serde encodes with, and where those that streams name are.

Knows configuration and files. Knows nothing about what a profile holds.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from lmcache_core import LayerGroup, SerdeFacts
from lmcache_kernels import _native
from lmcache_kernels.codec.profile import Profile

FOLDER_VARIABLE = "LMCACHE_PROFILES"
CACHE_VARIABLE = "XDG_CACHE_HOME"

logger = logging.getLogger(__name__)


def profile_folder(configured: Path | None, environ: Mapping[str, str]) -> Path:
    """Where profiles are: ``configured``, ``$LMCACHE_PROFILES``, or the user's cache."""
    if configured is not None:
        return configured
    if environ.get(FOLDER_VARIABLE):
        return Path(environ[FOLDER_VARIABLE])
    cache = environ.get(CACHE_VARIABLE)
    return (Path(cache) if cache else Path.home() / ".cache") / "lmcache" / "profiles"


class Profiles:
    """The profiles of one tier. Thread-safe.

    ``wanted``: ``auto`` looks in ``folder`` for one of the model that ``facts`` names, a path is a
    file, ``none`` encodes without. Whatever it says, streams are decoded with the profile that they
    name, if it is in ``folder``.

    Raises:
        ConfigError: the file that ``wanted`` names isn't there, or isn't a profile.
    """

    def __init__(
        self,
        wanted: Literal["auto", "none"] | Path | Profile,
        folder: Path,
        facts: SerdeFacts | None = None,
    ) -> None:
        self._wanted, self._folder, self._facts = wanted, folder, facts or SerdeFacts()
        self._given: Profile | None = None
        if isinstance(wanted, Profile):
            self._given = wanted
        elif isinstance(wanted, Path):
            self._given = Profile.load(wanted)
        self._chosen: dict[LayerGroup, Profile | None] = {}
        self._named: dict[int, Profile | None] = {}
        self._lock = threading.Lock()

    def bound(self, facts: SerdeFacts) -> Profiles:
        """The same for another tier."""
        return Profiles(self._given or self._wanted, self._folder, facts)

    def chosen(self, group: LayerGroup) -> str | None:
        """The digest of the profile that `to_encode` gives; ``None`` if that gives none.

        Raises:
            ConfigError: the profile's file isn't what its name says.
        """
        with self._lock:
            found = self._choice(group)
            return None if found is None else found.digest

    def to_encode(self, group: LayerGroup) -> _native.CodecProfile | None:
        """The profile to encode ``group`` with; ``None`` to encode without.

        Raises:
            ConfigError: the profile's file isn't what its name says.
        """
        with self._lock:
            found = self._choice(group)
            return None if found is None else self._native(found, group)

    def to_decode(self, encoded: memoryview, group: LayerGroup) -> _native.CodecProfile | None:
        """The profile that ``encoded`` names; ``None`` if it names none, or none that is here.

        Raises:
            ValueError: ``encoded`` isn't a stream of these codecs.
            ConfigError: the profile's file isn't what its name says.
        """
        number = _native.codec_profile_of(encoded)
        if number == 0:
            return None
        with self._lock:
            known = [self._given, *self._chosen.values()]
            found = next((one for one in known if one is not None and one.id == number), None)
            if found is None:
                if self._named.get(number) is None:
                    self._named[number] = Profile.named(self._folder, number)
                found = self._named[number]
            return None if found is None else self._native(found, group)

    def _choice(self, group: LayerGroup) -> Profile | None:
        if group not in self._chosen:
            self._chosen[group] = self._choose(group)
        return self._chosen[group]

    def _choose(self, group: LayerGroup) -> Profile | None:
        if self._wanted == "none" or group.planes != 2:
            return None
        if self._given is not None:
            # Who asks without facts, as tests and evaluations do, knows what it asks for.
            foreign = self._facts.weights and self._given.model not in ("", self._facts.weights)
            if foreign or self._native(self._given, group) is None:
                logger.warning(
                    "Profile %s is of the model %s, with %d layers and %d heads of %d, and not of "
                    "this one (%s): chunks are encoded without it",
                    self._given.digest,
                    self._given.model or "that has no name",
                    self._given.layers,
                    self._given.heads,
                    self._given.head_size,
                    self._facts.weights or "no name",
                )
                return None
            return self._given
        if not self._facts.weights:
            return None
        found = Profile.find(self._folder, self._facts.weights, group)
        if found is None:
            logger.info(
                "There is no profile of this model (%s) in %s: chunks are encoded without one. "
                "`lmcache codec calibrate` makes one",
                self._facts.weights,
                self._folder,
            )
        return found

    def _native(self, profile: Profile, group: LayerGroup) -> _native.CodecProfile | None:
        return profile.of(group)
