"""Finding plugins, and what broken ones may and may not do to others."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict

from lmcache_core.config import load_config
from lmcache_core.contracts.hookspecs import PLUGIN_API, hookimpl
from lmcache_core.contracts.report import ReportLine
from lmcache_core.contracts.storage import HostRegion, StorageBackendDescriptor
from lmcache_core.contracts.transfer import TransferChannelDescriptor, TransferContext
from lmcache_core.errors import ConfigError, PluginError, PluginLoadError, UnknownPluginError
from lmcache_core.plugins.discovery import BUILTIN_PLUGINS, IN_PROCESS, core_version
from lmcache_core.plugins.known import PACKAGES
from lmcache_core.plugins.manager import PluginRecord, Plugins
from lmcache_core.tiers.peers import open_channel

MakeDistribution = Callable[..., str]

GOOD = """
@hookimpl
def lmcache_storage_backends():
    return [backend({name!r}, url_schemes=({name!r},), config_from_url=from_url,
                    extra_config_keys={{"toy_port": "port"}})]
"""


def good(name: str) -> str:
    return GOOD.format(name=name)


def load(*disabled: str, **environ: str) -> Plugins:
    return Plugins(disabled, environ=environ)


def record_of(plugins: Plugins, distribution: str) -> PluginRecord:
    (found,) = [r for r in plugins.records if r.distribution == distribution]
    return found


# -- what works ----------------------------------------------------------------------------


def test_builtins_come_through_the_same_records() -> None:
    plugins = load()
    builtins = [r.target for r in plugins.records if r.distribution == "lmcache-core"]
    assert builtins == list(BUILTIN_PLUGINS)
    assert plugins.storage_backend("memory").name == "memory"
    assert plugins.serde("naive") is plugins.serde("raw")
    assert plugins.transfer_channel("tcp").name == "tcp"
    assert plugins.cache_policy("lru") is plugins.cache_policy("LRU")


def test_an_installed_plugin_is_found_by_name_url_and_extra_key(
    distribution: MakeDistribution,
) -> None:
    module = distribution("lmcache-backend-toy", good("toy"), version="2.3")
    plugins = load()
    expected = PluginRecord(
        "toy", "lmcache-backend-toy", "2.3", module, "ok", "", ("storage backend toy",)
    )
    assert record_of(plugins, "lmcache-backend-toy") == expected
    toy = plugins.storage_backend("toy")
    assert toy in plugins.storage_backends()
    assert plugins.backend_for_url("toy://h:1") is toy
    assert plugins.backend_for_url("TOY://h:1") is toy
    assert plugins.backend_for_url("toy") is None
    assert plugins.backend_for_url("other://h") is None
    assert plugins.options_from_url(toy, "toy://h:7") == {"host": "h", "port": "7"}
    assert plugins.owner_of_extra_key("toy_port") == ("toy", "port")
    assert plugins.owner_of_extra_key("nothing") is None


def test_an_extra_key_of_two_backends_goes_to_the_one_in_use(
    distribution: MakeDistribution,
) -> None:
    distribution("lmcache-backend-one", good("one"))
    distribution("lmcache-backend-two", good("two"))
    plugins = load()
    assert plugins.owner_of_extra_key("toy_port", among=["memory", "two"]) == ("two", "port")


def test_two_instances_share_nothing(distribution: MakeDistribution) -> None:
    distribution("lmcache-backend-toy", good("toy"))
    assert load().storage_backend("toy").name == "toy"
    with pytest.raises(PluginLoadError):
        load("toy").storage_backend("toy")


# -- broken and unused: a warning, and everybody else works --------------------------------

BROKEN = {
    "import error": ("import a_module_that_nobody_has", "ModuleNotFoundError"),
    "syntax error": ("def :", "SyntaxError"),
    "exit at import": ("raise SystemExit('bye')", "SystemExit: bye"),
    "unknown hook": ("@hookimpl\ndef lmcache_no_such_hook(): ...", "lmcache_no_such_hook"),
    "unknown argument": (
        "@hookimpl\ndef lmcache_storage_backends(colour): ...",
        "colour",
    ),
    "no hook": ("", "implements no hook"),
    "hook raises": (
        "@hookimpl\ndef lmcache_storage_backends(): raise OSError('disk on fire')",
        "OSError: disk on fire",
    ),
    "hook returns nothing": (
        "@hookimpl\ndef lmcache_storage_backends(): return None",
        "lmcache_storage_backends returned None",
    ),
    "hook returns rubbish": (
        "@hookimpl\ndef lmcache_serdes(): return ['toy']",
        "lmcache_serdes returned 'toy', not a SerdeDescriptor",
    ),
    "hook is a generator": (
        "@hookimpl\ndef lmcache_storage_backends(): yield backend('toy')",
        "not a list of descriptors",
    ),
    "hook is a wrapper": (
        "@hookimpl(wrapper=True)\ndef lmcache_storage_backends(): return (yield)",
        "hook wrapper",
    ),
    "config isn't a model": (
        "@hookimpl\ndef lmcache_storage_backends(): return [backend('toy', config=dict)]",
        "not a pydantic model",
    ),
    "config takes anything": (
        "class Lax(BaseModel): ...\n"
        "@hookimpl\ndef lmcache_storage_backends(): return [backend('toy', config=Lax)]",
        "forbid unknown options",
    ),
    "reserved option": (
        "class Odd(Options):\n    serde: str = ''\n"
        "@hookimpl\ndef lmcache_storage_backends(): return [backend('toy', config=Odd)]",
        "serde belongs to every backend section",
    ),
    "not a name": (
        "@hookimpl\ndef lmcache_storage_backends(): return [backend('a b')]",
        "'a b' isn't a name",
    ),
    "one name twice": (
        "@hookimpl\ndef lmcache_storage_backends(): return [backend('toy'), backend('toy')]",
        "two descriptors for 'toy'",
    ),
    "policy without a name": (
        "@hookimpl\ndef lmcache_cache_policies(): return [object()]",
        "lmcache_cache_policies returned",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_plugin_fails_alone(
    kind: str, distribution: MakeDistribution, caplog: pytest.LogCaptureFixture
) -> None:
    code, cause = BROKEN[kind]
    # Sorted before the good one: what it leaves behind must not hurt those that come later.
    distribution("lmcache-backend-broken", code, plugin="a-broken")
    distribution("lmcache-backend-fine", good("fine"))
    plugins = load()
    broken = record_of(plugins, "lmcache-backend-broken")
    assert broken.status == "failed"
    assert cause in broken.detail
    assert broken.provides == ()
    assert record_of(plugins, "lmcache-backend-fine").status == "ok"
    assert plugins.storage_backend("fine").name == "fine"
    assert plugins.storage_backend("memory").name == "memory"
    (warning,) = [r for r in caplog.records if "lmcache-backend-broken" in r.getMessage()]
    assert warning.levelno == logging.WARNING


def test_nothing_of_a_plugin_that_failed_half_way_is_used(distribution: MakeDistribution) -> None:
    code = good("half") + "\n@hookimpl\ndef lmcache_serdes(): raise OSError('no')"
    distribution("lmcache-backend-half", code)
    with pytest.raises(PluginLoadError, match="OSError: no"):
        load().storage_backend("half")


def test_a_malformed_entry_point_file_of_a_stranger_changes_nothing(
    distribution: MakeDistribution,
) -> None:
    distribution("stranger", "", entry_points="[console_scripts]\nno equals sign\n")
    distribution("lmcache-backend-fine", good("fine"))
    assert load().storage_backend("fine").name == "fine"


def test_a_malformed_entry_point_file_of_a_plugin_is_recorded(
    distribution: MakeDistribution,
) -> None:
    distribution("lmcache-backend-bad", "", entry_points="[lmcache.plugins]\nno equals sign\n")
    bad = record_of(load(), "lmcache-backend-bad")
    assert bad.status == "failed"
    assert "can't be parsed" in bad.detail


# -- broken and named ----------------------------------------------------------------------


def test_a_failed_plugin_that_is_named_says_who_what_and_how_to_mend_it(
    distribution: MakeDistribution,
) -> None:
    distribution("lmcache-backend-toy", "import a_module_that_nobody_has", version="2.3")
    with pytest.raises(PluginLoadError) as caught:
        load().storage_backend("toy")
    message = str(caught.value)
    for part in ("lmcache-backend-toy 2.3", "a_module_that_nobody_has", "pip install"):
        assert part in message


def test_a_failed_plugin_is_recognised_by_its_distribution_too(
    distribution: MakeDistribution,
) -> None:
    distribution("lmcache_backend_toy", "import a_module_that_nobody_has", plugin="playthings")
    with pytest.raises(PluginLoadError):
        load().storage_backend("toy")


def test_a_disabled_plugin_that_is_named_says_so(distribution: MakeDistribution) -> None:
    distribution("lmcache-backend-toy", good("toy"))
    plugins = load(LMCACHE_DISABLE_PLUGINS="other, toy")
    assert record_of(plugins, "lmcache-backend-toy").status == "disabled"
    with pytest.raises(PluginLoadError, match="take it out of LMCACHE_DISABLE_PLUGINS"):
        plugins.storage_backend("toy")


def test_disabling_does_not_import(distribution: MakeDistribution) -> None:
    distribution("lmcache-backend-toy", "raise SystemExit('imported')", plain=True)
    by_distribution = load(LMCACHE_DISABLE_PLUGINS="LMCache_Backend_Toy")
    assert record_of(by_distribution, "lmcache-backend-toy").status == "disabled"


def test_disabling_what_is_not_there_is_noticed(caplog: pytest.LogCaptureFixture) -> None:
    load(LMCACHE_DISABLE_PLUGINS="no-such-thing")
    assert "no-such-thing" in caplog.text


@pytest.mark.parametrize(
    ("requirement", "status"),
    [
        ("lmcache-core>=99", "incompatible"),
        ("LMCache_Core<0.0.1", "incompatible"),
        ("lmcache-core>=99; extra == 'future'", "ok"),
        ("lmcache-core>=99; python_version >= '3'", "incompatible"),
        ("lmcache-core>=0.0.1", "ok"),
        ("something-else>=99", "ok"),
        ("lmcache-core ~~ nonsense", "incompatible"),
    ],
)
def test_a_distribution_own_requirement_on_core_is_checked(
    requirement: str, status: str, distribution: MakeDistribution
) -> None:
    distribution("lmcache-backend-toy", good("toy"), requires=(requirement,))
    assert record_of(load(), "lmcache-backend-toy").status == status


def test_an_incompatible_plugin_is_not_imported_and_says_what_it_needs(
    distribution: MakeDistribution,
) -> None:
    distribution(
        "lmcache-backend-toy", "raise SystemExit", requires=("lmcache-core>=99",), plain=True
    )
    with pytest.raises(PluginLoadError) as caught:
        load().storage_backend("toy")
    assert "needs lmcache-core>=99" in str(caught.value)
    assert f"lmcache-core {core_version()} is installed" in str(caught.value)
    assert "pip install --upgrade lmcache-backend-toy lmcache-core" in str(caught.value)


def test_an_unknown_name_lists_what_there_is_and_how_to_get_it() -> None:
    plugins = load()
    with pytest.raises(UnknownPluginError) as caught:
        plugins.storage_backend("valkyrie")
    assert "installed: " in str(caught.value)
    assert "memory" in str(caught.value)
    assert "pip install" not in str(caught.value), "it may be a typing error, and anybody's package"
    with pytest.raises(UnknownPluginError, match=r"'zip'; installed: .*\braw\b"):
        plugins.serde("zip")
    with pytest.raises(UnknownPluginError, match="installed: FIFO, LFU, LRU, MRU"):
        plugins.cache_policy("random")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("rediss", r"did you mean 'redis'\? \(pip install lmcache-backend-redis\)"),
        ("memroy", r"did you mean 'memory'\?$"),
        ("redis", r"Try: pip install lmcache-backend-redis$"),
        ("none-such", r"Install the package that provides it$"),
    ],
)
def test_a_name_that_nothing_provides_is_compared_with_those_that_are_known(
    name: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LMCACHE_DISABLE_PLUGINS", "redis")
    plugins = Plugins()
    if name == "redis":
        monkeypatch.setattr(type(plugins), "records", ())  # nothing of it is there at all
    with pytest.raises(UnknownPluginError, match=said):
        plugins.storage_backend(name)


def test_known_packages_are_those_of_this_repository() -> None:
    published = {
        re.findall(r'^name = "(.+)"$', path.read_text(), re.MULTILINE)[0]
        for path in Path(__file__).parents[2].glob("*/pyproject.toml")
    }
    named = {package for names in PACKAGES.values() for package in names.values()}
    assert named <= published


# -- two with one name ---------------------------------------------------------------------


def test_two_backends_with_one_name_are_only_an_error_for_who_uses_it(
    distribution: MakeDistribution,
) -> None:
    distribution("lmcache-backend-toy", good("toy"))
    distribution("acme-lmcache-toy", good("toy"))
    plugins = load()
    assert plugins.storage_backend("memory").name == "memory"
    with pytest.raises(PluginError) as caught:
        plugins.storage_backend("toy")
    for part in ("lmcache-backend-toy", "acme-lmcache-toy", "LMCACHE_DISABLE_PLUGINS="):
        assert part in str(caught.value)
    with pytest.raises(PluginError, match="toy:// addresses"):
        plugins.backend_for_url("toy://h")
    assert len(plugins.conflicts()) == 2  # the name and the scheme
    # The remedy in the message works.
    remedied = load(LMCACHE_DISABLE_PLUGINS="acme-lmcache-toy")
    assert remedied.storage_backend("toy").name == "toy"
    assert remedied.conflicts() == []


def test_an_alias_of_a_serde_conflicts_like_a_name(distribution: MakeDistribution) -> None:
    code = """
@hookimpl
def lmcache_serdes():
    return [SerdeDescriptor(name="mine", summary="", lossless=True, config=Options,
                            create=lambda options: None, aliases=("naive",))]
"""
    distribution("lmcache-serde-mine", code)
    plugins = load()
    assert plugins.serde("mine").name == "mine"
    assert plugins.serde("raw").name == "raw"
    with pytest.raises(PluginError, match=r"lmcache-core and mine of lmcache-serde-mine"):
        plugins.serde("naive")


def test_policies_conflict_whatever_their_case(distribution: MakeDistribution) -> None:
    code = """
from lmcache_core.contracts.eviction import LRU, CachePolicyDescriptor
@hookimpl
def lmcache_cache_policies():
    return [CachePolicyDescriptor(name="lru", summary="", create=lambda _: LRU())]
"""
    distribution("lmcache-policy-lru", code)
    with pytest.raises(PluginError, match="2 plugins provide the cache policy 'LRU'"):
        load().cache_policy("LRU")


# -- plugins of this process --------------------------------------------------------------


class Options(BaseModel):
    model_config = ConfigDict(extra="forbid")


def backend(name: str, config: Any = Options, **more: Any) -> StorageBackendDescriptor:
    return StorageBackendDescriptor(
        name=name, summary="a toy", config=config, create=lambda _: None, **more
    )


class Offering:
    """A plugin that is an object."""

    def __init__(self, *descriptors: StorageBackendDescriptor) -> None:
        self.descriptors = descriptors

    @hookimpl
    def lmcache_storage_backends(self) -> list[StorageBackendDescriptor]:
        return list(self.descriptors)


NAMES = {
    "BaseModel": BaseModel,
    "Options": Options,
    "backend": backend,
    "from_url": lambda url: {},
    "hookimpl": hookimpl,
}


def module(name: str, code: str) -> ModuleType:
    made = ModuleType(name)
    made.__dict__.update(NAMES)
    exec(code, made.__dict__)  # noqa: S102
    return made


def here(*plugins: object, **environ: str) -> Plugins:
    return Plugins(register=plugins, environ=environ)


def test_a_registered_object_and_module_are_found_beside_the_installed_ones(
    distribution: MakeDistribution,
) -> None:
    distribution("lmcache-backend-toy", good("toy"))
    plugins = here(Offering(backend("mine")), module("acme.shelf", good("shelf")))
    assert [plugins.storage_backend(n).name for n in ("toy", "mine", "shelf")]
    assert plugins.backend_for_url("shelf://h") is plugins.storage_backend("shelf")
    mine, shelf = plugins.records[-2:]
    assert mine == PluginRecord(
        "Offering", IN_PROCESS, "", "Offering", "ok", "", ("storage backend mine",)
    )
    assert (shelf.name, shelf.target, shelf.status) == ("acme.shelf", "acme.shelf", "ok")


def test_two_objects_of_one_class_have_names_of_their_own() -> None:
    plugins = here(Offering(backend("one")), Offering(backend("two")), Offering(backend("three")))
    assert [r.name for r in plugins.records[-3:]] == ["Offering", "Offering-2", "Offering-3"]
    assert plugins.storage_backend("two").name == "two"
    without = Plugins(
        ["Offering-2"], register=[Offering(backend("one")), Offering(backend("two"))], environ={}
    )
    assert without.storage_backend("one").name == "one"
    with pytest.raises(UnknownPluginError, match=r"Offering-2, registered in this process \(disab"):
        without.storage_backend("two")


def test_a_plugin_that_is_installed_too_or_given_twice_is_listed_once(
    distribution: MakeDistribution,
) -> None:
    found = import_module(distribution("lmcache-backend-toy", good("toy")))
    mine = Offering(backend("mine"))
    plugins = here(found, mine, mine)
    assert [r.status for r in plugins.records if r.provides == ("storage backend toy",)] == ["ok"]
    assert [r.name for r in plugins.records if r.distribution == IN_PROCESS] == ["Offering"]
    assert plugins.conflicts() == []
    # Turned off where it is installed, it is still the application's.
    without = here(found, LMCACHE_DISABLE_PLUGINS="lmcache-backend-toy")
    assert without.storage_backend("toy").name == "toy"


def test_a_registered_plugin_can_be_turned_off_by_its_name() -> None:
    plugins = here(module("toy", good("toy")), LMCACHE_DISABLE_PLUGINS="toy")
    with pytest.raises(PluginLoadError) as caught:
        plugins.storage_backend("toy")
    assert "from a plugin registered in this process, which is disabled" in str(caught.value)
    assert "take it out of LMCACHE_DISABLE_PLUGINS" in str(caught.value)


def test_a_registered_plugin_conflicts_like_an_installed_one(
    distribution: MakeDistribution,
) -> None:
    distribution("lmcache-backend-toy", good("toy"))
    plugins = here(module("acme.toy", good("toy")))
    with pytest.raises(PluginError) as caught:
        plugins.storage_backend("toy")
    message = str(caught.value)
    assert "toy of lmcache-backend-toy and acme.toy, registered in this process" in message
    assert message.endswith("LMCACHE_DISABLE_PLUGINS=acme.toy")
    remedied = here(module("acme.toy", good("toy")), LMCACHE_DISABLE_PLUGINS="acme.toy")
    assert remedied.conflicts() == []


@pytest.mark.parametrize("kind", BROKEN)
def test_a_registered_plugin_that_is_broken_fails_alone(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    class Loading(ModuleType):
        """What goes wrong at import goes wrong when it is asked for its hooks."""

        def __dir__(self) -> list[str]:
            self.__dict__.update(NAMES)
            exec(BROKEN[kind][0], self.__dict__)  # noqa: S102
            return [*self.__dict__]

    plugins = here(Loading("acme"), Offering(backend("mine")))
    broken = next(r for r in plugins.records if r.name == "acme")
    assert broken.status == "failed"
    assert BROKEN[kind][1] in broken.detail
    assert broken.provides == ()
    assert plugins.storage_backend("mine").name == "mine"
    assert "registered in this process:acme" in caplog.text
    with pytest.raises(PluginLoadError, match="Remedy: mend it; LMCACHE_TRACE_PLUGINS=1"):
        plugins.storage_backend("acme")


def test_registered_plugins_are_asked_first(distribution: MakeDistribution) -> None:
    code = """
from lmcache_core.contracts.storage import HostRegion
@hookimpl
def lmcache_host_region(nbytes): return HostRegion({}, nbytes, memoryview(bytearray(nbytes)))
"""
    distribution("lmcache-pinned", code.format(1))
    assert here(module("mine", code.format(2))).host_region(64, "cpu").address == 2


def test_what_is_registered_here_cannot_be_isolated() -> None:
    """Its process would start with installed plugins only."""
    plugins = here(Offering(backend("mine"), backend("fragile", isolated=True)))
    for wish in (["backends.mine.isolated=true"], ["backends.fragile.type=fragile"]):
        with pytest.raises(
            ConfigError, match=r"isolated(.|\n)*was registered in this process.*install"
        ):
            load_config(plugins, environ={}, assignments=wish)
    wish = ["backends.mine.type=mine", "backends.fragile.isolated=false"]
    assert len(load_config(plugins, environ={}, assignments=wish).backends) == 2


def test_a_channel_that_is_registered_here_cannot_be_isolated() -> None:
    class Channels:
        @hookimpl
        def lmcache_transfer_channels(self) -> list[TransferChannelDescriptor]:
            wire: Any = {"config": Options, "create": lambda _: None, "isolated": True}
            return [TransferChannelDescriptor(name="wire", summary="", **wire)]

    context = TransferContext("here", HostRegion(0, 64, memoryview(bytearray(64))))
    with pytest.raises(PluginError, match="transfer channel 'wire' was registered in this proc"):
        asyncio.run(open_channel(here(Channels()), "wire", {}, context))


# -- the version of the API ----------------------------------------------------------------


def test_a_plugin_that_states_the_api_of_this_core_works(distribution: MakeDistribution) -> None:
    distribution("lmcache-backend-toy", f"LMCACHE_PLUGIN_API = {PLUGIN_API}" + good("toy"))
    assert load().storage_backend("toy").name == "toy"


def test_a_plugin_of_a_later_api_is_incompatible_and_nobody_else_is(
    distribution: MakeDistribution, caplog: pytest.LogCaptureFixture
) -> None:
    later = f"LMCACHE_PLUGIN_API = {PLUGIN_API + 1}" + good("toy")
    distribution("lmcache-backend-toy", later, version="2.3")
    distribution("lmcache-backend-fine", good("fine"))
    plugins = load()
    toy = record_of(plugins, "lmcache-backend-toy")
    assert (toy.status, toy.provides) == ("incompatible", ())
    assert toy.detail == (
        f"is written for plugin API {PLUGIN_API + 1}, but lmcache-core {core_version()} has plugin "
        f"API {PLUGIN_API}: pip install --upgrade lmcache-backend-toy lmcache-core"
    )
    assert f"plugin lmcache-backend-toy:toy 2.3 is not used: it {toy.detail}" in caplog.text
    with pytest.raises(PluginLoadError) as caught:
        plugins.storage_backend("toy")
    assert f"lmcache-backend-toy 2.3, which is incompatible: {toy.detail}" in str(caught.value)
    assert plugins.storage_backend("fine").name == "fine"


def test_a_registered_plugin_of_a_later_api_is_incompatible() -> None:
    plugin = Offering(backend("mine"))
    plugin.LMCACHE_PLUGIN_API = PLUGIN_API + 1
    record = here(plugin).records[-1]
    assert record.status == "incompatible"
    assert record.detail.endswith(": pip install --upgrade lmcache-core")


@pytest.mark.parametrize("stated", ["'1'", "1.0", "True", "0", "None"])
def test_an_api_version_that_is_none_is_the_plugins_mistake(
    stated: str, distribution: MakeDistribution
) -> None:
    distribution("lmcache-backend-toy", f"LMCACHE_PLUGIN_API = {stated}" + good("toy"))
    toy = record_of(load(), "lmcache-backend-toy")
    assert toy.status == "failed"
    assert f"LMCACHE_PLUGIN_API is {stated}, not a whole number" in toy.detail


# -- hooks with arguments ------------------------------------------------------------------


def test_host_memory_of_a_failing_plugin_falls_back_to_core(
    distribution: MakeDistribution, caplog: pytest.LogCaptureFixture
) -> None:
    code = "@hookimpl\ndef lmcache_host_region(nbytes): raise OSError('no device')"
    distribution("lmcache-pinned", code)
    plugins = load()
    region = plugins.host_region(1 << 20, "cpu")
    assert region.nbytes >= 1 << 20
    assert "no device" in caplog.text
    assert "no device" in record_of(plugins, "lmcache-pinned").detail


def test_a_plugin_is_asked_for_host_memory_before_core(distribution: MakeDistribution) -> None:
    code = """
from lmcache_core.contracts.storage import HostRegion
@hookimpl
def lmcache_host_region(nbytes, device):
    return HostRegion(12345, nbytes, memoryview(bytearray(nbytes))) if device == "toy" else None
"""
    distribution("lmcache-pinned", code)
    plugins = load()
    assert plugins.host_region(64, "toy").address == 12345
    assert plugins.host_region(64, "cpu").address != 12345


def test_an_error_of_core_own_host_memory_reaches_the_user(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from lmcache_core.builtin import host

    def refuse(nbytes: int, **wishes: object) -> None:
        raise ConfigError("that is more than there is")

    monkeypatch.setattr(host, "allocate_region", refuse)
    with pytest.raises(ConfigError, match="more than there is"):
        load().host_region(1 << 20, "cpu")


def test_no_host_memory_and_no_kernels_is_an_error() -> None:
    with pytest.raises(UnknownPluginError, match="64 bytes of host memory for 'cpu'"):
        load("host").host_region(64, "cpu")
    with pytest.raises(UnknownPluginError, match="moves blocks on 'abacus'"):
        load("lmcache-core").kernels("abacus")


def test_reports_name_their_plugin_and_survive_one_that_raises(
    distribution: MakeDistribution,
) -> None:
    distribution("lmcache-a", "@hookimpl\ndef lmcache_report(): return ['two devices']")
    distribution("lmcache-b", "@hookimpl\ndef lmcache_report(): raise OSError('x')")
    distribution("lmcache-c", "@hookimpl\ndef lmcache_report(): return 'a line'")
    code = """
from lmcache_core import ReportLine
@hookimpl
def lmcache_report(): return [ReportLine("warn", "old"), ReportLine("bad", "odd"), 7]
"""
    distribution("lmcache-d", code)
    report = load().report()
    for severity, text in (
        ("ok", "a: two devices"),
        ("ok", "c: a line"),
        ("warn", "d: old"),
        ("warn", "d: odd"),
        ("ok", "d: 7"),
    ):
        assert ReportLine(severity, text) in report


def test_a_url_that_the_backend_refuses_is_a_plugin_error(distribution: MakeDistribution) -> None:
    distribution("lmcache-backend-toy", good("toy"))
    plugins = load()
    with pytest.raises(PluginError, match="'toy' says: there is no host in it"):
        plugins.options_from_url(plugins.storage_backend("toy"), "toy://")
    with pytest.raises(PluginError, match="takes no address"):
        plugins.options_from_url(plugins.storage_backend("memory"), "memory://h")


# -- tracing -------------------------------------------------------------------------------


def test_tracing_shows_each_step_and_the_traceback(
    distribution: MakeDistribution, caplog: pytest.LogCaptureFixture
) -> None:
    module = distribution("lmcache-backend-toy", "import a_module_that_nobody_has")
    load(LMCACHE_TRACE_PLUGINS="1")
    assert f"found lmcache-backend-toy:toy 1.0: {module}" in caplog.text
    assert "imported lmcache_core.builtin.memory" in caplog.text
    assert "Traceback" in caplog.text


@pytest.mark.parametrize("off", ["", "0", "false"])
def test_no_tracing_unless_asked(off: str, caplog: pytest.LogCaptureFixture) -> None:
    load(LMCACHE_TRACE_PLUGINS=off)
    assert "plugins: " not in caplog.text
