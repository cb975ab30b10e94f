"""Makes the objects that descriptors describe.

Knows how a plugin's ``create`` may fail and what its user should do then.
Knows nothing about what is made.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import metadata
from typing import TYPE_CHECKING, TypeVar

from lmcache_core.aio.guard import attempt
from lmcache_core.contracts.transfer import TransferChannel, TransferChannelDescriptor
from lmcache_core.errors import BackendRejected, ConfigError, LMCacheError, PluginLoadError
from lmcache_core.redaction import without_passwords_in

if TYPE_CHECKING:
    from pydantic import BaseModel

_T = TypeVar("_T")


class NotCreated(LMCacheError):
    """A backend that is made where it is opened can't be made; ``problem`` is for the user."""

    def __init__(self, problem: LMCacheError) -> None:
        super().__init__(str(problem))
        self.problem = problem


def created(
    call: Callable[[], _T], kind: type[_T], where: str, source: Callable[..., object]
) -> _T:
    """What a descriptor's ``create`` makes. ``where`` says which; ``source`` is that ``create``.

    Raises:
        ConfigError: the options are refused.
        PluginLoadError: it can't be made; the message says what to do.
    """
    made: list[_T] = []
    error = attempt(lambda: made.append(call()))
    if error is None and isinstance(made[0], kind):
        return made[0]
    if isinstance(error, (ConfigError, BackendRejected)):
        raise ConfigError(f"{where}: {without_passwords_in(str(error))}") from error
    distribution = _distribution(source)
    if error is None:
        raise PluginLoadError(
            f"{where}: create() answered {made[0]!r}, not a {kind.__name__}; this is a mistake in "
            f"{distribution}"
        )
    if isinstance(error, ImportError):
        raise PluginLoadError(
            f"{where}: {error}. Install what it needs: pip install {distribution}"
        ) from error
    raise PluginLoadError(
        f"{where} can't be created: {type(error).__name__}: {without_passwords_in(str(error))}; "
        f"correct its options or report this to the authors of {distribution}"
    ) from error


def created_channel(
    descriptor: TransferChannelDescriptor, config: BaseModel, where: str
) -> TransferChannel:
    """The channel that ``descriptor`` describes, in this process; it isn't open yet.

    Raises:
        ConfigError, PluginLoadError: as `created` does.
    """
    return created(
        lambda: descriptor.create(config),
        TransferChannel,  # type: ignore[type-abstract]
        where,
        descriptor.create,
    )


def _distribution(source: Callable[..., object]) -> str:
    """The name to give to pip for the code of ``source``."""
    package = getattr(source, "__module__", "").partition(".")[0]
    names = metadata.packages_distributions().get(package)
    return names[0] if names else package.replace("_", "-")
