"""Addresses, the guide's keys, Mooncake's own file, and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from lmcache_backend_mooncake import machine
from lmcache_backend_mooncake.config import PATH_VARIABLE, MooncakeConfig
from lmcache_core.config import load_config
from lmcache_core.errors import ConfigError
from lmcache_core.plugins.manager import Plugins

GIB = 1 << 30
MIXED = """
chunk_size: 16
save_unfull_chunk: true
local_cpu: False
remote_url: "mooncakestore://localhost:50051/"
max_local_cpu_size: 2
numa_mode: null
pre_caching_hash_algorithm: sha256_cbor_64bit
extra_config:
  use_exists_sync: true
  save_chunk_meta: False
  local_hostname: "localhost"
  metadata_server: "http://localhost:8080/metadata"
  protocol: "tcp"
  device_name: ""
  global_segment_size: 21474836480
  master_server_address: "localhost:50051"
  local_buffer_size: 0
  mooncake_prefer_local_alloc: true
"""
"""As in the deployment guide, section 4.3.3."""
DECODER = """
chunk_size: 16
remote_url: "mooncakestore://mooncake-master:50052/"
remote_serde: "naive"
local_cpu: False
max_local_cpu_size: 2
numa_mode: null
extra_config:
  local_hostname: "decoder"
  metadata_server: "http://mooncake-master:8080/metadata"
  protocol: "tcp"
  device_name: ""
  master_server_address: "mooncake-master:50052"
  global_segment_size: 32212254720
  local_buffer_size: 1073741824
  transfer_timeout: 1
  save_chunk_meta: False
"""
"""Section 7.2; the prefiller's differs in the name only."""


def config(**options: Any) -> MooncakeConfig:
    return MooncakeConfig.model_validate(options)


def loaded(text: str, tmp_path: Path) -> Any:
    path = tmp_path / "lmcache.yaml"
    path.write_text(text)
    return load_config(environ={"LMCACHE_CONFIG_FILE": str(path)}, plugins=Plugins())


@pytest.fixture(autouse=True)
def no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PATH_VARIABLE, raising=False)


def test_the_guide_s_configuration(tmp_path: Path) -> None:
    found = loaded(MIXED, tmp_path)
    (section,) = found.backends
    assert section.type == "mooncake"
    assert section.isolated
    options = section.options
    assert options.master_server_address == "localhost:50051"
    assert options.metadata_server == "http://localhost:8080/metadata"
    assert options.local_hostname == "localhost"
    assert options.global_segment_size == 20 * GIB
    assert options.local_buffer_size == 0
    assert options.prefer_local_alloc
    told = "\n".join(found.notices)
    for key in ("use_exists_sync", "save_chunk_meta", "pre_caching_hash_algorithm"):
        assert key in told
    assert "no installed plugin reads" not in told


@pytest.mark.parametrize("name", ["decoder", "prefiller"])
def test_the_guide_s_compose_configuration(tmp_path: Path, name: str) -> None:
    found = loaded(DECODER.replace('"decoder"', f'"{name}"'), tmp_path)
    options = found.backends[0].options
    assert options.local_hostname == name
    assert options.global_segment_size == 30 * GIB
    assert options.local_buffer_size == GIB
    assert options.transfer_timeout == 1
    assert "no installed plugin reads" not in "\n".join(found.notices)


def test_the_newer_names_of_the_keys(tmp_path: Path) -> None:
    text = """
remote_url: "mooncakestore://m:1/?device=mlx5_0"
extra_config: {mooncake_metadata_server: P2PHANDSHAKE, mooncake_global_segment_size: 2gb}
"""
    options = loaded(text, tmp_path).backends[0].options
    assert (options.master_server_address, options.device_name) == ("m:1", "mlx5_0")
    assert options.global_segment_size == 2 * GIB


def test_what_is_written_and_read_again_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process of its own gets the options so, and must not need the file any more."""
    path = tmp_path / "mooncake.json"
    path.write_text(json.dumps({"master_server_address": "m:1", "global_segment_size": "1GB"}))
    monkeypatch.setenv(PATH_VARIABLE, str(path))
    once = config()
    path.unlink()
    assert config(**json.loads(once.model_dump_json())) == once


def test_mooncake_s_own_file_fills_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "mooncake.json"
    file = {
        "local_hostname": "node1",
        "metadata_server": "http://m:8080/metadata",
        "master_server_address": "file:1",
        "global_segment_size": "3.5GB",
        "protocol": "TCP",
        "device_name": "",
        "tenant_id": "default",
        "enable_client_http_server": False,
    }
    path.write_text(json.dumps(file))
    monkeypatch.setenv(PATH_VARIABLE, str(path))
    found = config(url="mooncakestore://url:2/", local_hostname="here")
    assert found.master_server_address == "url:2"
    assert found.local_hostname == "here"
    assert found.metadata_server == "http://m:8080/metadata"
    assert found.global_segment_size == 3.5 * GIB
    assert found.protocol == "tcp"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "can't be read: No such file"),
        ("{", "isn't JSON"),
        ("[" * 100_000, "isn't JSON"),
        ("[]", "isn't a JSON object"),
        ('{"master_server_address": "m:1", "tenant_id": "a"}', "tenants aren't available"),
    ],
)
def test_a_file_that_is_no_use(tmp_path: Path, content: str | None, said: str) -> None:
    path = tmp_path / "mooncake.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValidationError, match=said):
        config(config_path=path)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "no master"),
        ({"url": "mooncakestore://"}, "isn't HOST:PORT"),
        ({"url": "mooncakestore://host"}, "isn't HOST:PORT"),
        ({"url": "mooncakestore://host:0/"}, "isn't HOST:PORT"),
        ({"url": "mooncakestore://h:1/path"}, "has a path"),
        ({"url": "mooncakestore://h:1/?devcie=a"}, r"only \?device=NAME"),
        ({"url": "redis://h:1"}, "isn't mooncakestore://"),
        ({"master_server_address": "m:1", "protocol": "rmda"}, "isn't one of tcp, rdma"),
        ({"master_server_address": "m:1", "global_segment_size": "20 parrots"}, "isn't a size"),
        ({"master_server_address": "m:1", "global_segment_size": -1}, "greater than or equal"),
        ({"master_server_address": "m:1", "transfer_timeout": 0}, "greater than or equal"),
        ({"master_server_address": "m:1", "local_hostnmae": "x"}, "Extra inputs"),
    ],
)
def test_bad_options(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        config(**options)


def test_a_mistake_names_its_place(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"transfer_timeout[\s\S]*extra_config"):
        loaded(DECODER.replace("transfer_timeout: 1", "transfer_timeout: -1"), tmp_path)


def test_empty_text_is_as_good_as_nothing() -> None:
    found = config(url="mooncakestore://m:1", master_server_address="", storage_root_dir="")
    assert found.master_server_address == "m:1"
    assert found.storage_root_dir is None


def test_memory_is_what_is_left_here_or_in_the_container(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 100 kB\nMemAvailable: 50 kB\n")
    group = tmp_path / "group"
    assert machine.available_bytes(meminfo, group) == 50 * 1024
    group.mkdir()
    (group / "memory.stat").write_text("anon 1\ninactive_file 1000\n")
    (group / "memory.current").write_text("11000\n")
    (group / "memory.max").write_text("max\n")
    assert machine.available_bytes(meminfo, group) == 50 * 1024
    (group / "memory.max").write_text("30000\n")
    assert machine.available_bytes(meminfo, group) == 20000
    assert machine.available_bytes(tmp_path / "none", tmp_path / "none") is None


def test_an_address_that_others_cannot_use_is_not_bound() -> None:
    assert machine.address_of("localhost") == "127.0.0.1"
    assert machine.address_of("127.0.0.1") == "127.0.0.1"
    assert machine.address_of("192.0.2.1") is None  # nobody's: reserved for documentation
    assert machine.address_towards("127.0.0.1", 1) == "127.0.0.1"


def test_a_missing_library_says_what_to_install(tmp_path: Path) -> None:
    """In a fresh interpreter whose ``mooncake`` can't be found, or lacks a shared library."""
    code = """
import sys
sys.modules["mooncake"] = None
from lmcache_backend_mooncake.plugin import lmcache_storage_backends
from lmcache_backend_mooncake.config import MooncakeConfig
assert not [name for name in sys.modules if name.startswith("mooncake.")]
(descriptor,) = lmcache_storage_backends()
try:
    descriptor.create(MooncakeConfig(master_server_address="localhost:1"))
except Exception as error:
    print(type(error).__name__, error)
"""
    run = [sys.executable, "-c", code]
    told = subprocess.run(run, capture_output=True, text=True, check=True).stdout
    assert told.startswith("BackendRejected")
    assert "pip install mooncake-transfer-engine-non-cuda" in told
    package = tmp_path / "mooncake"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "store.py").write_text('raise ImportError("libibverbs.so.1: cannot open")')
    code = code.replace('sys.modules["mooncake"] = None', "")
    run = [sys.executable, "-c", code]
    environ = {**os.environ, "PYTHONPATH": str(tmp_path)}
    told = subprocess.run(run, capture_output=True, text=True, check=True, env=environ).stdout
    assert "apt-get install libibverbs1 libnuma1 libcurl4" in told
