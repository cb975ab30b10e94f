"""Makes options of ours of LMCache's flat keys; `table` says what becomes of each.

Origins move with the values.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from lmcache_core.config.dialect import Dialect
from lmcache_core.config.layers import KeyPath, Layer, Merged
from lmcache_core.config.problem import describe
from lmcache_core.dialect.table import (
    ALIASES,
    ENGINE_KEYS,
    ENGINE_PREFIXES,
    EXTRA_KEYS,
    EXTRA_PREFIXES,
    FOREIGN_ENVIRONMENT,
    KEYS,
    SWITCHES,
    URL_PACKAGES,
    Fate,
    Key,
)
from lmcache_core.errors import PluginError
from lmcache_core.plugins.manager import Plugins

DISK = "local_disk"
REMOTE = "remote"
HOST = "host"
_TIERS = {"LocalCPUBackend": HOST, "LocalDiskBackend": DISK, "RemoteBackend": REMOTE}
"""What LMCache calls them where tiers are chosen."""
_FILE = re.compile(r"file:/+(localhost/)?", re.IGNORECASE)


class FlatKeys(Dialect):
    """LMCache's keys, variables, and keys in an engine's extra configuration."""

    names = (*KEYS, *ALIASES)
    switches = SWITCHES
    foreign_variables = FOREIGN_ENVIRONMENT
    engine_keys = ENGINE_KEYS

    def option_of_engine_key(self, key: str, value: object) -> tuple[str, object] | None:
        if key == "discard_partial_chunks":
            return "save_unfull_chunk", not is_set(value)
        return None

    def why_without_effect(self, key: str) -> str:
        return KEYS["mp_host"].why if key.startswith(ENGINE_PREFIXES) else ""

    def rename(
        self, layer: Layer, plugins: Plugins, problems: list[str], notices: list[str]
    ) -> Layer:
        """The old names replaced.

        One that is also a present name is left to `upgrade` if an installed backend reads it.
        """
        old_names = [
            name
            for name in layer.values
            if name in ALIASES and not (name in KEYS and plugins.owner_of_extra_key(name))
        ]
        if not old_names:
            return layer
        values, origins = dict(layer.values), dict(layer.origins)
        for old in old_names:
            new, origin = ALIASES[old], layer.origin((old,))
            if new in values:
                problems.append(
                    f"{old} ({origin})\n      is the old name of {new}, which is also set"
                )
                del values[old]
                continue
            values[new] = values.pop(old)
            origins[(new,)] = origin
            notices.append(f"{old} ({origin}) is now called {new}")
        return Layer(layer.name, values, origins)

    def upgrade(
        self, merged: Merged, plugins: Plugins, problems: list[str], notices: list[str]
    ) -> None:
        _Upgrade(merged, plugins, problems, notices).run()


class _Upgrade:
    """One run of `upgrade`: what all its steps share."""

    def __init__(
        self, merged: Merged, plugins: Plugins, problems: list[str], notices: list[str]
    ) -> None:
        self.merged = merged
        self.values = merged.values
        self.plugins = plugins
        self.problems = problems
        self.notices = notices
        self.silent: dict[str, list[str]] = {}
        """Why something has no effect → the keys for which that is so."""

    def run(self) -> None:
        if is_set(self.values.get("enable_pd")):
            # It says what there is to say; sizes that only it can have are no mistake of their own.
            self.values.pop("max_local_cpu_size", None)
        extra = self._take("extra_config")
        self._disk()
        self._remote()
        self._plugins(extra)
        self._locations()
        for name in [name for name in self.values if name in KEYS]:
            if KEYS[name].fate is not Fate.OPTION and not self._is_a_backends(name):
                self._settle(KEYS[name], (name,), self._take(name))
        self._order_tiers()
        self._extra(extra)
        for name in [name for name in self.values if self._is_a_backends(name)]:
            self._backends_own(name, self._take(name))
        for why, keys in self.silent.items():
            self.notices.append(f"{', '.join(keys)}: no effect: {why}")

    def _take(self, name: str) -> Any:
        value = self.values.pop(name, None)
        return None if isinstance(value, str) and not value.strip() else value

    def _origin(self, *path: str) -> str:
        return self.merged.origin(path)

    def _problem(self, path: KeyPath, value: Any, text: str) -> None:
        self.problems.append(describe(path, value, self._origin(*path), text))

    def _no_effect(self, why: str, *path: str) -> None:
        self.silent.setdefault(why, []).append(f"{'.'.join(path)} ({self._origin(*path)})")

    def _settle(self, key: Key, path: KeyPath, value: Any) -> None:
        """Do what the table says about a key that doesn't become an option."""
        if key.fate is Fate.NO_EFFECT:
            self._no_effect(key.why, *path)
        elif key.fate is Fate.REFUSED and is_set(value):
            text = f"isn't available in this version: {key.why}. Remove it to start without"
            self._problem(path, value, text)

    # -- local_disk, remote_url ------------------------------------------------------------

    def _section(self, name: str, origin_key: str, options: Mapping[str, Any]) -> bool:
        sections = self._sections()
        if sections is None or sections.get(name) is not None:
            self._problem((origin_key,), None, f"backends.{name} is set too; keep one of the two")
            return False
        origin = f"{origin_key}, {self._origin(origin_key)}"
        for option, value in options.items():
            self.merged.put(("backends", name, option), value, origin)
        return True

    def _sections(self) -> dict[str, Any] | None:
        """``backends`` as a mapping; ``None`` when it is something else, which `schema` reports."""
        sections = self.values.get("backends")
        if sections is None:
            return {}
        return sections if isinstance(sections, dict) else None

    def _disk(self) -> None:
        folder, size = self._take(DISK), self._take("max_local_disk_size")
        if folder is None or not is_set(folder):
            if size is not None and is_set(size):
                self._no_effect("there is no local_disk", "max_local_disk_size")
            return
        path = self._folder(folder)
        gib = None if size is None else self._size(size)
        if path is None or (size is not None and gib is None):
            return
        if gib == 0:
            self._no_effect(
                f"max_local_disk_size ({self._origin('max_local_disk_size')}) is 0, which turns "
                "the disk off; leave it out for a disk without a bound",
                DISK,
            )
            return
        if self._section(DISK, DISK, {"type": "filesystem", "path": path}) and gib is not None:
            origin = f"max_local_disk_size, {self._origin('max_local_disk_size')}"
            self.merged.put(("backends", DISK, "max_size_gib"), gib, origin)

    def _folder(self, value: Any) -> str | None:
        folders = value if isinstance(value, list) else str(value).split(",")
        folders = [f.strip() for f in map(str, folders) if f.strip()]
        if isinstance(value, (bool, int, float, dict)) or not folders:
            self._problem((DISK,), value, "is a folder, such as /var/cache/lmcache")
            return None
        if len(folders) > 1:
            text = (
                "takes one folder; for more, list sections with `type: filesystem` and a `path` "
                "under `backends:`"
            )
            self._problem((DISK,), ", ".join(folders), text)
            return None
        return _FILE.sub("/", folders[0])

    def _size(self, value: Any) -> float | None:
        try:
            gib = float("nan") if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            gib = math.nan
        if math.isfinite(gib) and gib >= 0:
            return gib
        self._problem(("max_local_disk_size",), value, "is a size in GiB, 0 or more")
        return None

    def _remote(self) -> None:
        url, serde = self._take("remote_url"), self._take("remote_serde")
        if url is None:
            if serde is not None:
                self._no_effect("there is no remote_url", "remote_serde")
            return
        if not isinstance(url, str) or "://" not in url:
            self._problem(("remote_url",), url, "is an address, such as redis://host:6379")
            return
        try:
            descriptor = self.plugins.backend_for_url(url)
            if descriptor is None:
                self._problem(("remote_url",), url, self._unopened(url))
                return
            options = self.plugins.options_from_url(descriptor, url)
        except PluginError as error:
            self._problem(("remote_url",), url, str(error))
            return
        made = self._section(REMOTE, "remote_url", {"type": descriptor.name, **options})
        if made and serde is not None:
            origin = f"remote_serde, {self._origin('remote_serde')}"
            self.merged.put(("backends", REMOTE, "serde"), serde, origin)

    def _plugins(self, extra: Any) -> None:
        """``remote_storage_plugins`` and ``storage_plugins``: each name is a section of ours."""
        for key in ("remote_storage_plugins", "storage_plugins"):
            names = self._take(key)
            if names is None or not is_set(names):
                continue
            listed = names if isinstance(names, list) else str(names).split(",")
            found = [name for one in listed if (name := str(one).strip())]
            given = extra if isinstance(extra, dict) else {}
            # What `a.b` is given isn't an option `b.…` of `a`.
            options = {
                name: self._options_of(key, name, given)
                for name in sorted(found, key=len, reverse=True)
            }
            for name in found:
                self._plugin(key, name, options[name])

    @staticmethod
    def _options_of(key: str, name: str, extra: dict[str, Any]) -> dict[str, Any]:
        """What ``extra`` has for one of them; it goes from there."""
        prefix = f"{key.removesuffix('s')}.{name}."
        given = [one for one in extra if str(one).startswith(prefix)]
        return {one.removeprefix(prefix): extra.pop(one) for one in given}

    def _plugin(self, key: str, name: str, options: dict[str, Any]) -> None:
        """The section for one of them."""
        if {"module_path", "class_name"} & options.keys():
            text = "isn't available in this version: a backend is a package that pip installs"
            self._problem((key,), name, f"{text}, not a module's path. Remove it to start without")
            return
        kind = name.partition(".")[0]
        try:
            descriptor = self.plugins.backend_for_url(f"{kind}://")
            descriptor = descriptor or self.plugins.storage_backend(kind)
            section: dict[str, Any] = {"type": descriptor.name}
            for option, value in options.items():
                if option == "url" or option.endswith("_url"):
                    section |= self.plugins.options_from_url(descriptor, str(value))
                else:
                    section[descriptor.extra_config_keys.get(option, option)] = value
        except PluginError as error:
            self._problem((key,), name, str(error))
            return
        self._section(name.replace(".", "-"), key, section)

    def _unopened(self, url: str) -> str:
        scheme = url.partition("://")[0].lower()
        schemes = sorted({s for b in self.plugins.storage_backends() for s in b.url_schemes})
        text = f"no installed plugin opens {scheme}:// addresses"
        text += f"; installed ones open: {', '.join(schemes) or 'none'}"
        if unusable := self.plugins.unusable():
            text += f"; not usable: {unusable}"
        if package := URL_PACKAGES.get(scheme):
            text += f". Try: pip install {package}"
        return text

    def _locations(self) -> None:
        """Choices of tiers that leave none out ask for what happens anyway."""
        sections = self._sections()
        if sections is None:
            return
        tiers = {HOST, *sections}
        for key in ("store_location", "retrieve_locations"):
            value = self.values.get(key)
            names = value if isinstance(value, list) else str(value).split(",")
            if {_TIERS.get(str(name).strip(), str(name).strip()) for name in names} >= tiers:
                del self.values[key]

    def _order_tiers(self) -> None:
        """Nearest first: the disk, then the remote store, then ``backends`` as it is written."""
        if sections := self._sections():
            first = {name: sections[name] for name in (DISK, REMOTE) if name in sections}
            self.values["backends"] = {**first, **sections}

    # -- keys of backends ------------------------------------------------------------------

    def _is_a_backends(self, name: str) -> bool:
        """Whether a top-level key has no effect but on a backend that is installed."""
        return (
            name in KEYS
            and KEYS[name].fate is Fate.NO_EFFECT
            and self.plugins.owner_of_extra_key(name) is not None
        )

    def _backends_own(self, name: str, value: Any) -> None:
        """Bring such a key to its backend; without one, do what the table says."""
        if value is None or self._to_its_backend(name, value, (name,)):
            return
        present = ALIASES.get(name, name)
        if present != name:
            self.notices.append(f"{name} ({self._origin(name)}) is now called {present}")
        self._settle(KEYS[present], (name,), value)

    def _to_its_backend(self, name: str, value: Any, path: KeyPath) -> bool:
        """Make a key an option of the configured backend that reads it; False if none does."""
        sections = self._types()
        owner = self.plugins.owner_of_extra_key(name, sections.values())
        section = next((s for s, kind in sections.items() if owner and kind == owner[0]), None)
        if owner is None or section is None:
            return False
        if owner[1] != "type":
            self._set_option(section, owner[1], value, path)
        return True

    def _types(self) -> dict[str, str]:
        """Section → type of backend."""
        return {
            section: options.get("type", section) if isinstance(options, dict) else section
            for section, options in (self._sections() or {}).items()
        }

    # -- extra_config ----------------------------------------------------------------------

    def _extra(self, extra: Any) -> None:
        if extra is None:
            return
        if not isinstance(extra, dict):
            self._problem(("extra_config",), extra, "must be a mapping of options")
            return
        unknown: list[str] = []
        # What turns a backend on goes first, wherever it stands: the others are about that backend.
        for name, value in sorted(extra.items(), key=lambda item: not self._switches_on(item[0])):
            if not self._route(name, value):
                unknown.append(f"extra_config.{name} ({self._origin('extra_config', name)})")
        if unknown:
            self.notices.append(f"{', '.join(unknown)}: no installed plugin reads this; ignored")

    def _route(self, name: str, value: Any) -> bool:
        """Bring one ``extra_config`` key to where it belongs; False if nobody knows it."""
        path = ("extra_config", name)
        sections = self._types()
        if name == "use_odirect" and DISK in sections:
            self._set_option(DISK, "direct_io", value, path)
            return True
        if self._to_its_backend(name, value, path):
            return True
        if owner := self.plugins.owner_of_extra_key(name):
            backend, option = owner
            if option != "type":
                self._no_effect(f"the backend {backend!r} isn't configured", *path)
            elif is_set(value):
                self._set_option(backend, "type", backend, path)
            return True
        key = EXTRA_KEYS.get(name)
        key = key or next(
            (k for start, k in EXTRA_PREFIXES.items() if name.startswith(start)), None
        )
        if key is None:
            return False
        if key.fate is Fate.SECTION:
            self._no_effect("there is no local_disk", *path)
        self._settle(key, path, value)
        return True

    def _switches_on(self, name: str) -> bool:
        owner = self.plugins.owner_of_extra_key(name)
        return owner is not None and owner[1] == "type"

    def _set_option(self, section: str, option: str, value: Any, path: KeyPath) -> None:
        origin = f"{'.'.join(path)}, {self._origin(*path)}"
        self.merged.put(("backends", section, option), value, origin)


def is_set(value: Any) -> bool:
    """Whether ``value`` asks for anything. Text counts as what it says: ``"false"`` doesn't."""
    if isinstance(value, str):
        return value.strip().lower() not in ("", "0", "false", "no", "off", "none", "null")
    return bool(value)
