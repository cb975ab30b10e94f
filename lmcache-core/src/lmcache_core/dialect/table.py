"""What becomes of each configuration key that LMCache has.

A table and nothing else; `keys` acts on it and the configuration
reference is made from it. The keys are those of LMCache 0.5.6, and the few of
0.3.10 that 0.5.6 dropped.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Fate(Enum):
    """What happens to a key."""

    OPTION = "works"
    """An option of ours has the same name and meaning."""
    SECTION = "works; becomes part of a `backends:` section"
    REFUSED = "refused when set: not available in this version"
    """Would change what happens, and we can't do it yet. False, null and empty are accepted."""
    NO_EFFECT = "accepted, with a notice that it has no effect"


@dataclass(frozen=True)
class Key:
    """One key's fate, and the words for it in a message."""

    fate: Fate
    why: str = ""


_OPTION = Key(Fate.OPTION)


def _refused(feature: str) -> Key:
    return Key(Fate.REFUSED, feature)


def _no_effect(why: str) -> Key:
    return Key(Fate.NO_EFFECT, why)


def _detail_of(feature: str) -> Key:
    return _no_effect(f"it only matters together with {feature}, which this version doesn't have")


_BLEND = _detail_of("enable_blending")
_P2P = _detail_of("enable_p2p")
_CONTROLLER = _detail_of("enable_controller")
_PD = _detail_of("enable_pd")
_NIXL = _detail_of("the NIXL transfer channel")
_GDS = _detail_of("gds_path")
_MARU = _detail_of("maru_path")
_API = _detail_of("internal_api_server_enabled")
_HIDDEN = _detail_of("enable_hidden_state_cache")
_STATISTICS = _no_effect("chunk reuse statistics aren't collected in this version")
_PLUGINS = Key(Fate.SECTION, "`backends.NAME`, where an installed plugin is called so")
_SERVER = _no_effect("the cache runs inside the engine's processes; there is no server to reach")
_LAZY = _no_effect("the operating system backs host memory as it is used, so it needn't grow")

KEYS: dict[str, Key] = {
    "chunk_size": _OPTION,
    "local_cpu": _OPTION,
    "max_local_cpu_size": _OPTION,
    "local_cpu_use_hugepages": _OPTION,
    "reserve_local_cpu_size": _no_effect(
        "host memory is exactly max_local_cpu_size; a size that the machine hasn't got is refused"
    ),
    "local_disk": Key(Fate.SECTION, "`backends.local_disk`: `type: filesystem`, `path`"),
    "local_disk_path_sharding": _no_effect("a disk tier has one folder"),
    "max_local_disk_size": Key(Fate.SECTION, "`backends.local_disk.max_size_gib`; 0 turns it off"),
    "remote_url": Key(Fate.SECTION, "`backends.remote`: the type and address"),
    "remote_serde": Key(Fate.SECTION, "`backends.remote.serde`"),
    "use_layerwise": _OPTION,
    "save_decode_cache": _OPTION,
    "pre_caching_hash_algorithm": _no_effect(
        "chunk names don't depend on the engine's hash function or on PYTHONHASHSEED"
    ),
    "enable_blending": _refused("blending (reuse of text that isn't a prefix)"),
    "blend_recompute_ratios": _BLEND,
    "blend_thresholds": _BLEND,
    "blend_check_layers": _BLEND,
    "blend_min_tokens": _BLEND,
    "blend_special_str": _BLEND,
    "retrieve_locations": _refused("a choice of the tiers to read; all are read, in their order"),
    "store_location": _refused("a choice of the tier to store to; all tiers are stored to"),
    "enable_p2p": _refused("peer-to-peer sharing"),
    "p2p_host": _P2P,
    "p2p_init_ports": _P2P,
    "p2p_lookup_ports": _P2P,
    "mp_host": _SERVER,
    "mp_port": _SERVER,
    "enable_controller": _refused("the cache controller"),
    "lmcache_instance_id": _OPTION,
    "controller_pull_url": _CONTROLLER,
    "controller_reply_url": _CONTROLLER,
    "lmcache_worker_ports": _CONTROLLER,
    "lmcache_worker_ids": _CONTROLLER,
    "lmcache_worker_heartbeat_delay_time": _CONTROLLER,
    "lmcache_worker_heartbeat_time": _CONTROLLER,
    "enable_pd": _refused("disaggregated prefill"),
    "pd_role": _PD,
    "pd_buffer_size": _PD,
    "pd_buffer_device": _PD,
    "pd_peer_host": _PD,
    "pd_peer_init_port": _PD,
    "pd_peer_alloc_port": _PD,
    "pd_peer_query_port": _PD,
    "pd_proxy_host": _PD,
    "pd_proxy_port": _PD,
    "pd_allocation_timeout_sec": _PD,
    "pd_shutdown_timeout_sec": _PD,
    "pd_condition_poll_interval_sec": _PD,
    "pd_max_prefill_len": _PD,
    "pd_backend_mode": _PD,
    "pd_skip_proxy_notification": _PD,
    "pd_bidirectional": _PD,
    "transfer_channel": _detail_of("enable_p2p or enable_pd"),
    "nixl_backends": _NIXL,
    "nixl_buffer_size": _NIXL,
    "nixl_buffer_device": _NIXL,
    "gds_path": _refused("GPUDirect Storage"),
    "gds_path_sharding": _GDS,
    "gds_buffer_size": _GDS,
    "maru_path": _refused("Maru shared memory"),
    "maru_pool_size": _MARU,
    "use_gds": _GDS,
    "gds_backend": _GDS,
    "audit_actual_remote_url": _refused("the audit backend"),
    "internal_api_server_host": _API,
    "extra_config": Key(Fate.SECTION, "each key goes to the installed backend that reads it"),
    "save_unfull_chunk": _OPTION,
    "blocking_timeout_secs": _OPTION,
    "external_lookup_client": _refused("an external lookup service"),
    "py_enable_gc": _no_effect("a library doesn't switch the process's garbage collector"),
    "cache_policy": _OPTION,
    "numa_mode": _OPTION,
    "enable_async_loading": _OPTION,
    "internal_api_server_enabled": _refused("the internal HTTP API"),
    "internal_api_server_port_start": _API,
    "priority_limit": _OPTION,
    "internal_api_server_include_index_list": _API,
    "internal_api_server_socket_path_prefix": _API,
    "runtime_plugin_locations": _refused("scripts started beside the engine"),
    "storage_plugins": _PLUGINS,
    "remote_storage_plugins": _PLUGINS,
    "lookup_timeout_ms": _OPTION,
    "min_retrieve_tokens": _OPTION,
    "hit_miss_ratio": _refused("an artificial limit on hits"),
    "lookup_server_worker_ids": _no_effect("lookups need no server in the workers"),
    "enable_scheduler_bypass_lookup": _no_effect("the scheduler always looks up by itself"),
    "script_allowed_imports": _detail_of("run_script_api_enabled"),
    "run_script_api_enabled": _refused("running scripts that arrive over HTTP"),
    "enable_lazy_memory_allocator": _LAZY,
    "lazy_memory_initial_ratio": _LAZY,
    "lazy_memory_expand_trigger_ratio": _LAZY,
    "lazy_memory_step_ratio": _LAZY,
    "lazy_memory_safe_size": _LAZY,
    "enable_chunk_statistics": _STATISTICS,
    "chunk_statistics_auto_start_statistics": _STATISTICS,
    "chunk_statistics_auto_exit_timeout_hours": _STATISTICS,
    "chunk_statistics_auto_exit_target_unique_chunks": _STATISTICS,
    "chunk_statistics_strategy": _STATISTICS,
    "enable_kv_events": _OPTION,
    "use_gpu_connector_v3": _no_effect("there is one way to move blocks on each device"),
    "pin_timeout_sec": _OPTION,
    "pin_check_interval_sec": _no_effect("a pin ends by itself after pin_timeout_sec"),
    "remote_config_url": _refused("a configuration service"),
    "app_id": _detail_of("remote_config_url"),
    "enable_hidden_state_cache": _refused("the hidden-state cache"),
    "max_hidden_state_cpu_size": _HIDDEN,
    "hidden_state_layers": _HIDDEN,
    "hidden_states_retrieve_mode": _HIDDEN,
    # of earlier versions only
    "local_device": _no_effect("host memory and a disk are local_cpu and local_disk"),
    "pipelined_backend": _no_effect("remote stores are always written in the background"),
    "error_handling": _no_effect("what can't be loaded is always computed again"),
    "lookup_url": _refused("a lookup server"),
    "distributed_url": _refused("peer-to-peer sharing"),
    "nixl_enable_gc": _PD,
    "weka_path": _refused("the Weka backend"),
    "cufile_buffer_size": _GDS,
}

ALIASES: dict[str, str] = {
    "enable_nixl": "enable_pd",
    "nixl_receiver_host": "pd_peer_host",
    "nixl_receiver_port": "pd_peer_init_port",
    "blend_recompute_ratio": "blend_recompute_ratios",
    "enable_xpyd": "enable_pd",
    "nixl_peer_host": "pd_peer_host",
    "nixl_peer_init_port": "pd_peer_init_port",
    "nixl_peer_alloc_port": "pd_peer_alloc_port",
    "nixl_proxy_host": "pd_proxy_host",
    "nixl_proxy_port": "pd_proxy_port",
    "nixl_buffer_size": "pd_buffer_size",
    "nixl_role": "pd_role",
    "controller_url": "controller_pull_url",
    "lmcache_worker_port": "lmcache_worker_ports",
    "plugin_locations": "runtime_plugin_locations",
    "external_backends": "storage_plugins",
}
"""Old names. Each is honoured in its own layer, so that precedence stays right."""

EXTRA_KEYS: dict[str, Key] = {
    "gpu_to_numa_mapping": _detail_of("numa_mode: manual"),
    "use_odirect": Key(Fate.SECTION, "`backends.local_disk.direct_io`"),
    "save_chunk_meta": _no_effect("every stored value describes itself"),
    "use_exists_sync": _no_effect("presence is asked in one batch, with a deadline"),
    "force_store_wait": _no_effect("stores never hold a request up"),
    "save_only_first_rank": _no_effect("every rank stores what it holds"),
    "remote_enable_mla_worker_id_as0": _no_effect("every rank loads what it stored"),
    "first_rank_max_local_cpu_size": _no_effect("every rank has max_local_cpu_size"),
    "lookup_backoff_time": _no_effect("lookups don't poll"),
    "lmcache_rpc_port": _no_effect("lookups need no RPC to the workers"),
    "enable_sparse": _refused("blending"),
    "enable_nixl_storage": _refused("storage through NIXL without its plugin"),
}
"""``extra_config`` keys that belong to no backend. Others go to whoever reads them."""

EXTRA_PREFIXES: dict[str, Key] = {
    "histogram_bucket_": _no_effect("metric buckets are fixed"),
    "chunk_statistics_": _STATISTICS,
    "kv_msg_": _CONTROLLER,
    "full_sync_": _CONTROLLER,
    "heartbeat_": _CONTROLLER,
    "ping_": _no_effect("a backend's health is judged by its own calls"),
    "p2p_": _P2P,
    "maru_": _MARU,
}

URL_PACKAGES: dict[str, str] = {
    "lm": "lmcache-backend-lm",
    "lm+tls": "lmcache-backend-lm",
    "lm+unix": "lmcache-backend-lm",
    "redis": "lmcache-backend-redis",
    "rediss": "lmcache-backend-redis",
    "unix": "lmcache-backend-redis",
    "redis-sentinel": "lmcache-backend-redis",
    "redis-cluster": "lmcache-backend-redis",
    "resp": "lmcache-backend-redis",
    "valkey": "lmcache-backend-redis",
    "mooncakestore": "lmcache-backend-mooncake",
    "infinistore": "lmcache-backend-infinistore",
}
"""Who opens which ``remote_url``, for the hint when nobody does."""

SWITCHES = frozenset(
    {
        "LMCACHE_FORCE_SKIP_SAVE",
        "LMCACHE_USE_EXPERIMENTAL",
        "LMCACHE_USE_UPSTREAM_MP",
        "LMCACHE_DISABLE_BANNER",
        "LMCACHE_TRACK_USAGE",
    }
)
"""Variables that LMCache has and whose effect is ours anyway."""

FOREIGN_ENVIRONMENT = (
    "LMCACHE_USAGE_TRACK_",
    "LMCACHE_GPU_STAGING_BUFFER_BYTES",
    "LMCACHE_MQ_TIMEOUT",
    "LMCACHE_MP_TRANSFER_MODE",
    "LMCACHE_OFFLOAD_RPC_PORT",
    "LMCACHE_REQUEST_TELEMETRY_",
    "LMCACHE_SERVER_URL",
    "LMCACHE_COORDINATOR_",
    "LMCACHE_AEROSPIKE_",
    "LMCACHE_RESP_",
    "LMCACHE_EC_",
    "LMCACHE_RUNTIME_PLUGIN_",
)
"""Beginnings of variables that other parts of LMCache read and that aren't options here."""

ENGINE_KEYS = frozenset(
    {
        "lmcache_rpc_port",
        "use_native",
        "skip_last_n_tokens",
        "use_layerwise",
    }
)
"""Keys of an engine's extra configuration that are read by the engine itself, or by LMCache's
adapter for it, and are never options here."""

ENGINE_PREFIXES = ("mp.", "q.")
"""``lmcache.mp.…``: how to reach and drive LMCache's server process, which we don't need."""
