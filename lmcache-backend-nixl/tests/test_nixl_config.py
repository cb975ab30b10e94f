"""Options of the nixl backend: the deployment guide's files as they are, and what is refused."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from lmcache_backend_nixl import plugin
from lmcache_backend_nixl.config import NixlConfig
from lmcache_core.config import load_config
from lmcache_core.errors import BackendRejected, ConfigError
from lmcache_core.plugins.manager import Plugins

POSIX = """\
chunk_size: 256
nixl_buffer_size: 1073741824 # 1GB
nixl_buffer_device: cpu
extra_config:
  enable_nixl_storage: true
  nixl_backend: POSIX
  nixl_pool_size: 64
  nixl_path: /mnt/nixl/cache/
  use_direct_io: True
"""
OBJ = """\
chunk_size: 256
nixl_buffer_size: 1073741824 # 1GB
nixl_buffer_device: cpu
extra_config:
  enable_nixl_storage: true
  nixl_backend: OBJ
  nixl_pool_size: 64
  nixl_path: /mnt/nixl/cache/
  nixl_backend_params:
    access_key: <your_access_key>
    secret_key: <your_secret_key>
    bucket: <your_bucket>
    region: <your_region>
"""


def loaded(tmp_path: Path, text: str) -> tuple[NixlConfig, tuple[str, ...]]:
    file = tmp_path / "lmcache.yaml"
    file.write_text(text)
    config = load_config(Plugins(environ={}), file=file, environ={})
    (section,) = config.backends
    assert isinstance(section.options, NixlConfig)
    return section.options, tuple(config.notices)


def test_the_guides_posix_file(tmp_path: Path) -> None:
    config, notices = loaded(tmp_path, POSIX)
    assert notices == ()
    assert config.model_dump(exclude_unset=True) == {
        "backend": "POSIX",
        "path": Path("/mnt/nixl/cache"),
        "pool_size": 64,
        "buffer_bytes": 1 << 30,
        "buffer_device": "cpu",
        "direct_io": True,
    }
    assert config.notices() == []


def test_the_guides_object_file(tmp_path: Path) -> None:
    config, notices = loaded(tmp_path, OBJ)
    assert notices == ()
    assert (config.backend, config.pool_size, config.buffer_bytes) == ("OBJ", 64, 1 << 30)
    assert config.params() == {
        name: f"<your_{name}>" for name in ("access_key", "secret_key", "bucket", "region")
    }
    assert "your_secret_key" not in str(config)
    (notice,) = config.notices()
    assert notice.startswith("path has no effect")


@pytest.mark.parametrize("backend", ["POSIX", "HF3FS", "OBJ"])
def test_only_gds_has_buffers_on_a_device(tmp_path: Path, backend: str) -> None:
    text = POSIX.replace("device: cpu", "device: cuda").replace("POSIX", backend)
    with pytest.raises(ConfigError, match=rf"nixl_buffer_device\) is 'cuda', and {backend}"):
        loaded(tmp_path, text)


@pytest.mark.parametrize("backend", ["GDS", "GDS_MT"])
def test_a_buffer_on_a_device_is_accepted_with_a_notice(tmp_path: Path, backend: str) -> None:
    text = POSIX.replace("device: cpu", "device: cuda").replace("POSIX", backend)
    config, _ = loaded(tmp_path, text)
    (notice,) = config.notices()
    assert "buffer_device 'cuda' has no effect" in notice


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (("nixl_backend: POSIX", "nixl_backend: POSSIX"), "POSSIX"),
        (("nixl_backend: POSIX", ""), "backend"),
        (("  nixl_path: /mnt/nixl/cache/\n", ""), r"nixl_path\) is missing"),
        (("size: 64", "size: 0"), "extra_config.nixl_pool_size"),
        (("size: 1073741824", "size: lots"), "nixl_buffer_size"),
        (("use_direct_io: True", "use_direct_io: perhaps"), "extra_config.use_direct_io"),
    ],
)
def test_wrong_values_are_refused(tmp_path: Path, changed: tuple[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        loaded(tmp_path, POSIX.replace(*changed))


def test_parameters_become_texts() -> None:
    params: Any = {"use_uring": True, "kernel_queue_size": 64}
    config = NixlConfig(backend="POSIX", path=Path("/x"), backend_params=params)
    assert config.params() == {"use_uring": "true", "kernel_queue_size": "64"}


@pytest.mark.parametrize(
    ("options", "ways"),
    [
        ({}, [{"use_uring": "true"}, {}]),
        (
            {"backend_params": {"kernel_queue_size": 64}},
            [{"kernel_queue_size": "64", "use_uring": "true"}, {"kernel_queue_size": "64"}],
        ),
        ({"backend_params": {"use_aio": True}}, [{"use_aio": "true"}]),
        ({"backend_params": {"use_uring": False}}, [{"use_uring": "false"}]),
        ({"direct_io": True}, [{}]),
        ({"backend": "GDS"}, [{}]),
    ],
)
def test_io_uring_comes_first_where_nobody_chose(
    options: dict[str, Any], ways: list[dict[str, str]]
) -> None:
    config = NixlConfig.model_validate({"backend": "POSIX", "path": "/x", **options})
    assert config.ways() == ways


def test_it_is_off_unless_it_is_switched_on(tmp_path: Path) -> None:
    data = yaml.safe_load(POSIX)
    data["extra_config"]["enable_nixl_storage"] = False
    file = tmp_path / "off.yaml"
    file.write_text(yaml.safe_dump(data))
    config = load_config(Plugins(environ={}), file=file, environ={})
    assert config.backends == ()
    assert any("nixl_path" in notice for notice in config.notices)


def test_without_nixl_the_error_is_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugin, "find_spec", lambda name: None)
    (descriptor,) = plugin.lmcache_storage_backends()
    config = NixlConfig(backend="POSIX", path=Path("/x"))
    with pytest.raises(BackendRejected, match="pip install --no-deps nixl nixl-cu12"):
        descriptor.create(config)


def test_the_plugin_imports_no_client() -> None:
    import subprocess

    code = (
        "import sys, lmcache_backend_nixl.plugin as p; p.lmcache_storage_backends();"
        "print([m for m in ('nixl', 'numpy', 'torch') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"
