"""Addresses and options, as users write them."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from lmcache_backend_redis.config import Address, Form, RedisConfig, parse_address
from lmcache_core.config import load_config
from lmcache_core.errors import ConfigError
from lmcache_core.plugins.manager import Plugins

LOCAL = ("localhost", 6379)


@pytest.fixture(scope="module")
def plugins() -> Plugins:
    return Plugins(environ={})


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("redis://localhost:6379", Address(Form.SINGLE, (LOCAL,))),
        ("redis://localhost", Address(Form.SINGLE, (LOCAL,))),
        ("REDIS://localhost/", Address(Form.SINGLE, (LOCAL,))),
        ("resp://localhost:1", Address(Form.SINGLE, (("localhost", 1),))),
        ("valkey://localhost/3", Address(Form.SINGLE, (LOCAL,), database=3)),
        ("redis://[::1]:7/2", Address(Form.SINGLE, (("::1", 7),), database=2)),
        ("rediss://localhost", Address(Form.SINGLE, (LOCAL,), tls=True)),
        ("unix:///run/redis.sock", Address(Form.UNIX, path="/run/redis.sock")),
        (
            "redis-sentinel://a:26379,b,[::2]:5/1",
            Address(Form.SENTINEL, (("a", 26379), ("b", 26379), ("::2", 5)), database=1),
        ),
        ("redis-cluster://a:7000,b", Address(Form.CLUSTER, (("a", 7000), ("b", 6379)))),
    ],
)
def test_addresses(url: str, expected: Address) -> None:
    assert parse_address(url) == expected
    assert RedisConfig(url=url).address == expected


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("http://h", "isn't an address of Redis"),
        ("localhost:6379", "isn't an address of Redis"),
        ("redis://", "names no host"),
        ("redis://h:0", "port 0"),
        ("redis://h:65536", "port 65536"),
        ("redis://h:x", "'h:x' where HOST:PORT belongs"),
        ("redis://h/main", "'main' where the number of a database belongs"),
        ("redis://a,b", "several hosts"),
        ("redis-sentinel://a,,b", "names no host"),
        ("unix://run/redis.sock", "names no socket"),
        ("redis-cluster://a/1", "database 0 only"),
        ("redis://user@h", "without a password"),
        ("redis://h?ttl_s", "name=value"),
        ("redis://h?ttl_s=1&ttl_s=2", "twice"),
        ("redis://h?url=redis://i", "another url"),
        ("redis://h?nonsense=1", "nonsense"),
        ("redis://h?ttl_s=0", "greater than or equal to 1"),
        ("redis://h?replica_reads=yes", "replica_reads needs"),
        ("unix:///s?tls=yes", "no TLS"),
    ],
)
def test_mistakes_in_addresses(url: str, said: str) -> None:
    with pytest.raises(ValidationError) as caught:
        RedisConfig(url=url)
    assert said in str(caught.value)


def test_user_and_password_leave_the_address() -> None:
    config = RedisConfig(url="redis://us%40er:p%40ss:/w@h:1/2?timeout_s=0.5")
    assert (config.username, config.timeout_s) == ("us@er", 0.5)
    assert config.password is not None
    assert config.password.get_secret_value() == "p@ss:/w"
    assert config.url == "redis://h:1/2"
    assert "p@ss" not in repr(config)


def test_options_beside_the_address_win() -> None:
    config = RedisConfig.model_validate(
        {"url": "redis://:old@h/1?service=s", "password": "new", "database": 4, "service": "t"}
    )
    assert config.password is not None
    assert config.password.get_secret_value() == "new"
    assert (config.address.database, config.service) == (4, "t")


GUIDE = [
    "redis://your-redis-host:6379",
    "redis://localhost:6379",
    "redis-sentinel://localhost:26379,localhost:26380,localhost:26381",
]


@pytest.mark.parametrize("url", GUIDE)
def test_the_guides_file(plugins: Plugins, tmp_path: Path, url: str) -> None:
    file = tmp_path / "redis.yaml"
    file.write_text(f'chunk_size: 256\nremote_url: "{url}"\nremote_serde: "naive"\n')
    (section,) = load_config(plugins, file=file, environ={}).backends
    assert (section.type, section.serde, section.options.url) == ("redis", "naive", url)


@pytest.mark.parametrize("url", GUIDE)
def test_the_guides_variables(plugins: Plugins, url: str) -> None:
    environ = {
        "LMCACHE_CHUNK_SIZE": "256",
        "LMCACHE_REMOTE_URL": url,
        "LMCACHE_REMOTE_SERDE": "naive",
    }
    (section,) = load_config(plugins, environ=environ).backends
    assert (section.type, section.options.url) == ("redis", url)


def test_lmcaches_own_options(plugins: Plugins) -> None:
    extra = {"valkey_username": "u", "valkey_password": "s3cret", "valkey_ttl_sec": 60}
    config = load_config(
        plugins,
        environ={},
        engine=("vLLM", {"lmcache.remote_url": "valkey://h", "lmcache.extra_config": extra}),
    )
    (section,) = config.backends
    assert (section.options.username, section.options.ttl_s) == ("u", 60)
    assert section.options.password.get_secret_value() == "s3cret"


@pytest.mark.parametrize(
    "url",
    ["redis://:s3cret@h:x", "redis://:s3cret@h?foo=1", "redis://:s3c?ret@h", "redis://s3cret@h"],
)
def test_no_message_shows_a_password(plugins: Plugins, url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(plugins, environ={"LMCACHE_REMOTE_URL": url})
    assert "s3c" not in str(caught.value)
    assert "remote_url" in str(caught.value) or "REMOTE_URL" in str(caught.value)


def test_a_sentinel_address_may_end_with_the_service(monkeypatch: pytest.MonkeyPatch) -> None:
    """As LMCache writes it; the variable is LMCache's, too."""
    monkeypatch.setenv("REDIS_SERVICE_NAME", "of-the-environment")
    named = RedisConfig(url="redis-sentinel://me:pw@a:26379,b/cache%201")
    assert named.service == "cache 1"
    assert named.address == Address(Form.SENTINEL, (("a", 26379), ("b", 26379)))
    assert RedisConfig(url="redis-sentinel://a").service == "of-the-environment"
    assert RedisConfig(url="redis-sentinel://a?service=asked").service == "asked"
    assert RedisConfig(url="redis-sentinel://a/path?service=asked").service == "asked"
    monkeypatch.delenv("REDIS_SERVICE_NAME")
    assert RedisConfig(url="redis-sentinel://a/2").service == "mymaster"


def test_valkey_mode_makes_a_cluster_of_an_address(plugins: Plugins, tmp_path: Path) -> None:
    file = tmp_path / "lmcache.yaml"
    file.write_text('remote_url: "valkey://a:7000"\nextra_config: {valkey_mode: cluster}\n')
    (section,) = load_config(plugins, file=file, environ={}).backends
    assert isinstance(section.options, RedisConfig)
    assert section.options.address == Address(Form.CLUSTER, (("a", 7000),))
    assert RedisConfig(url="valkey://a", mode="standalone").address.form is Form.SINGLE
    with pytest.raises(ValidationError, match="write redis:// for one server"):
        RedisConfig(url="redis-cluster://a", mode="standalone")
    with pytest.raises(ValidationError, match="isn't a cluster; write redis-cluster://"):
        RedisConfig(url="unix:///run/redis.sock", mode="cluster")
    with pytest.raises(ValidationError, match="database 0 only"):
        RedisConfig(url="valkey://a/1", mode="cluster")
