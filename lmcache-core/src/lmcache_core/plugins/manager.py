"""Loads, checks and lists plugins, and finds by name what they provide.

Built-ins come through the same hooks as everybody's. A plugin that is broken
costs nobody anything until the configuration needs it; then the error says who
ships it, what is wrong and what to do. Knows nothing about how the things that
plugins provide are used.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import pluggy
from pydantic import BaseModel

from lmcache_core.chunks.chunk_index import ChunkIndex, DictIndex
from lmcache_core.contracts import hookspecs
from lmcache_core.contracts.connector import EngineConnectorDescriptor, HostKernels, Kernels
from lmcache_core.contracts.eviction import CachePolicy, CachePolicyDescriptor
from lmcache_core.contracts.report import ReportLine, Severity
from lmcache_core.contracts.serde import SerdeDescriptor
from lmcache_core.contracts.storage import HostRegion, StorageBackendDescriptor
from lmcache_core.contracts.transfer import TransferChannelDescriptor
from lmcache_core.errors import LMCacheError, PluginError, PluginLoadError, UnknownPluginError
from lmcache_core.plugins.discovery import (
    CORE,
    DISABLE_VARIABLE,
    IN_PROCESS,
    Candidate,
    candidates,
    core_version,
    disabled_by,
    in_words,
    normalised,
    registered,
    unmet_core_requirement,
)
from lmcache_core.plugins.known import advice
from lmcache_core.plugins.registry import Descriptor, Offer, Registry, conflict

if TYPE_CHECKING:
    from argparse import ArgumentParser, _SubParsersAction

    from lmcache_core.config.dialect import Dialect

logger = logging.getLogger(__name__)

TRACE_VARIABLE = "LMCACHE_TRACE_PLUGINS"
API_ATTRIBUTE = "LMCACHE_PLUGIN_API"
"""By this name a plugin states the version of the plugin API that it is written for."""

Status = Literal["ok", "disabled", "incompatible", "failed"]


@dataclass(frozen=True)
class PluginRecord:
    """One row of ``lmcache plugins --load``: what was found and what came of it."""

    name: str
    distribution: str
    """`IN_PROCESS` for one that the application brought along, which has no version."""
    version: str
    target: str
    status: Status
    detail: str = ""
    provides: tuple[str, ...] = ()
    """Such as ``storage backend redis``."""


class Plugins:
    """The plugins of one process. Build one and pass it on; there is no global.

    Args:
        disabled: names of plugins or distributions that aren't to be loaded, besides those in
            ``LMCACHE_DISABLE_PLUGINS`` (separated by commas).
        register: plugins of this process, beside the installed ones: modules, or objects whose
            methods are hooks. They are asked first. One that is installed as well is listed once,
            as installed. Other processes, isolated backends' among them, don't know them.
        environ: where the two ``LMCACHE_…_PLUGINS`` variables are read from.
    """

    def __init__(
        self,
        disabled: Iterable[str] = (),
        *,
        register: Iterable[object] = (),
        environ: Mapping[str, str] | None = None,
    ) -> None:
        environ = os.environ if environ is None else environ
        self._tracing = environ.get(TRACE_VARIABLE, "").lower() not in ("", "0", "false", "no")
        self._disabled = disabled_by(environ, disabled)
        self._manager = pluggy.PluginManager(hookspecs.PROJECT)
        self._manager.add_hookspecs(hookspecs)
        self._records: dict[str, PluginRecord] = {}
        self._backends: Registry[StorageBackendDescriptor] = Registry(
            "storage backend", "lmcache_storage_backends", StorageBackendDescriptor
        )
        self._serdes: Registry[SerdeDescriptor] = Registry(
            "serde", "lmcache_serdes", SerdeDescriptor
        )
        self._connectors: Registry[EngineConnectorDescriptor] = Registry(
            "engine connector", "lmcache_engine_connectors", EngineConnectorDescriptor
        )
        self._channels: Registry[TransferChannelDescriptor] = Registry(
            "transfer channel", "lmcache_transfer_channels", TransferChannelDescriptor
        )
        self._policies: Registry[CachePolicyDescriptor] = Registry(
            "cache policy",
            "lmcache_cache_policies",
            CachePolicyDescriptor,
            fold=True,
            yields=CORE,
        )
        self._registries: tuple[Registry[Any], ...] = (
            self._backends,
            self._serdes,
            self._connectors,
            self._channels,
            self._policies,
        )
        # pluggy asks the last one first: built-ins, registered first, are the last resort.
        for candidate in candidates():
            self._load(candidate)
        for candidate in registered(register):
            plugin = candidate.load()
            if not any(plugin is known for known in self._manager.get_plugins()):
                self._load(candidate)
        self._warn_about_unknown_disabled()

    # -- loading ---------------------------------------------------------------------------

    def _load(self, candidate: Candidate) -> None:
        self._trace("found %s %s: %s", candidate.identity, candidate.version, candidate.target)
        if candidate.is_among(self._disabled):
            self._record(candidate, "disabled", f"by {DISABLE_VARIABLE} or the caller")
            return
        if unmet := unmet_core_requirement(candidate.requires):
            self._incompatible(candidate, unmet)
            return
        try:
            found = self._register(candidate)
        except _NewerPluginError as error:
            self._incompatible(candidate, str(error))
            return
        except (Exception, SystemExit) as error:  # noqa: BLE001
            # Someone else's code: anything may come out, and a broken plugin that nobody uses
            # mustn't stop an engine. One that the configuration names still does: see `_missing`.
            self._unregister(candidate)
            detail = f"{type(error).__name__}: {error}"
            self._record(candidate, "failed", detail)
            logger.warning("plugin %s is not used: %s", candidate.identity, detail)
            self._trace("%s failed", candidate.identity, exc_info=True)
            return
        provides: list[str] = []
        for registry, descriptors in found:
            for descriptor in descriptors:
                provides.append(f"{registry.noun} {descriptor.name}")
                registry.add(
                    Offer(descriptor, candidate.identity, candidate.distribution, candidate.version)
                )
        self._record(candidate, "ok", "", tuple(provides))

    def _register(self, candidate: Candidate) -> list[tuple[Registry[Any], list[Any]]]:
        """Import, register and question one plugin; raises whatever is wrong with it."""
        plugin = candidate.load()
        self._trace("imported %s", candidate.target)
        _check_api(plugin)
        self._manager.register(plugin, candidate.identity)
        self._manager.check_pending()
        callers = self._manager.get_hookcallers(plugin) or []
        if not callers:
            raise PluginError(f"{candidate.target} implements no hook of LMCache")
        found: list[tuple[Registry[Any], list[Any]]] = []
        for caller in callers:
            implementation = next(i for i in caller.get_hookimpls() if i.plugin is plugin)
            if implementation.wrapper or implementation.hookwrapper:
                raise PluginError(f"{caller.name} is a hook wrapper, which LMCache has no use for")
            for registry in self._registries:
                if registry.hook == caller.name:
                    found.append((registry, registry.check(implementation.function())))
                    self._trace("%s answered %s", candidate.identity, caller.name)
        return found

    def _incompatible(self, candidate: Candidate, why: str) -> None:
        """``why`` is what the plugin needs, as a half sentence without a subject."""
        package = "" if candidate.distribution == IN_PROCESS else f"{candidate.distribution} "
        detail = f"{why}: pip install --upgrade {package}{CORE}"
        self._record(candidate, "incompatible", detail)
        logger.warning(
            "plugin %s %s is not used: it %s", candidate.identity, candidate.version, detail
        )

    def _unregister(self, candidate: Candidate) -> None:
        if self._manager.has_plugin(candidate.identity):
            self._manager.unregister(name=candidate.identity)

    def _record(
        self, candidate: Candidate, status: Status, detail: str, provides: tuple[str, ...] = ()
    ) -> None:
        self._trace("%s is %s %s", candidate.identity, status, detail)
        self._records[candidate.identity] = PluginRecord(
            name=candidate.name,
            distribution=candidate.distribution,
            version=candidate.version,
            target=candidate.target,
            status=status,
            detail=detail,
            provides=provides,
        )

    def _warn_about_unknown_disabled(self) -> None:
        known = {normalised(n) for r in self.records for n in (r.name, r.distribution)}
        for name in sorted(self._disabled - known):
            logger.warning("%s names %s, which isn't installed", DISABLE_VARIABLE, name)

    def _trace(self, message: str, *args: object, exc_info: bool = False) -> None:
        if self._tracing:
            # Asked for by a variable, so it has to show whatever the log level is.
            logger.warning("plugins: " + message, *args, exc_info=exc_info)

    # -- what there is ---------------------------------------------------------------------

    @property
    def records(self) -> tuple[PluginRecord, ...]:
        """Every plugin that was found, usable or not, built-ins first."""
        return tuple(self._records.values())

    def conflicts(self) -> list[str]:
        """A line for each name or URL scheme that more than one plugin provides."""
        lines = [
            conflict(f"the {registry.noun} {name!r}", offers)
            for registry in self._registries
            for name, offers in registry.conflicts()
        ]
        schemes = {s for offer in self._backends for s in offer.descriptor.url_schemes}
        for scheme in sorted(schemes):
            offers = self._opening(scheme)
            if len(offers) > 1:
                lines.append(conflict(f"{scheme}:// addresses", offers))
        return lines

    def storage_backends(self) -> list[StorageBackendDescriptor]:
        """Every storage backend, in the order of discovery."""
        return [offer.descriptor for offer in self._backends]

    def serdes(self) -> list[SerdeDescriptor]:
        """Every serde, in the order of discovery."""
        return [offer.descriptor for offer in self._serdes]

    def environment(self) -> set[str]:
        """``LMCACHE_…`` variables that backends and serdes read themselves."""
        backends = {n for descriptor in self.storage_backends() for n in descriptor.environment}
        return backends | {n for descriptor in self.serdes() for n in descriptor.environment}

    def check_isolation(self, descriptor: Descriptor) -> None:
        """Check that another process could find what ``descriptor`` describes.

        Raises:
            PluginError: it was registered in this one.
        """
        for registry in self._registries:
            for offer in registry:
                if offer.descriptor is descriptor and offer.distribution == IN_PROCESS:
                    raise PluginError(
                        f"the {registry.noun} {descriptor.name!r} was {IN_PROCESS}, and a process "
                        "of its own wouldn't find it: set isolated to false, or install its plugin"
                    )

    # -- finding by name: each raises PluginLoadError, UnknownPluginError, or PluginError when two
    # -- plugins claim the name

    def storage_backend(self, name: str) -> StorageBackendDescriptor:
        """The backend called ``name``."""
        found = self._backends.find(name)
        return self._missing(self._backends, name, "lmcache-backend-") if found is None else found

    def serde(self, name: str) -> SerdeDescriptor:
        """The serde called ``name``, by its proper name or an alias."""
        found = self._serdes.find(name)
        return self._missing(self._serdes, name, "lmcache-serde-") if found is None else found

    def cache_policy(self, name: str) -> CachePolicyDescriptor:
        """The eviction policy called ``name``, in whatever case."""
        found = self._policies.find(name)
        return self._missing(self._policies, name, None) if found is None else found

    def make_cache_policy(self, name: str, options: BaseModel | None = None) -> CachePolicy:
        """A new policy called ``name``, with ``options`` that its model has checked, or without.

        Raises:
            ConfigError, PluginLoadError: it can't be made.
        """
        from lmcache_core.plugins.creation import created

        descriptor = self.cache_policy(name)
        return created(
            lambda: descriptor.create(descriptor.config() if options is None else options),
            CachePolicy,  # type: ignore[type-abstract]
            f"cache policy {descriptor.name!r}",
            descriptor.create,
        )

    def transfer_channel(self, name: str) -> TransferChannelDescriptor:
        """The transfer channel called ``name``."""
        found = self._channels.find(name)
        return self._missing(self._channels, name, "lmcache-backend-") if found is None else found

    def engine_connector(self, name: str) -> EngineConnectorDescriptor:
        """The engine integration called ``name``."""
        prefix = "lmcache-connector-"
        found = self._connectors.find(name)
        return self._missing(self._connectors, name, prefix) if found is None else found

    def backend_for_url(self, url: str) -> StorageBackendDescriptor | None:
        """The backend that opens ``url``, or ``None``.

        Raises:
            PluginError: two plugins open such addresses.
        """
        scheme, separator, _ = url.partition("://")
        offers = self._opening(scheme.lower()) if separator else []
        if len(offers) > 1:
            raise PluginError(conflict(f"{scheme}:// addresses", offers))
        return offers[0].descriptor if offers else None

    def options_from_url(self, descriptor: StorageBackendDescriptor, url: str) -> dict[str, Any]:
        """What ``url`` says about the options of the backend that opens it.

        Raises:
            PluginError: the backend can't make sense of it; the message says why.
        """
        if descriptor.config_from_url is None:
            raise PluginError(f"the backend {descriptor.name!r} takes no address")
        try:
            return dict(descriptor.config_from_url(url))
        except Exception as error:  # someone else's code, as in `_load`
            raise PluginError(f"the backend {descriptor.name!r} says: {error}") from error

    def owner_of_extra_key(self, key: str, among: Iterable[str] = ()) -> tuple[str, str] | None:
        """The backend that reads LMCache's ``extra_config.KEY``, and its own name for the option.

        Several may use one key; a backend in ``among`` goes first, in that order.
        """
        owners = {
            offer.descriptor.name: offer.descriptor.extra_config_keys[key]
            for offer in self._backends
            if key in offer.descriptor.extra_config_keys
        }
        for name in (*among, *owners):
            if name in owners:
                return name, owners[name]
        return None

    def _opening(self, scheme: str) -> list[Offer[StorageBackendDescriptor]]:
        return [offer for offer in self._backends if scheme in offer.descriptor.url_schemes]

    def _missing(self, registry: Registry[Any], name: str, package: str | None) -> Any:
        """Never returns: explains why there is nothing called ``name``."""
        for record in self.records:
            shipped = normalised(record.distribution)
            guesses = {record.name, shipped.removeprefix(package or "")}
            guesses.add(record.name.rpartition(".")[2])  # a registered module's
            if record.status != "ok" and name in guesses:
                origin = f"{record.distribution} {record.version}"
                if record.distribution == IN_PROCESS:
                    origin = f"a plugin {IN_PROCESS}"
                raise PluginLoadError(
                    f"the {registry.noun} {name!r} comes from {origin}, which is {record.status}: "
                    f"{record.detail}{_remedy(record)}"
                )
        message = f"no installed plugin provides the {registry.noun} {name!r}"
        message += f"; installed: {', '.join(registry.names()) or 'none'}"
        if unusable := self.unusable():
            message += f"; not usable: {unusable}"
        message += advice(registry.noun, name, registry.names())
        raise UnknownPluginError(message)

    def unusable(self) -> str:
        """The plugins that could have provided more, in a few words; may be empty."""
        return ", ".join(
            f"{in_words(record.name, record.distribution)} ({record.status}: {record.detail})"
            for record in self.records
            if record.status != "ok"
        )

    # -- hooks that are called with arguments ----------------------------------------------

    def dialects(self) -> list[Dialect]:
        """What understands how other software writes our options."""
        return [one for _, answer in self._answers("lmcache_dialects") for one in answer]

    def kernels(self, device: str) -> Kernels:
        """What moves blocks on ``device``, such as ``cpu`` or ``cuda``.

        Raises:
            UnknownPluginError: nothing does.
        """
        for _, answer in self._answers("lmcache_kernels", device=device):
            kernels: Kernels = answer
            return kernels
        raise UnknownPluginError(f"no installed plugin moves blocks on {device!r}")

    def host_kernels(self) -> HostKernels | None:
        """What moves bytes and makes checksums in host memory, if a plugin does. No torch."""
        for _, answer in self._answers("lmcache_kernels", besides=CORE, device="cpu"):
            if isinstance(answer, HostKernels):
                return answer
        return None

    def chunk_index(self, slots: int) -> ChunkIndex:
        """An empty index with ``slots`` slots."""
        for _, answer in self._answers("lmcache_chunk_index", slots=slots):
            index: ChunkIndex = answer
            return index
        return DictIndex(slots)

    def host_region(
        self,
        nbytes: int,
        device: str,
        *,
        hugepages: bool = False,
        numa_mode: str | None = None,
        populate: bool = False,
        shared: bool = False,
    ) -> HostRegion:
        """Host memory for chunks: ``nbytes`` bytes that ``device`` can reach.

        The options are those of the hook, `hookspecs.lmcache_host_region`. A plugin that fails is
        passed over.

        Raises:
            UnknownPluginError: no plugin allocates it.
            LMCacheError: what core's own implementation, the last to be asked, says.
        """
        answers = self._answers(
            "lmcache_host_region",
            nbytes=nbytes,
            device=device,
            hugepages=hugepages,
            numa_mode=numa_mode,
            populate=populate,
            shared=shared,
        )
        for plugin, answer in answers:
            if isinstance(answer, HostRegion):
                return answer
            logger.warning("plugin %s: lmcache_host_region returned %.80r", plugin, answer)
        raise UnknownPluginError(
            f"no installed plugin allocated {nbytes} bytes of host memory for {device!r}"
        )

    def report(self) -> list[ReportLine]:
        """What each plugin has to say in ``lmcache doctor``."""
        found: list[ReportLine] = []
        for plugin, lines in self._answers("lmcache_report"):
            for line in lines if isinstance(lines, (list, tuple)) else [lines]:
                said = line if isinstance(line, ReportLine) else ReportLine("ok", str(line))
                severity = said.severity if said.severity in get_args(Severity) else "warn"
                found.append(ReportLine(severity, f"{plugin.partition(':')[2]}: {said.text}"))
        return found

    def add_subcommands(self, subcommands: _SubParsersAction[ArgumentParser]) -> None:
        """Let every plugin extend the ``lmcache`` command."""
        for _ in self._answers("lmcache_cli", subcommands=subcommands):
            pass

    def _answers(
        self, hook: str, *, besides: str | None = None, **arguments: Any
    ) -> Iterator[tuple[str, Any]]:
        """Each plugin's answer that isn't ``None``; one that raises is named and passed over.

        ``besides``: a distribution whose plugins aren't asked.
        """
        caller: pluggy.HookCaller = getattr(self._manager.hook, hook)
        for implementation in reversed(caller.get_hookimpls()):
            if self._records[implementation.plugin_name].distribution == besides:
                continue
            given = [arguments[name] for name in implementation.argnames]
            try:
                answer = implementation.function(*given)
            except Exception as error:
                record = self._records[implementation.plugin_name]
                if record.distribution == CORE and isinstance(error, LMCacheError):
                    raise  # ours, and meant for the user
                # Someone else's code, as in `_load`.
                detail = f"{hook} raised {type(error).__name__}: {error}"
                self._trace("%s failed", implementation.plugin_name, exc_info=True)
                logger.warning("plugin %s: %s", implementation.plugin_name, detail)
                self._records[implementation.plugin_name] = replace(record, detail=detail)
                continue
            if answer is not None:
                yield implementation.plugin_name, answer


def _remedy(record: PluginRecord) -> str:
    """To follow what is wrong; nothing where that says it."""
    if record.status == "disabled":
        return f". Remedy: take it out of {DISABLE_VARIABLE}"
    if record.status == "incompatible":
        return ""
    if record.distribution == IN_PROCESS:
        return f". Remedy: mend it; {TRACE_VARIABLE}=1 shows the traceback"
    return (
        f". Remedy: pip install --upgrade --force-reinstall {record.distribution}; "
        f"{TRACE_VARIABLE}=1 lmcache plugins --load shows the traceback"
    )


class _NewerPluginError(Exception):
    """A plugin is written for a later plugin API than this one."""


def _check_api(plugin: object) -> None:
    """Check what ``plugin`` says about the plugin API; nothing means version 1.

    Raises:
        TypeError: it says something that is no version.
    """
    stated = getattr(plugin, API_ATTRIBUTE, 1)
    if type(stated) is not int or stated < 1:
        raise TypeError(f"{API_ATTRIBUTE} is {stated!r:.80}, not a whole number from 1 on")
    if stated > hookspecs.PLUGIN_API:
        raise _NewerPluginError(
            f"is written for plugin API {stated}, but {CORE} {core_version()} has plugin API "
            f"{hookspecs.PLUGIN_API}"
        )
