"""Every exception that lmcache-core raises on purpose.

* LMCacheError
  x ConfigError               the user can fix it; raised only at start-up
  x PluginError               a plugin is broken, missing or incompatible
    - PluginLoadError
    - UnknownPluginError
    - PluginRaised            what would have ended a loop or a thread, in words
  x LayoutError               an engine's memory layout isn't one that we can store
  x UnnamedError              a model or an adapter that can't be named, so isn't cached
  x FrameError                bytes that aren't the chunk that was asked for
  x LeaseError                a lease was given back twice: a mistake in our own code
  x BackendError              one storage call failed as a whole; core degrades it to a miss
    - BackendUnavailable      retry later (network, restart)
    - BackendTimeout
    - BackendRejected         do not retry (too large, read-only, authentication)

Knows nothing about who raises or catches them.
"""

from __future__ import annotations


class LMCacheError(Exception):
    """Base class of every error in this package."""


class ConfigError(LMCacheError):
    """The configuration is wrong. The message names the key, its origin and the remedy."""


class PluginError(LMCacheError):
    """A plugin is broken, missing or incompatible."""


class PluginLoadError(PluginError):
    """A plugin that the configuration needs could not be loaded."""


class UnknownPluginError(PluginError):
    """The configuration names something that no installed plugin provides."""


class PluginRaised(PluginError):
    """Code of a plugin raised what would have ended a loop, a thread or the process."""


class LayoutError(LMCacheError):
    """An engine's KV memory has a layout that can't be stored without guessing."""


class UnnamedError(LMCacheError):
    """What KV values depend on can't be named, so they are neither stored nor loaded.

    The message is a reason: it follows "isn't cached: " in the one line that says so.
    """


class FrameError(LMCacheError):
    """A stored value isn't the chunk that was asked for.

    ``reason`` is a short, fixed word (``magic``, ``version``, ``key`` …): it labels the counter.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class LeaseError(LMCacheError):
    """A lease was given back twice, or taken of what is nobody's any more: see `leases`."""


class BackendError(LMCacheError):
    """One call to a storage backend failed as a whole."""


class BackendUnavailable(BackendError):
    """The backend can't be reached now; the same call may work later."""


class BackendProcessLost(BackendUnavailable):
    """The process that the backend has for itself ended, or isn't there again yet.

    Who runs it starts another one, later each time it ends soon; so the guard needn't let it rest.
    """


class BackendTimeout(BackendError):
    """The backend didn't answer before the deadline."""


class BackendRejected(BackendError):
    """The backend refused the call and would refuse it again."""


def contained(error: BaseException) -> Exception:
    """``error``, as one that no loop, future or generator takes for its own business.

    ``SystemExit`` ends an event loop, ``StopIteration`` can't be a future's result, and whoever
    awaits a plugin's ``CancelledError`` believes to be cancelled.
    """
    if isinstance(error, Exception) and not isinstance(error, StopIteration):
        return error
    raised = PluginRaised(f"{type(error).__name__}: {error}".removesuffix(": "))
    raised.__cause__ = error
    return raised
