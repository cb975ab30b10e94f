"""One kind of thing that plugins offer, by name.

Knows descriptors and who ships them. Knows nothing about how plugins are
loaded.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar, runtime_checkable

from pydantic import BaseModel

from lmcache_core.contracts.connector import EngineConnectorDescriptor
from lmcache_core.contracts.eviction import CachePolicyDescriptor
from lmcache_core.contracts.serde import SerdeDescriptor
from lmcache_core.contracts.storage import StorageBackendDescriptor
from lmcache_core.contracts.transfer import TransferChannelDescriptor
from lmcache_core.errors import PluginError
from lmcache_core.plugins.discovery import IN_PROCESS, in_words

RESERVED_OPTIONS = frozenset({"type", "serde", "deadline_s", "isolated", "isolated_memory_gib"})
"""Options of every ``backends:`` section, so that no backend can have its own of these names."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@runtime_checkable
class Descriptor(Protocol):
    """What all descriptors have."""

    @property
    def name(self) -> str: ...

    @property
    def summary(self) -> str: ...


_CONFIGURED = (
    StorageBackendDescriptor,
    SerdeDescriptor,
    EngineConnectorDescriptor,
    TransferChannelDescriptor,
    CachePolicyDescriptor,
)
_D = TypeVar("_D", bound=Descriptor)
_D_co = TypeVar("_D_co", bound=Descriptor, covariant=True)


@dataclass(frozen=True)
class Offer(Generic[_D_co]):
    """A descriptor and the plugin that offers it."""

    descriptor: _D_co
    plugin: str
    """`Candidate.identity` of the plugin."""
    distribution: str
    version: str


class Registry(Generic[_D]):
    """All descriptors of one kind.

    Two offers of one name are kept both: that is nobody's problem until the name is used. Those of
    the distribution that ``yields`` give way to others.
    """

    def __init__(
        self,
        noun: str,
        hook: str,
        type_: type[_D],
        *,
        fold: bool = False,
        yields: str | None = None,
    ) -> None:
        self.noun = noun
        self.hook = hook
        self._type = type_
        self._fold = fold
        self._yields = yields
        self._offers: dict[str, list[Offer[_D]]] = {}

    def check(self, returned: object) -> list[_D]:
        """``returned`` as the descriptors that the hook's contract asks for.

        Raises:
            TypeError, ValueError: it is something else; the message says what.
        """
        if isinstance(returned, (str, bytes)) or not isinstance(returned, Sequence):
            raise TypeError(f"{self.hook} returned {returned!r:.80}, not a list of descriptors")
        checked: list[_D] = []
        seen: set[str] = set()
        for item in returned:
            if not isinstance(item, self._type):
                raise TypeError(f"{self.hook} returned {item!r:.80}, not a {self._type.__name__}")
            if not isinstance(item.name, str) or not _NAME.fullmatch(item.name):
                raise ValueError(f"{self.hook}: {item.name!r:.80} isn't a name for a {self.noun}")
            _check_details(item)
            names = {self.key(name) for name in _names(item)}
            if seen & names:
                raise ValueError(f"{self.hook} returned two descriptors for {item.name!r}")
            seen |= names
            checked.append(item)
        return checked

    def add(self, offer: Offer[_D]) -> None:
        """Make an offer's names known."""
        for name in dict.fromkeys(map(self.key, _names(offer.descriptor))):
            self._offers.setdefault(name, []).append(offer)

    def find(self, name: str) -> _D | None:
        """The descriptor that is called ``name``, or ``None``.

        Raises:
            PluginError: two plugins call something so.
        """
        offers = self._competing(self._offers.get(self.key(name), []))
        if len(offers) > 1:
            raise PluginError(conflict(f"the {self.noun} {name!r}", offers))
        return offers[0].descriptor if offers else None

    def conflicts(self) -> list[tuple[str, list[Offer[_D]]]]:
        """Each name that several plugins claim, with their offers."""
        competing = {name: self._competing(offers) for name, offers in self._offers.items()}
        return [(name, offers) for name, offers in competing.items() if len(offers) > 1]

    def _competing(self, offers: list[Offer[_D]]) -> list[Offer[_D]]:
        return [offer for offer in offers if offer.distribution != self._yields] or offers

    def __iter__(self) -> Iterator[Offer[_D]]:
        """Every offer once, aliases not counted, in the order of discovery."""
        return iter({id(o): o for offers in self._offers.values() for o in offers}.values())

    def names(self) -> list[str]:
        """The proper names, sorted."""
        return sorted({offer.descriptor.name for offer in self})

    def key(self, name: str) -> str:
        """``name`` as names of this kind are compared."""
        return name.upper() if self._fold else name


def conflict(what: str, offers: Sequence[Offer[_D]]) -> str:
    """Says who is in conflict over ``what`` and how to end it."""
    names = [offer.plugin.partition(":")[2] for offer in offers]
    owners = [in_words(name, offer.distribution) for name, offer in zip(names, offers, strict=True)]
    last = offers[-1].distribution
    off = names[-1] if last == IN_PROCESS else last
    return (
        f"{len(offers)} plugins provide {what}: {' and '.join(owners)}. Remedy: uninstall all but "
        f"one, or turn one off with LMCACHE_DISABLE_PLUGINS={off}"
    )


def _names(descriptor: Descriptor) -> tuple[str, ...]:
    aliases = descriptor.aliases if isinstance(descriptor, SerdeDescriptor) else ()
    return (descriptor.name, *aliases)


def _check_details(item: Descriptor) -> None:
    """What a wrong type annotation would let through and a user would have to find out."""
    if not isinstance(item, _CONFIGURED):
        return
    _check_model(item.name, item.config)
    _check_callable(item.name, "create", item.create, optional=not _needs_create(item))
    if isinstance(item, StorageBackendDescriptor):
        _check_callable(item.name, "config_from_url", item.config_from_url, optional=True)
        if taken := RESERVED_OPTIONS & item.config.model_fields.keys():
            raise ValueError(
                f"{item.name}: {', '.join(sorted(taken))} belongs to every backend section and "
                "can't be an option of the backend itself"
            )
    if isinstance(item, SerdeDescriptor) and any("+" in name for name in _names(item)):
        raise ValueError(f"{item.name}: '+' chains serdes and can't be part of a name")


def _needs_create(item: Descriptor) -> bool:
    return not isinstance(item, EngineConnectorDescriptor)


def _check_callable(
    name: str, what: str, value: Callable[..., object] | None, *, optional: bool
) -> None:
    if not callable(value) and not (optional and value is None):
        raise TypeError(f"{name}: {what} is {value!r:.80}, not something to call")


def _check_model(name: str, model: object) -> None:
    if not isinstance(model, type) or not issubclass(model, BaseModel):
        raise TypeError(f"{name}: config is {model!r:.80}, not a pydantic model")
    if model.model_config.get("extra") != "forbid":
        raise ValueError(
            f"{name}: its config model {model.__name__} doesn't forbid unknown options "
            '(model_config = ConfigDict(extra="forbid")), so that mistyped ones would be ignored'
        )
