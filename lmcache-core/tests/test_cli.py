"""The lmcache command on a healthy and on a broken set-up."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest

from lmcache_core.builtin.filesystem import FilesystemBackend, FilesystemConfig
from lmcache_core.chunks.keys import CacheNamespace
from lmcache_core.chunks.layout import DType, KVLayout, full_attention
from lmcache_core.cli import doctor, main
from lmcache_core.contracts.storage import BackendContext
from lmcache_core.errors import ConfigError
from lmcache_core.plugins import upstream
from lmcache_core.templates import KINDS

MakeDistribution = Callable[..., str]

TOY = """
@hookimpl
def lmcache_storage_backends():
    return [backend("toy")]
"""
DISK = """
class Disk(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    path: str
    max_size_gib: float | None = None

@hookimpl
def lmcache_storage_backends():
    return [backend("filesystem", config=Disk)]
"""


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("LMCACHE_")]:
        monkeypatch.delenv(name)


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def lmcache(capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*argv: str) -> tuple[int, str, str]:
        status = main(argv)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def lines(text: str, start: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(start)]


# -- the command itself --------------------------------------------------------------------


@pytest.mark.parametrize("command", ["plugins", "config", "doctor", "version"])
def test_help_has_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    help_text = capsys.readouterr().out
    assert "example" in help_text
    assert f"lmcache {command}" in help_text


def test_no_command_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([])
    assert caught.value.code == 2
    assert "COMMAND" in capsys.readouterr().err


def test_version(lmcache: Run) -> None:
    status, out, _ = lmcache("version")
    assert status == 0
    assert out.startswith(f"lmcache-core {metadata.version('lmcache-core')} (Python 3.")


def test_a_plugin_adds_a_subcommand(distribution: MakeDistribution, lmcache: Run) -> None:
    code = """
@hookimpl
def lmcache_cli(subcommands):
    parser = subcommands.add_parser("hello")
    parser.set_defaults(run=lambda args: print("hello") or 3)
"""
    distribution("lmcache-hello", code)
    assert lmcache("hello")[:2] == (3, "hello\n")


def test_a_plugin_whose_subcommand_is_broken_breaks_no_other(
    distribution: MakeDistribution, lmcache: Run
) -> None:
    distribution("lmcache-bad", "@hookimpl\ndef lmcache_cli(subcommands): raise OSError('no')")
    status, out, _ = lmcache("plugins", "--load")
    assert status == 0
    assert "lmcache_cli raised OSError: no" in out


def test_nothing_imports_torch() -> None:
    program = (
        "import sys; from lmcache_core.cli import main; main(['doctor']); "
        "sys.exit('torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert result.returncode == 0, result.stderr


# -- plugins -------------------------------------------------------------------------------


def test_plugins_lists_the_good_and_the_bad(distribution: MakeDistribution, lmcache: Run) -> None:
    distribution("lmcache-backend-toy", TOY, version="2.5")
    distribution("other-toy", TOY)
    distribution("lmcache-backend-bad", "import a_module_that_nobody_has")
    status, out, _ = lmcache("plugins", "--load")
    assert status == 0
    (row,) = [line for line in out.splitlines() if "lmcache-backend-toy" in line and "2.5" in line]
    assert row.split()[:4] == ["toy", "lmcache-backend-toy", "2.5", "ok"]
    assert "storage backend toy" in row
    assert "a_module_that_nobody_has" in out
    assert "conflict: 2 plugins provide the storage backend 'toy'" in out


def test_a_list_of_plugins_loads_none(
    distribution: MakeDistribution, lmcache: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    distribution("lmcache-backend-toy", "raise SystemExit('loaded')", version="2.5")
    distribution("other-toy", TOY)
    distribution("lmcache-backend-new", TOY, requires=("lmcache-core>=99",))
    monkeypatch.setenv("LMCACHE_DISABLE_PLUGINS", "other-toy")
    status, out, _ = lmcache("plugins", "--json")
    assert status == 0
    rows = {row["distribution"]: row for row in json.loads(out)["plugins"]}
    assert rows["lmcache-core"]["status"] == "installed"
    assert rows["lmcache-backend-toy"]["status"] == "installed"
    assert rows["lmcache-backend-toy"]["version"] == "2.5"
    assert rows["other-toy"]["status"] == "disabled"
    assert rows["lmcache-backend-new"]["status"] == "incompatible"
    assert "needs lmcache-core>=99" in rows["lmcache-backend-new"]["detail"]
    status, out, _ = lmcache("plugins")
    assert status == 0
    assert "lmcache-backend-toy" in out
    assert "lmcache plugins --load" in out.splitlines()[-1]


@pytest.mark.parametrize("command", ["plugins", "version"])
def test_a_list_needs_neither_pydantic_nor_asyncio(command: str) -> None:
    program = (
        f"import sys; from lmcache_core.cli import main; main([{command!r}]); "
        "sys.exit(' '.join({'pydantic', 'yaml', 'asyncio', 'pluggy'} & {*sys.modules}) or None)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert result.returncode == 0, result.stderr


def test_plugins_as_json(distribution: MakeDistribution, lmcache: Run) -> None:
    distribution("lmcache-backend-toy", TOY)
    status, out, _ = lmcache("plugins", "--load", "--json")
    assert status == 0
    data = json.loads(out)
    (toy,) = [p for p in data["plugins"] if p["name"] == "toy"]
    assert toy["status"] == "ok"
    assert toy["provides"] == ["storage backend toy"]
    assert data["conflicts"] == []


# -- config --------------------------------------------------------------------------------


def test_config_prints_values_origins_and_notices(
    distribution: MakeDistribution,
    lmcache: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    distribution("lmcache-backend-toy", TOY)
    file = tmp_path / "c.yaml"
    file.write_text("chunk_size: 64\npy_enable_gc: true\n")
    monkeypatch.setenv("LMCACHE_BACKENDS__TOY__PASSWORD", "hunter2")
    status, out, _ = lmcache("config", "--file", str(file), "--set", "cache_policy=mru")
    assert status == 0
    rows = [line.split(maxsplit=2) for line in out.splitlines() if line]
    assert ["chunk_size", "64", "c.yaml line 1"] in rows
    assert ["cache_policy", "MRU", "--set cache_policy"] in rows
    assert ["serde", "raw", "default"] in rows
    secret = "backends.toy.password"
    assert [secret, "***", "environment LMCACHE_BACKENDS__TOY__PASSWORD"] in rows
    assert "hunter2" not in out
    assert "notice: py_enable_gc (c.yaml line 2): no effect" in out


def test_config_as_json(lmcache: Run) -> None:
    status, out, _ = lmcache("config", "--json", "--set", "chunk_size=8")
    assert status == 0
    data = json.loads(out)
    assert data["values"]["chunk_size"] == {"value": 8, "origin": "--set chunk_size"}
    assert data["notices"] == []


def test_a_wrong_configuration_exits_with_1_and_every_mistake(lmcache: Run) -> None:
    status, out, err = lmcache("config", "--set", "chunk_size=0", "--set", "chunk=1")
    assert status == 1
    assert out == ""
    assert "2 problems" in err
    assert "chunk_size = '0' (--set chunk_size)" in err
    assert "chunk (--set chunk)" in err


# -- doctor --------------------------------------------------------------------------------


def test_doctor_on_a_healthy_machine(lmcache: Run) -> None:
    status, out, _ = lmcache("doctor", "--set", "max_local_cpu_size=0.01")
    assert status == 0
    assert lines(out, "FAIL") == []
    assert all(line[:4] in ("ok  ", "warn") for line in out.splitlines())


def test_doctor_on_a_wrong_configuration(lmcache: Run) -> None:
    status, out, _ = lmcache("doctor", "--set", "backends.toyy.x=1")
    assert status == 1
    (line,) = lines(out, "FAIL")
    assert "configuration: 1 problem" in line


def test_a_broken_plugin_that_nobody_needs_is_a_warning(
    distribution: MakeDistribution, lmcache: Run
) -> None:
    distribution("lmcache-backend-bad", "import a_module_that_nobody_has")
    distribution("lmcache-report", "@hookimpl\ndef lmcache_report(): return ['2 devices']")
    status, out, _ = lmcache("doctor", "--set", "max_local_cpu_size=0.01")
    assert status == 0
    assert any("lmcache-backend-bad" in line for line in lines(out, "warn"))
    assert "ok    report: 2 devices" in out.splitlines()


def test_a_plugin_that_reports_a_failure_fails_the_doctor(
    distribution: MakeDistribution, lmcache: Run
) -> None:
    code = """
from lmcache_core import ReportLine
@hookimpl
def lmcache_report(): return [ReportLine("FAIL", "no device"), ReportLine("warn", "old driver")]
"""
    distribution("lmcache-report", code)
    status, out, _ = lmcache("doctor", "--set", "max_local_cpu_size=0.01")
    assert status == 1
    assert "FAIL  report: no device" in out.splitlines()
    assert "warn  report: old driver" in out.splitlines()


def test_more_memory_than_there_is_is_a_failure(lmcache: Run) -> None:
    status, out, _ = lmcache("doctor", "--set", "max_local_cpu_size=9999999")
    assert status == 1
    (line,) = lines(out, "FAIL")
    assert "lower max_local_cpu_size" in line


def test_a_container_limit_counts(tmp_path: Path) -> None:
    limit = tmp_path / "memory.max"
    limit.write_text("1048576\n")
    assert doctor.memory_bytes(limit) == 1 << 20
    limit.write_text("max\n")
    machine = doctor.memory_bytes(limit)
    assert machine is not None
    assert machine > 1 << 20


def test_the_disk_folder_is_tried(
    distribution: MakeDistribution, lmcache: Run, tmp_path: Path
) -> None:
    distribution("lmcache-toys", DISK)
    off = ("--set", "max_local_cpu_size=0.01")
    os.environ["LMCACHE_DISABLE_PLUGINS"] = "filesystem"  # the built-in one
    try:
        new = tmp_path / "not" / "yet"
        status, out, _ = lmcache("doctor", *off, "--set", f"local_disk={new}")
        assert status == 0
        assert f"{new} can be written to, will be created" in out
        assert not new.exists()
        file = tmp_path / "file"
        file.write_text("")
        status, out, _ = lmcache("doctor", *off, "--set", f"local_disk={file / 'below'}")
        assert status == 1
        (line,) = lines(out, "FAIL")
        assert "can't be written to" in line
        size = ("--set", "max_local_disk_size=99999999")
        status, out, _ = lmcache("doctor", *off, "--set", f"local_disk={tmp_path}", *size)
        assert status == 0
        assert any("more than is free" in line for line in lines(out, "warn"))
        layout = KVLayout(16, (full_attention(layers=1, heads=1, head_size=8, dtype=DType.F16),))
        backend = FilesystemBackend(FilesystemConfig(path=tmp_path, min_free_gib=0))
        namespace = CacheNamespace("org/model", layout)
        backend.open_blocking(BackendContext("disk", namespace))
        backend.close_blocking()
        (tmp_path / ("ab" * 8)).mkdir()
        status, out, _ = lmcache("doctor", *off, "--set", f"local_disk={tmp_path}")
        assert status == 0
        assert f"namespace {namespace.fingerprint}, 0.00 GiB: model org/model, 16 tokens" in out
        assert f"namespace {'ab' * 8}, 0.00 GiB: no manifest" in out
    finally:
        del os.environ["LMCACHE_DISABLE_PLUGINS"]


# -- upstream beside us --------------------------------------------------------------------


def test_upstream_beside_us_is_refused(distribution: MakeDistribution, lmcache: Run) -> None:
    upstream.refuse_upstream()
    distribution("lmcache", "", version="0.5.6", entry_points="[x]\n")
    with pytest.raises(ConfigError) as caught:
        upstream.refuse_upstream()
    assert "lmcache 0.5.6" in str(caught.value)
    assert "pip uninstall lmcache" in str(caught.value)
    status, out, _ = lmcache("doctor", "--set", "max_local_cpu_size=0.01")
    assert status == 1
    (line,) = lines(out, "FAIL")
    assert "pip uninstall lmcache" in line


def test_what_a_half_removed_upstream_leaves_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "lmcache"
    package.mkdir()
    (package / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match="hides the files"):
        upstream.refuse_upstream()


# -- new-plugin ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_plugin_is_written_and_what_comes_next_is_said(
    kind: str, lmcache: Run, tmp_path: Path
) -> None:
    status, out, _ = lmcache("new-plugin", kind, "acme", "--to", str(tmp_path))
    assert status == 0
    package = tmp_path / f"lmcache-{kind}-acme"
    assert f"pytest {package}" in out
    assert (package / "src" / f"lmcache_{kind}_acme" / "plugin.py").is_file()
    assert (package / "tests" / "test_acme.py").is_file()
    for path in package.rglob("*.py"):
        compile(path.read_text(), str(path), "exec")


@pytest.mark.parametrize("name", ["Acme", "a-b", "../up", "", "1st"])
def test_a_name_that_is_none_writes_nothing(name: str, lmcache: Run, tmp_path: Path) -> None:
    status, _, err = lmcache("new-plugin", "backend", name, "--to", str(tmp_path))
    assert status == 1
    assert "take one lower-case word" in err
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_there_is_left_alone(lmcache: Run, tmp_path: Path) -> None:
    (tmp_path / "lmcache-serde-acme").mkdir()
    status, _, err = lmcache("new-plugin", "serde", "acme", "--to", str(tmp_path))
    assert status == 1
    assert "lmcache-serde-acme" in err
    assert list((tmp_path / "lmcache-serde-acme").iterdir()) == []
