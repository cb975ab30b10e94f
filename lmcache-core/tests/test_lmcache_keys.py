"""LMCache's flat keys: each has a fate, and what works works as it does there."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest

from lmcache_core.config import Config, load_config
from lmcache_core.config.models import CoreConfig
from lmcache_core.dialect.table import ALIASES, KEYS, Fate
from lmcache_core.errors import ConfigError
from lmcache_core.plugins.manager import Plugins

MakeDistribution = Callable[..., str]

CATALOGUE = (Path(__file__).parent / "data" / "lmcache_0_5_6_keys.txt").read_text().split()
OLD_NAMES = [
    "enable_nixl",
    "nixl_receiver_host",
    "nixl_receiver_port",
    "blend_recompute_ratio",
    "enable_xpyd",
    "nixl_peer_host",
    "nixl_peer_init_port",
    "nixl_peer_alloc_port",
    "nixl_proxy_host",
    "nixl_proxy_port",
    "nixl_buffer_size",
    "nixl_role",
    "controller_url",
    "lmcache_worker_port",
    "plugin_locations",
    "external_backends",
]

TOYS = """
class Disk(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    path: str
    max_size_gib: float | None = None
    direct_io: bool = False

@hookimpl
def lmcache_storage_backends():
    return [
        backend("filesystem", config=Disk),
        backend("toy", url_schemes=("toy",), config_from_url=from_url,
                extra_config_keys={"toy_port": "port", "enable_toy": "type",
                                   "cufile_buffer_size": "port", "nixl_buffer_size": "port"}),
    ]

@hookimpl
def lmcache_serdes():
    return [SerdeDescriptor(name="squeeze", summary="", lossless=False, config=Options,
                            create=lambda options: None)]
"""


@pytest.fixture
def plugins(distribution: MakeDistribution) -> Plugins:
    distribution("lmcache-toys", TOYS)
    # Not the built-in filesystem, because the toy is called toys; what else is installed as if it
    # weren't there.
    others = {point.name for point in entry_points(group="lmcache.plugins")} - {"toys"}
    return Plugins(["filesystem", *others], environ={})


def load(plugins: Plugins, *assignments: str, **more: Any) -> Config:
    return load_config(plugins, environ=more.pop("environ", {}), assignments=assignments, **more)


def refusal(plugins: Plugins, *assignments: str, **more: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        load(plugins, *assignments, **more)
    return str(caught.value)


def options(config: Config, section: str) -> dict[str, Any]:
    (found,) = [s for s in config.backends if s.name == section]
    return {"type": found.type, **found.options.model_dump(exclude_defaults=True)}


# -- the table -----------------------------------------------------------------------------


def test_the_catalogue_is_whole() -> None:
    assert len(set(CATALOGUE)) == 108


@pytest.mark.parametrize("key", CATALOGUE)
def test_every_key_has_a_fate(key: str) -> None:
    fate = KEYS[key].fate
    assert (fate is Fate.OPTION) == (key in CoreConfig.model_fields)
    assert KEYS[key].why or fate is Fate.OPTION


def test_every_old_name_leads_to_a_key() -> None:
    assert set(ALIASES) == set(OLD_NAMES)
    assert set(ALIASES.values()) <= KEYS.keys()


@pytest.mark.parametrize("key", [k for k, v in KEYS.items() if v.fate is Fate.REFUSED])
def test_what_we_cannot_do_is_refused_when_it_is_asked_for(key: str, plugins: Plugins) -> None:
    message = refusal(plugins, f"{key}=something")
    assert message.startswith(f"1 problem in the LMCache configuration:\n  {key} = 'something'")
    assert f"(--set {key})" in message
    assert "isn't available in this version" in message
    for nothing in ("false", "null", "0", "[]", ""):
        assert load(plugins, f"{key}={nothing}").notices == ()


@pytest.mark.parametrize("key", [k for k, v in KEYS.items() if v.fate is Fate.NO_EFFECT])
def test_what_has_no_effect_is_accepted_with_one_notice(key: str, plugins: Plugins) -> None:
    (notice,) = [n for n in load(plugins, f"{key}=1").notices if "is now called" not in n]
    assert "no effect: " in notice
    assert f"(--set {key})" in notice


def test_keys_without_effect_share_a_notice(plugins: Plugins) -> None:
    (notice,) = load(plugins, "lazy_memory_step_ratio=1", "lazy_memory_safe_size=1").notices
    assert notice.startswith("lazy_memory_step_ratio (--set lazy_memory_step_ratio), lazy_memory_")


def test_a_refused_feature_is_the_only_problem_of_a_configuration_that_needs_it(
    plugins: Plugins,
) -> None:
    """The guide's disaggregated prefill: no tier is configured, and that isn't the point."""
    message = refusal(plugins, "local_cpu=false", "enable_pd=true", "pd_role=sender")
    assert message.startswith("1 problem ")


# -- old names -----------------------------------------------------------------------------


@pytest.mark.parametrize(("old", "new"), ALIASES.items())
def test_old_names_work_and_are_mentioned(old: str, new: str, plugins: Plugins) -> None:
    if KEYS[new].fate is Fate.REFUSED:
        assert f"{new} = 'yes' (--set {old})" in refusal(plugins, f"{old}=yes")
    else:
        value = "toy" if KEYS[new].fate is Fate.SECTION else "1"
        notices = load(plugins, f"{old}={value}").notices
        assert f"{old} (--set {old}) is now called {new}" in notices


def test_an_old_name_in_a_stronger_layer_beats_the_new_one(
    plugins: Plugins, tmp_path: Path
) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("enable_pd: true\n")
    load(plugins, file=file, environ={"LMCACHE_ENABLE_XPYD": "false"})
    assert "old name of enable_pd" in refusal(plugins, "enable_xpyd=false", "enable_pd=false")


# -- local_disk ----------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["/data/kv", "file:///data/kv", "[/data/kv]"])
def test_local_disk_is_a_filesystem_section(value: str, plugins: Plugins) -> None:
    config = load(plugins, f"local_disk={value}", "max_local_disk_size=10")
    actual = options(config, "local_disk")
    assert actual == {"type": "filesystem", "path": "/data/kv", "max_size_gib": 10.0}
    assert config.origins["backends.local_disk.path"] == "local_disk, --set local_disk"
    assert (
        config.origins["backends.local_disk.max_size_gib"]
        == "max_local_disk_size, --set max_local_disk_size"
    )


def test_local_disk_without_a_size_has_no_bound(plugins: Plugins) -> None:
    config = load(plugins, "local_disk=/data")
    assert options(config, "local_disk") == {"type": "filesystem", "path": "/data"}


@pytest.mark.parametrize("zero", ["0", "0.0"])
def test_an_explicit_size_of_zero_turns_the_disk_off_and_says_so(
    zero: str, plugins: Plugins
) -> None:
    config = load(plugins, "local_disk=/data", f"max_local_disk_size={zero}")
    assert config.backends == ()
    (notice,) = config.notices
    assert "turns the disk off" in notice


def test_a_disk_that_is_off_does_not_count_as_a_tier(plugins: Plugins) -> None:
    message = refusal(plugins, "local_disk=/data", "max_local_disk_size=0", "local_cpu=false")
    assert "nothing would be cached" in message


@pytest.mark.parametrize(
    ("assignment", "text"),
    [
        ("local_disk=/a,/b", "takes one folder"),
        ("local_disk=[/a, /b]", "takes one folder"),
        ("local_disk={a: 1}", "is a folder"),
        ("local_disk=,", "is a folder"),
    ],
)
def test_local_disk_that_is_not_one_folder_is_refused(
    assignment: str, text: str, plugins: Plugins
) -> None:
    assert text in refusal(plugins, assignment)


def test_local_disk_true_is_refused(plugins: Plugins) -> None:
    assert "is a folder" in refusal(plugins, engine=("vLLM", {"lmcache.local_disk": True}))


@pytest.mark.parametrize("size", ["-1", "much", "nan", "inf", "[1]"])
def test_a_disk_size_that_is_none_is_refused(size: str, plugins: Plugins) -> None:
    message = refusal(plugins, "local_disk=/data", f"max_local_disk_size={size}")
    assert "max_local_disk_size" in message
    assert "is a size in GiB" in message


def test_a_disk_size_without_a_disk_has_no_effect(plugins: Plugins) -> None:
    (notice,) = load(plugins, "max_local_disk_size=5").notices
    assert "there is no local_disk" in notice


def test_use_odirect_is_the_disk_direct_io(plugins: Plugins) -> None:
    config = load(plugins, "local_disk=/data", "extra_config.use_odirect=true")
    assert options(config, "local_disk")["direct_io"] is True
    (notice,) = load(plugins, "extra_config.use_odirect=true").notices
    assert "there is no local_disk" in notice


def test_both_dialects_for_one_section_are_refused(plugins: Plugins) -> None:
    message = refusal(plugins, "local_disk=/data", "backends.local_disk.type=filesystem")
    assert "backends.local_disk is set too" in message


# -- remote_url ----------------------------------------------------------------------------


def test_remote_url_is_a_section_of_the_plugin_that_opens_it(plugins: Plugins) -> None:
    config = load(plugins, "remote_url=toy://example:77", "remote_serde=naive")
    assert options(config, "remote") == {"type": "toy", "host": "example", "port": 77}
    (section,) = config.backends
    assert section.serde == "naive"
    assert config.core.serde == "raw"
    assert config.origins["backends.remote.host"] == "remote_url, --set remote_url"
    assert config.origins["backends.remote.serde"] == "remote_serde, --set remote_serde"


@pytest.mark.parametrize("chain", ["squeeze", "squeeze+naive"])
def test_remote_serde_does_not_touch_the_disk(chain: str, plugins: Plugins) -> None:
    config = load(plugins, "local_disk=/data", "remote_url=toy://h", f"remote_serde={chain}")
    assert [(s.name, s.serde) for s in config.backends] == [("local_disk", None), ("remote", chain)]


def test_an_unknown_serde_is_refused_and_the_installed_ones_listed(plugins: Plugins) -> None:
    message = refusal(plugins, "remote_url=toy://h", "remote_serde=cachegen")
    assert "backends.remote.serde = 'cachegen' (remote_serde, --set remote_serde)" in message
    assert "installed: raw, squeeze" in message


def test_an_unknown_scheme_is_refused_with_the_command_that_helps(plugins: Plugins) -> None:
    message = refusal(plugins, environ={"LMCACHE_REMOTE_URL": "rediss://user:pw@h:6379"})
    assert "no installed plugin opens rediss:// addresses" in message
    assert "installed ones open: toy" in message
    assert "pip install lmcache-backend-redis" in message
    assert "environment LMCACHE_REMOTE_URL" in message
    assert "pw" not in message


@pytest.mark.parametrize(
    ("url", "text"),
    [("example:77", "is an address"), ("toy://", "there is no host"), ("toy://h:x", "integer")],
)
def test_an_address_that_is_wrong_is_refused(url: str, text: str, plugins: Plugins) -> None:
    message = refusal(plugins, f"remote_url={url}")
    assert text in message
    assert "--set remote_url" in message


def test_null_turns_off_what_the_file_says(plugins: Plugins, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("remote_url: toy://h\n")
    assert load(plugins, file=file, environ={"LMCACHE_REMOTE_URL": "null"}).backends == ()
    assert load(plugins, file=file, environ={"LMCACHE_REMOTE_URL": ""}).backends != ()


def test_tiers_are_the_disk_then_the_remote_store_then_the_rest(plugins: Plugins) -> None:
    config = load(
        plugins,
        "backends.last.type=toy",
        "backends.memory.max_size_gib=1",
        "remote_url=toy://h",
        "local_disk=/data",
    )
    assert [s.name for s in config.backends] == ["local_disk", "remote", "last", "memory"]


# -- extra_config --------------------------------------------------------------------------


def test_extra_config_goes_to_the_backend_that_reads_it(plugins: Plugins) -> None:
    config = load(plugins, "remote_url=toy://h:1", "extra_config={toy_port: 99}")
    assert options(config, "remote")["port"] == 99
    assert config.origins["backends.remote.port"] == "extra_config.toy_port, --set extra_config"


def test_a_wrong_extra_config_value_is_blamed_on_its_own_key(plugins: Plugins) -> None:
    message = refusal(plugins, "remote_url=toy://h", "extra_config.toy_port=many")
    assert "(extra_config.toy_port, --set extra_config.toy_port)" in message


def test_extra_config_of_a_backend_that_is_not_in_use_has_no_effect(plugins: Plugins) -> None:
    (notice,) = load(plugins, "extra_config.toy_port=1").notices
    assert "'toy' isn't configured" in notice


def test_an_extra_config_key_may_turn_its_backend_on(plugins: Plugins) -> None:
    config = load(plugins, "extra_config={enable_toy: true, toy_port: 5}")
    assert options(config, "toy") == {"type": "toy", "port": 5}
    assert load(plugins, "extra_config={enable_toy: false}").backends == ()


def test_the_key_that_turns_a_backend_on_may_come_last(plugins: Plugins) -> None:
    config = load(plugins, "extra_config={toy_port: 5, enable_toy: true}")
    assert options(config, "toy") == {"type": "toy", "port": 5}
    assert config.notices == ()


@pytest.mark.parametrize("key", ["cufile_buffer_size", "nixl_buffer_size"])
def test_a_backend_may_read_a_key_that_has_no_effect_by_itself(plugins: Plugins, key: str) -> None:
    config = load(plugins, f"{key}=9", "extra_config={enable_toy: true}")
    assert options(config, "toy") == {"type": "toy", "port": 9}
    assert config.origins["backends.toy.port"] == f"{key}, --set {key}"
    assert config.notices == ()
    notices = load(plugins, f"{key}=9").notices
    assert any(f"{key} (--set {key}): no effect" in notice for notice in notices)


def test_unknown_extra_config_is_named_in_a_notice(plugins: Plugins) -> None:
    (notice,) = load(plugins, "extra_config={who: 1, dax.device_path: /x}").notices
    assert "extra_config.who" in notice
    assert "extra_config.dax.device_path" in notice
    assert "no installed plugin reads this" in notice


def test_extra_config_of_the_guide_is_understood(plugins: Plugins) -> None:
    config = load(plugins, "extra_config={lookup_backoff_time: 0.001, save_chunk_meta: false}")
    assert all("no effect" in notice for notice in config.notices)


def test_nixl_storage_without_its_plugin_is_refused(plugins: Plugins) -> None:
    assert "enable_nixl_storage" in refusal(plugins, "extra_config.enable_nixl_storage=true")


def test_extra_config_must_be_a_mapping(plugins: Plugins) -> None:
    assert "must be a mapping" in refusal(plugins, "extra_config=7")


# -- environment and engine ----------------------------------------------------------------

UPSTREAM_VARIABLES = [
    "LMCACHE_USE_EXPERIMENTAL",
    "LMCACHE_LOG_LEVEL",
    "LMCACHE_DISABLE_BANNER",
    "LMCACHE_TRACK_USAGE",
    "LMCACHE_USAGE_TRACK_URL",
    "LMCACHE_USAGE_TRACK_INTERVAL",
    "LMCACHE_FORCE_SKIP_SAVE",
    "LMCACHE_GPU_STAGING_BUFFER_BYTES",
    "LMCACHE_MQ_TIMEOUT",
    "LMCACHE_MP_TRANSFER_MODE",
    "LMCACHE_OFFLOAD_RPC_PORT",
    "LMCACHE_REQUEST_TELEMETRY_TYPE",
    "LMCACHE_SERVER_URL",
    "LMCACHE_COORDINATOR_URL",
    "LMCACHE_COORDINATOR_ADVERTISE_IP",
    "LMCACHE_COORDINATOR_HEARTBEAT_INTERVAL",
    "LMCACHE_COORDINATOR_EVENT_FLUSH_INTERVAL",
    "LMCACHE_COORDINATOR_EVENT_REPORTING",
    "LMCACHE_AEROSPIKE_HOSTS",
    "LMCACHE_RESP_HOST",
    "LMCACHE_RESP_PASSWORD",
    "LMCACHE_EC_CHUNK_SIZE",
    "LMCACHE_RUNTIME_PLUGIN_ROLE",
    "LMCACHE_USE_UPSTREAM_MP",
    "LMCACHE_DISABLE_PLUGINS",
    "LMCACHE_TRACE_PLUGINS",
]


@pytest.mark.parametrize("name", UPSTREAM_VARIABLES)
def test_variables_that_are_not_options_are_no_mistake(name: str, plugins: Plugins) -> None:
    load(plugins, environ={name: "1"})


def test_variables_that_nobody_reads_are_named_once(plugins: Plugins) -> None:
    config = load(plugins, environ={"LMCACHE_MQ_TIMEOUT": "1", "LMCACHE_SERVER_URL": "x"})
    expected = "LMCACHE_MQ_TIMEOUT, LMCACHE_SERVER_URL: not an option of this version; not read"
    assert config.notices == (expected,)


def test_what_kubernetes_says_about_services_is_no_mistake(plugins: Plugins) -> None:
    environ = {
        "LMCACHE_SERVER_SERVICE_HOST": "10.0.0.1",
        "LMCACHE_SERVER_SERVICE_PORT": "65432",
        "LMCACHE_SERVER_SERVICE_PORT_HTTP": "80",
        "LMCACHE_SERVER_PORT": "tcp://10.0.0.1:65432",
        "LMCACHE_SERVER_PORT_65432_TCP": "tcp://10.0.0.1:65432",
        "LMCACHE_SERVER_PORT_65432_TCP_ADDR": "10.0.0.1",
        "LMCACHE_PORT": "tcp://10.0.0.1:1",
    }
    assert load(plugins, environ=environ).notices == ()


def test_a_key_that_starts_like_the_prefix_keeps_its_name(plugins: Plugins) -> None:
    config = load(plugins, environ={"LMCACHE_LMCACHE_INSTANCE_ID": "west-1"})
    assert config.core.lmcache_instance_id == "west-1"


def test_engine_keys_of_ours_and_of_the_engine(plugins: Plugins) -> None:
    extra = {
        "lmcache.chunk_size": 64,
        "lmcache.extra_config": {"toy_port": 3},
        "lmcache.remote_url": "toy://h",
        "lmcache_rpc_port": "producer1",
        "discard_partial_chunks": False,
        "use_native": False,
        "skip_last_n_tokens": 1,
        "of_the_engine": 1,
    }
    config = load(plugins, engine=("vLLM", extra), engine_ignores={"of_the_engine"})
    assert config.core.chunk_size == 64
    assert options(config, "remote")["port"] == 3
    assert config.origins["chunk_size"] == "vLLM extra config lmcache.chunk_size"
    assert config.core.save_unfull_chunk
    old = "discard_partial_chunks (vLLM extra config)"
    assert config.notices == (f"{old} is now called save_unfull_chunk",)


def test_an_engine_own_mapping_is_not_changed(plugins: Plugins) -> None:
    extra = {
        "lmcache.extra_config": {"toy_port": 3},
        "lmcache.extra_config.save_chunk_meta": True,
    }
    load(plugins, engine=("vLLM", extra))
    assert extra["lmcache.extra_config"] == {"toy_port": 3}


def test_options_of_the_server_process_get_one_notice(plugins: Plugins) -> None:
    extra = {"lmcache.mp.host": "tcp://h", "lmcache.mp.port": 5555}
    (notice,) = load(plugins, engine=("vLLM", extra)).notices
    assert notice.startswith("lmcache.mp.host, lmcache.mp.port (vLLM extra config): no effect")


def test_unknown_engine_keys_are_mistakes(plugins: Plugins) -> None:
    message = refusal(plugins, engine=("vLLM", {"lmcache.chunk_sise": 1, "chunk_size": 8}))
    assert message.startswith("2 problems")
    assert "(vLLM extra config lmcache.chunk_sise)" in message
    assert "did you mean 'chunk_size'?" in message
    assert "write 'lmcache.chunk_size'" in message


def test_variables_that_a_plugin_reads_are_no_mistake(distribution: MakeDistribution) -> None:
    distribution(
        "lmcache-vault",
        TOYS.replace('name="squeeze"', 'name="vault", environment=("LMCACHE_VAULT_KEY",)'),
    )
    environ = {"LMCACHE_VAULT_KEY": "secret"}
    assert load_config(Plugins(environ={}), environ=environ) is not None
    with pytest.raises(ConfigError, match="LMCACHE_VAULT_KEY"):
        load_config(Plugins(["lmcache-vault"], environ={}), environ=environ)


# -- what users write ----------------------------------------------------------------------


def test_what_earlier_versions_had_and_is_off_needs_nothing(plugins: Plugins) -> None:
    config = load(plugins, "lookup_url=null", "distributed_url=null", "error_handling=false")
    assert [n for n in config.notices if "lookup_url" in n or "distributed_url" in n] == []
    assert "isn't available in this version: a lookup server" in refusal(plugins, "lookup_url=h:1")


@pytest.mark.parametrize("key", ["local_device=cpu", "pipelined_backend=False"])
def test_what_earlier_versions_ignored_is_one_notice(key: str, plugins: Plugins) -> None:
    (notice,) = load(plugins, key).notices
    assert notice.startswith(f"{key.partition('=')[0]} (--set ")
    assert "no effect" in notice


def test_disaggregated_prefill_in_its_first_words_is_one_sentence(plugins: Plugins) -> None:
    words = {
        "LMCACHE_LOCAL_CPU": "False",
        "LMCACHE_MAX_LOCAL_CPU_SIZE": "0",
        "LMCACHE_REMOTE_SERDE": "NULL",
        "LMCACHE_ENABLE_NIXL": "True",
        "LMCACHE_NIXL_ROLE": "sender",
        "LMCACHE_NIXL_RECEIVER_HOST": "decoder",
        "LMCACHE_NIXL_RECEIVER_PORT": "55555",
        "LMCACHE_NIXL_ENABLE_GC": "True",
    }
    message = refusal(plugins, environ=words)
    assert message.startswith("1 problem")
    assert "isn't available in this version: disaggregated prefill" in message


@pytest.mark.parametrize("value", ["false", "False", "null"])
def test_no_disk_is_no_disk(value: str, plugins: Plugins) -> None:
    assert load(plugins, f"local_disk={value}").backends == ()


def test_a_file_address_with_one_slash_is_the_absolute_path(plugins: Plugins) -> None:
    config = load(plugins, "local_disk=file:/var/cache/lmcache")
    assert options(config, "local_disk")["path"] == "/var/cache/lmcache"


@pytest.mark.parametrize("quote", ["'", '"'])
def test_quotes_that_docker_keeps_are_taken_off(quote: str, plugins: Plugins) -> None:
    environ = {
        "LMCACHE_REMOTE_URL": f"{quote}toy://h:5{quote}",
        "LMCACHE_MAX_LOCAL_CPU_SIZE": f"{quote}5{quote}",
    }
    config = load(plugins, environ=environ)
    assert options(config, "remote") == {"type": "toy", "host": "h", "port": 5}
    (notice,) = config.notices
    assert notice.startswith("LMCACHE_MAX_LOCAL_CPU_SIZE, LMCACHE_REMOTE_URL: read without")


def test_a_storage_plugin_that_is_installed_is_a_section(plugins: Plugins, tmp_path: Path) -> None:
    file = tmp_path / "lmcache.yaml"
    file.write_text(
        'remote_storage_plugins: ["toy", "toy.second"]\n'
        "extra_config:\n"
        '  remote_storage_plugin.toy.toy_url: "toy://cache:7"\n'
        "  remote_storage_plugin.toy.second.port: 8\n"
    )
    config = load(plugins, file=file)
    assert options(config, "toy") == {"type": "toy", "host": "cache", "port": 7}
    assert options(config, "toy-second") == {"type": "toy", "port": 8}
    assert config.notices == ()


def test_a_storage_plugin_by_module_path_is_refused(plugins: Plugins, tmp_path: Path) -> None:
    file = tmp_path / "lmcache.yaml"
    file.write_text(
        "storage_plugins: [mine]\n"
        "extra_config: {storage_plugin.mine.module_path: a.b, storage_plugin.mine.class_name: C}\n"
    )
    message = refusal(plugins, file=file)
    assert message.startswith("1 problem")
    assert "storage_plugins = 'mine'" in message
    assert "a package that pip installs, not a module's path" in message


def test_a_choice_of_all_tiers_is_what_happens(plugins: Plugins) -> None:
    chosen = ("store_location=LocalCPUBackend", "retrieve_locations=[LocalCPUBackend]")
    assert load(plugins, *chosen).notices == ()
    disk = ("local_disk=/data", *chosen)
    assert refusal(plugins, *disk).startswith("2 problems")
    both = "[LocalCPUBackend, LocalDiskBackend]"
    assert load(plugins, "local_disk=/data", f"retrieve_locations={both}").notices == ()


def test_partial_chunks_that_arent_discarded_are_stored(plugins: Plugins) -> None:
    config = load(plugins, engine=("vLLM", {"discard_partial_chunks": False}))
    assert config.core.save_unfull_chunk
    assert config.notices == (
        "discard_partial_chunks (vLLM extra config) is now called save_unfull_chunk",
    )
    assert not load(
        plugins, engine=("vLLM", {"discard_partial_chunks": True})
    ).core.save_unfull_chunk
