"""Layers, precedence, and how mistakes are told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from lmcache_core.config import BackendSection, Config, CoreConfig, load_config
from lmcache_core.errors import ConfigError, PluginLoadError
from lmcache_core.plugins.manager import Plugins
from lmcache_core.redaction import without_passwords_in

MakeDistribution = Callable[..., str]

TOY = """
@hookimpl
def lmcache_storage_backends():
    return [backend("toy", url_schemes=("toy",), config_from_url=from_url)]
"""


@pytest.fixture
def plugins(distribution: MakeDistribution) -> Plugins:
    distribution("lmcache-toy", TOY)
    return Plugins(environ={})


@pytest.fixture
def file(tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        path = tmp_path / "lmcache.yaml"
        path.write_text(text)
        return path

    return write


WriteFile = Callable[[str], Path]


def load(plugins: Plugins, *assignments: str, **more: Any) -> Config:
    return load_config(plugins, environ=more.pop("environ", {}), assignments=assignments, **more)


def refusal(plugins: Plugins, *assignments: str, **more: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        load(plugins, *assignments, **more)
    return str(caught.value)


# -- layers --------------------------------------------------------------------------------


def test_nothing_configured_is_the_defaults(plugins: Plugins) -> None:
    config = load(plugins)
    assert config.core == CoreConfig()
    assert config.backends == ()
    assert config.notices == ()
    assert set(config.origins.values()) == {"default"}


def test_each_layer_is_stronger_than_the_one_before(plugins: Plugins, file: WriteFile) -> None:
    path = file("chunk_size: 1\n")
    environ = {"LMCACHE_CONFIG_FILE": str(path)}
    seen = [load(plugins)]
    seen.append(load(plugins, environ=environ))
    environ["LMCACHE_CHUNK_SIZE"] = "2"
    seen.append(load(plugins, environ=environ))
    engine = ("vLLM", {"lmcache.chunk_size": 3})
    seen.append(load(plugins, environ=environ, engine=engine))
    seen.append(load(plugins, "chunk_size=4", environ=environ, engine=engine))
    assert [c.core.chunk_size for c in seen] == [256, 1, 2, 3, 4]
    assert [c.origins["chunk_size"] for c in seen] == [
        "default",
        "lmcache.yaml line 1",
        "environment LMCACHE_CHUNK_SIZE",
        "vLLM extra config lmcache.chunk_size",
        "--set chunk_size",
    ]


def test_a_file_that_is_passed_replaces_that_of_the_variable(
    plugins: Plugins, file: WriteFile, tmp_path: Path
) -> None:
    environ = {"LMCACHE_CONFIG_FILE": str(tmp_path / "not there")}
    assert load(plugins, environ=environ, file=file("chunk_size: 8")).core.chunk_size == 8


def test_a_json_file_is_read(plugins: Plugins, tmp_path: Path) -> None:
    path = tmp_path / "lmcache.json"
    path.write_text('{\n\t"chunk_size": 8\n}')
    config = load(plugins, file=path)
    assert config.core.chunk_size == 8
    assert config.origins["chunk_size"] == "lmcache.json line 2"


@pytest.mark.parametrize("text", ["", "# nothing\n", "{}"])
def test_an_empty_file_is_fine(text: str, plugins: Plugins, file: WriteFile) -> None:
    assert load(plugins, file=file(text)).core == CoreConfig()


def test_sections_of_several_layers_are_merged_option_by_option(
    plugins: Plugins, file: WriteFile
) -> None:
    path = file("backends:\n  toy:\n    host: file\n    port: 5\n  memory:\n")
    config = load(
        plugins,
        file=path,
        environ={"LMCACHE_BACKENDS__TOY__HOST": "env", "LMCACHE_BACKENDS__TOY__DEADLINE_S": "2"},
    )
    toy, memory = config.backends
    assert isinstance(toy, BackendSection)
    assert (toy.name, toy.type, toy.deadline_s, toy.serde) == ("toy", "toy", 2.0, None)
    assert toy.options.model_dump(include={"host", "port"}) == {"host": "env", "port": 5}
    assert memory.name == "memory"
    origins = config.origins
    assert origins["backends.toy.port"] == "lmcache.yaml line 4"
    assert origins["backends.toy.host"] == "environment LMCACHE_BACKENDS__TOY__HOST"
    assert origins["backends.toy.password"] == "default"
    assert origins["backends.toy.serde"] == "serde"
    assert origins["backends.memory.deadline_s"] == "blocking_timeout_secs"


def test_the_order_of_tiers_is_that_of_the_file_whatever_overrides_it(
    plugins: Plugins, file: WriteFile
) -> None:
    path = file("backends:\n  b: {type: toy}\n  a: {type: toy}\n")
    environ = {"LMCACHE_BACKENDS__A__PORT": "1", "LMCACHE_BACKENDS__C__TYPE": "toy"}
    assert [s.name for s in load(plugins, file=path, environ=environ).backends] == ["b", "a", "c"]


def test_a_mapping_over_a_scalar_and_back(plugins: Plugins, file: WriteFile) -> None:
    path = file("backends: wrong\n")
    config = load(plugins, "backends.toy.port=1", file=path)
    assert [s.name for s in config.backends] == ["toy"]
    message = refusal(plugins, "backends=wrong", file=file("backends: {toy: }\n"))
    assert "backends = 'wrong' (--set backends)" in message


def test_yaml_anchors_and_merges_keep_their_lines(plugins: Plugins, file: WriteFile) -> None:
    path = file(
        "backends:\n  one: &one\n    type: toy\n    port: 1\n  two:\n    port: 2\n    <<: *one\n"
    )
    config = load(plugins, file=path)
    assert [s.options.model_dump()["port"] for s in config.backends] == [1, 2]
    assert config.origins["backends.two.port"] == "lmcache.yaml line 6"


@pytest.mark.parametrize(
    ("text", "expected"),
    [("0123", "0123"), ("12:30", "12:30"), ("yes", "yes"), ("2024-01-01", "2024-01-01")],
)
def test_shell_text_is_not_reinterpreted(text: str, expected: str, plugins: Plugins) -> None:
    config = load(plugins, environ={"LMCACHE_BACKENDS__TOY__PASSWORD": text})
    (section,) = config.backends
    assert section.options.model_dump()["password"].get_secret_value() == expected


@pytest.mark.parametrize(("text", "expected"), [("true", True), ("False", False), ("1", True)])
def test_shell_text_becomes_what_the_option_is(text: str, expected: bool, plugins: Plugins) -> None:
    assert load(plugins, environ={"LMCACHE_USE_LAYERWISE": text}).core.use_layerwise is expected


def test_a_whole_section_fits_into_a_variable(plugins: Plugins) -> None:
    environ = {"LMCACHE_BACKENDS": "{toy: {port: 7}}"}
    config = load(plugins, environ=environ)
    assert config.origins["backends.toy.port"] == "environment LMCACHE_BACKENDS"
    assert config.backends[0].options.model_dump()["port"] == 7


@pytest.mark.parametrize("text", ["{a: !!int ''}", "[2001-13-01]", "[" * 2000, "{a"])
def test_shell_text_that_only_looks_like_yaml_stays_text(text: str, plugins: Plugins) -> None:
    assert load(plugins, environ={"LMCACHE_EXTRA_CONFIG__A": text})


def test_an_empty_variable_is_not_set(plugins: Plugins) -> None:
    assert load(plugins, environ={"LMCACHE_CHUNK_SIZE": "", "LMCACHE_CONFIG_FILE": ""}).core


# -- files that can't be read --------------------------------------------------------------

REPEATED = "  a0: &a0 [1]\n" + "".join(
    f"  a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 7)
)
"""Short, and more than half a million entries."""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("chunk_size: [1", "isn't valid YAML"),
        ("- chunk_size", "must hold a mapping"),
        ("just text", "must hold a mapping"),
        ("a: &a\n  b: *a\n", "contains itself"),
        ("chunk_size: !!python/object:os.system {}\n", "isn't valid YAML"),
        ("? [a]\n: 1\n", "isn't valid YAML"),
        ("a: 1\n---\nb: 2\n", "isn't valid YAML"),
        ("a: !!int ''\n", "isn't valid YAML"),
        ("a: !!bool perhaps\n", "isn't valid YAML"),
        ("a: !!timestamp then\n", "isn't valid YAML"),
        ("a: 2001-13-01\n", "isn't valid YAML"),
        ("a: " + "[" * 2000 + "]" * 2000, "isn't valid YAML"),
        ("extra_config:\n" + REPEATED, "more than 100,000 entries"),
    ],
)
def test_a_file_that_is_wrong_is_named(
    text: str, expected: str, plugins: Plugins, file: WriteFile
) -> None:
    message = refusal(plugins, file=file(text))
    assert "lmcache.yaml" in message
    assert expected in message


def test_a_file_that_is_not_there_names_who_asked_for_it(plugins: Plugins, tmp_path: Path) -> None:
    gone = str(tmp_path / "gone.yaml")
    message = refusal(plugins, environ={"LMCACHE_CONFIG_FILE": gone})
    assert f"can't read the configuration file {gone} (LMCACHE_CONFIG_FILE)" in message
    assert "No such file" in message
    assert "Is a directory" in refusal(plugins, file=tmp_path)


def test_bytes_that_are_no_text_are_refused(plugins: Plugins, tmp_path: Path) -> None:
    path = tmp_path / "binary.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    assert "binary.yaml" in refusal(plugins, file=path)


def test_a_key_that_stands_there_twice_is_a_mistake(plugins: Plugins, file: WriteFile) -> None:
    text = "chunk_size: 8\nbackends:\n  toy: {port: 1, port: 2}\nchunk_size: 16\n"
    message = refusal(plugins, file=file(text))
    assert "chunk_size (lmcache.yaml line 4)\n      is there already in line 1" in message
    assert "backends.toy.port (lmcache.yaml line 3)\n      is there already in line 3" in message


# -- mistakes ------------------------------------------------------------------------------


def test_all_mistakes_are_told_together_each_with_its_origin(
    plugins: Plugins, file: WriteFile
) -> None:
    path = file("chunk_size: -1\nlocal_cpu_: true\nbackends:\n  toy:\n    prot: 5\n")
    message = refusal(
        plugins,
        "max_local_cpu_size=lots",
        "nonsense",
        file=path,
        environ={"LMCACHE_CACHE_POLICY": "random", "LMCACHE_ENABLE_P2P": "true"},
        engine=("vLLM", {"lmcache.serde": "zip"}),
    )
    assert message.startswith("8 problems in the LMCache configuration:")
    for expected in (
        "chunk_size = -1 (lmcache.yaml line 1)\n      Input should be greater than 0",
        "local_cpu_ (lmcache.yaml line 2)\n      no such option; did you mean 'local_cpu'?",
        "backends.toy.prot (lmcache.yaml line 5)\n      no such option; did you mean 'port'?",
        "max_local_cpu_size = 'lots' (--set max_local_cpu_size)",
        "--set nonsense\n      write it as --set KEY=VALUE",
        "enable_p2p = 'true' (environment LMCACHE_ENABLE_P2P)",
    ):
        assert expected in message
    assert "cache_policy = 'random' (environment LMCACHE_CACHE_POLICY)" in message
    assert "serde = 'zip' (vLLM extra config lmcache.serde)" in message


@pytest.mark.parametrize(
    ("assignment", "text"),
    [
        ("chunk_size=0", "greater than 0"),
        ("chunk_size=2.5", "integer"),
        ("max_local_cpu_size=0", "greater than 0"),
        ("max_local_cpu_size=inf", "finite"),
        ("max_local_cpu_size=nan", "finite"),
        ("min_retrieve_tokens=-1", "greater than or equal to 0"),
        ("blocking_timeout_secs=0", "greater than 0"),
        ("store_queue_chunks=0", "greater than 0"),
        ("numa_mode=sideways", "'auto'"),
        ("numa_mode=manual", "isn't available in this version"),
        ("local_cpu=perhaps", "boolean"),
        ("backends.toy.deadline_s=-1", "greater than 0"),
        ("backends.toy.serde=zip", "no installed plugin provides the serde 'zip'"),
        ("engine_connector=none-such", "no installed plugin provides the engine connector"),
        ("backends.valkyrie.url=valkyrie://h", "the storage backend 'valkyrie'"),
        ("backends.x.type=valkyrie", "the storage backend 'valkyrie'"),
        ("backends.x.type=infinstore", "did you mean 'infinistore'?"),
        ("backends.toy=7", "must be a mapping of options"),
        ("backends=[toy]", "must be a mapping from a name"),
        ("backends.a/b.type=toy", "isn't a name"),
        ("local_cpu=false", "nothing would be cached"),
        ("no.such.thing=1", "no such option"),
        ("chunk_size.deep=1", "integer"),
        ("=1", "write it as"),
        ("a..b=1", "write it as"),
    ],
)
def test_wrong_values_are_refused(assignment: str, text: str, plugins: Plugins) -> None:
    message = refusal(plugins, assignment)
    assert message.startswith("1 problem in")
    assert text in message


@pytest.mark.parametrize("key", ["chunk_size", "max_local_cpu_size", "cache_policy"])
def test_true_is_not_a_number(key: str, plugins: Plugins, file: WriteFile) -> None:
    assert f"{key} = True" in refusal(plugins, file=file(f"{key}: yes\n"))


def test_local_cpu_false_is_fine_with_a_backend(plugins: Plugins) -> None:
    assert not load(plugins, "local_cpu=false", "backends.toy.port=1").core.local_cpu


def test_a_policy_gets_its_proper_name(plugins: Plugins) -> None:
    assert load(plugins, "cache_policy=lfu").core.cache_policy == "LFU"


def test_a_chain_of_serdes_is_checked_link_by_link(plugins: Plugins) -> None:
    assert load(plugins, "serde=raw+naive").core.serde == "raw+naive"
    assert "'zip'" in refusal(plugins, "serde=raw+zip")


def test_a_broken_plugin_that_is_named_is_a_mistake_and_unused_is_not(
    distribution: MakeDistribution,
) -> None:
    distribution("lmcache-backend-broken", "import a_module_that_nobody_has", version="3.1")
    plugins = Plugins(environ={})
    assert load(plugins).core
    with pytest.raises(ConfigError) as caught:
        load(plugins, "backends.broken.x=1")
    for part in ("--set backends.broken.x", "lmcache-backend-broken 3.1", "a_module_that_nobody"):
        assert part in str(caught.value)
    assert isinstance(caught.value.__cause__, PluginLoadError)


def test_a_conflict_is_a_mistake_only_of_who_uses_the_name(
    distribution: MakeDistribution,
) -> None:
    distribution("lmcache-toy", TOY)
    distribution("other-toy", TOY)
    plugins = Plugins(environ={})
    assert load(plugins).core
    assert "other-toy" in refusal(plugins, "backends.toy.port=1")


# -- secrets -------------------------------------------------------------------------------


def test_secrets_are_in_no_message(plugins: Plugins) -> None:
    message = refusal(
        plugins,
        "backends.toy.password=[hunter2]",
        "backends.toy.passwrd=hunter2",
        "backends.toy.port=toy://me:hunter2@h",
    )
    assert "hunter2" not in message
    assert "did you mean 'password'?" in message


URLS = (
    "lm://{}@cache:1",
    "lm://{}:x@cache:1",
    "lm://x:{}@cache:1",
    "lm://x:a/{}@cache:1",
    "lm://cache:1?token={}",
    "lm://cache:1?connections=4&token={}",
    "lm://cache:1?connections=4&tokn={}",
    "lm://cache:1/path?tokn={}",
    "lm://cache:1?connections=no&x=a@{}@",
    "lm+unix:///run/s?token={}&same_host=perhaps",
    "toy://me:{}@h",
    "toy://me:x {}@h",
    "other://me:{}@h?password={}",
    "{}@h",
)


@pytest.mark.parametrize("url", URLS)
def test_a_token_in_an_address_is_in_no_message(plugins: Plugins, url: str) -> None:
    """Whatever is wrong with it, and whichever backend says so."""
    message = refusal(plugins, f"remote_url={url.format('hunter2', 'hunter2')}", "chunk_size=0")
    assert "remote" in message or "chunk_size" in message
    assert "hunter2" not in message


def test_a_quoted_part_of_an_address_is_hidden_too() -> None:
    said = (
        "'me:hunter2@h:1' isn't HOST:PORT; see redis://me:hunter2@h/0?auth=hunter2 and 'lm://h:1'"
    )
    hidden = without_passwords_in(said)
    assert hidden == "'***@h:1' isn't HOST:PORT; see redis://***@h/0?auth=*** and 'lm://h:1'"
    assert without_passwords_in("a token is needed; lm://h:1 says so") == (
        "a token is needed; lm://h:1 says so"
    )


def test_secrets_are_hidden_in_rows(plugins: Plugins) -> None:
    config = load(plugins, "backends.toy.password=hunter2", "backends.toy.host=x://me:hunter2@h")
    rows = {name: value for name, value, _ in config.rows()}
    assert rows["backends.toy.password"] == "***"
    assert rows["backends.toy.host"] == "x://***@h"
    assert "hunter2" not in repr(config.backends[0].options.model_dump()["password"])


# -- the result ----------------------------------------------------------------------------


def test_a_configuration_is_frozen(plugins: Plugins) -> None:
    config = load(plugins)
    with pytest.raises(ValidationError):
        config.core.chunk_size = 1  # type: ignore[misc]


def test_rows_show_everything_with_what_sections_inherit(plugins: Plugins) -> None:
    config = load(plugins, "backends.toy.port=5", "blocking_timeout_secs=3")
    rows = {name: (value, origin) for name, value, origin in config.rows()}
    assert set(rows) >= {*CoreConfig.model_fields, "backends.toy.type", "backends.toy.port"}
    assert rows["backends.toy.port"] == (5, "--set backends.toy.port")
    assert rows["backends.toy.deadline_s"] == (3.0, "blocking_timeout_secs")
    assert rows["backends.toy.serde"] == ("raw", "serde")
    assert set(rows) == set(config.origins)


def test_every_option_is_described() -> None:
    assert all(info.description for info in CoreConfig.model_fields.values())


@pytest.mark.parametrize(
    "name",
    [
        *("LMCACHE_KERNEL_THREADS", "LMCACHE_KERNEL_TRITON"),
        *("LMCACHE_ENVS", "LMCACHE_INSTALL", "LMCACHE_VLLM_PYTHON"),
        *(f"LMCACHE_TEST_{name}" for name in ("KILLS", "LAYOUTS", "SEED", "STEPS")),
    ],
)
def test_variables_of_tools_and_kernels_are_no_options(name: str) -> None:
    config = load_config(Plugins(), environ={name: "anything"})
    assert config.notices == ()


# -- serdes --------------------------------------------------------------------------------

SQUEEZE = """
class Squeeze(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    step: float = 0.5

@hookimpl
def lmcache_serdes():
    return [SerdeDescriptor(name=name, summary="", lossless=False, config=Squeeze,
                            aliases=aliases, create=lambda options: None)
            for name, aliases in (("squeeze", ("press",)), ("crush", ()))]
"""


@pytest.fixture
def squeezing(distribution: MakeDistribution) -> Plugins:
    distribution("lmcache-toy", TOY)
    distribution("lmcache-squeeze", SQUEEZE)
    return Plugins(environ={})


def test_options_of_serdes(squeezing: Plugins) -> None:
    """By the proper name, also where a backend uses another name, or a chain."""
    config = load(
        squeezing,
        "backends.toy.serde=press+crush",
        environ={"LMCACHE_SERDES__SQUEEZE__STEP": "0.25"},
    )
    assert {name: options.step for name, options in config.serdes.items()} == {  # type: ignore[attr-defined]
        "squeeze": 0.25,
        "crush": 0.5,
    }
    rows = {name: (value, origin) for name, value, origin in config.rows()}
    assert rows["serdes.squeeze.step"] == (0.25, "environment LMCACHE_SERDES__SQUEEZE__STEP")
    assert rows["serdes.crush.step"] == (0.5, "default")
    assert not config.notices


def test_options_of_a_serde_that_nobody_uses(squeezing: Plugins) -> None:
    config = load(squeezing, "backends.toy.port=1", "serdes.squeeze.step=0.25")
    assert "squeeze" not in config.serdes
    (notice,) = config.notices
    assert notice == "serdes.squeeze (--set serdes.squeeze.step): no effect: no backend uses it"


@pytest.mark.parametrize(
    ("assignment", "said"),
    [
        ("serdes.squeeze.stp=1", "no such option; did you mean 'step'?"),
        ("serdes.squeeze.step=much", "serdes.squeeze.step = 'much'"),
        ("serdes.press.step=1", "is another name of squeeze; write serdes.squeeze"),
        ("serdes.nothing.step=1", "no installed plugin provides the serde 'nothing'"),
        ("serdes.squeeze=1", "must be a mapping of options"),
        ("serdes=squeeze", "must be a mapping from a serde to its options"),
    ],
)
def test_mistakes_in_options_of_serdes(squeezing: Plugins, assignment: str, said: str) -> None:
    message = refusal(squeezing, "backends.toy.serde=squeeze", assignment)
    assert said in message
    assert f"(--set {assignment.split('=')[0]})" in message


# -- options of cache policies -------------------------------------------------------------

TUNED = """
from lmcache_core.contracts.eviction import LRU, CachePolicyDescriptor

class Tuning(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    small_share: float = 0.1

class Tuned(LRU):
    def __init__(self, options):
        super().__init__()
        if options.small_share > 1:
            raise ValueError("a share is at most 1")
        self.options = options

@hookimpl
def lmcache_cache_policies():
    return [CachePolicyDescriptor(name="tuned", summary="", config=Tuning, create=Tuned)]
"""


@pytest.fixture
def tuned(distribution: MakeDistribution) -> Plugins:
    distribution("lmcache-policy-tuned", TUNED)
    return Plugins(environ={})


def test_options_of_the_policy(tuned: Plugins) -> None:
    config = load(
        tuned, "cache_policy=Tuned", environ={"LMCACHE_CACHE_POLICY_OPTIONS__SMALL_SHARE": "0.25"}
    )
    rows = {name: (value, origin) for name, value, origin in config.rows()}
    origin = "environment LMCACHE_CACHE_POLICY_OPTIONS__SMALL_SHARE"
    assert rows["cache_policy_options.small_share"] == (0.25, origin)
    policy: Any = tuned.make_cache_policy(config.core.cache_policy, config.cache_policy_options)
    assert policy.options.small_share == 0.25
    default: Any = tuned.make_cache_policy("tuned")
    assert default.options.small_share == 0.1


def test_a_policy_that_nothing_is_said_of_has_its_defaults(tuned: Plugins) -> None:
    config = load(tuned, "cache_policy=tuned")
    rows = {name: (value, origin) for name, value, origin in config.rows()}
    assert rows["cache_policy_options.small_share"] == (0.1, "default")
    assert not [name for name, *_ in load(tuned).rows() if name.startswith("cache_policy_")]


@pytest.mark.parametrize(
    ("assignments", "said"),
    [
        (
            ["cache_policy=tuned", "cache_policy_options.smal_share=1"],
            "did you mean 'small_share'?",
        ),
        (["cache_policy=tuned", "cache_policy_options.small_share=much"], "small_share = 'much'"),
        (["cache_policy_options.small_share=0.1"], "no such option"),
        (["cache_policy=tuned", "cache_policy_options=small"], "must be a mapping of the policy's"),
    ],
)
def test_mistakes_in_options_of_the_policy(
    tuned: Plugins, assignments: list[str], said: str
) -> None:
    message = refusal(tuned, *assignments)
    assert said in message
    assert f"(--set {assignments[-1].split('=')[0]})" in message


def test_a_policy_that_cannot_be_made_says_which(tuned: Plugins) -> None:
    config = load(tuned, "cache_policy=tuned", "cache_policy_options.small_share=2")
    with pytest.raises(
        PluginLoadError, match="cache policy 'tuned' can't be created: ValueError: a"
    ):
        tuned.make_cache_policy(config.core.cache_policy, config.cache_policy_options)
