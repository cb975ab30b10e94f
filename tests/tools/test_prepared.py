"""Prepared directories are whole or built anew, and two runs keep out of each other's way."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture(autouse=True)
def _tools_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(TOOLS))


def test_built_once(tmp_path: Path) -> None:
    from prepared import prepare

    calls: list[Path] = []

    def build(directory: Path) -> None:
        calls.append(directory)
        (directory / "content").write_text("whole")

    for _ in range(2):
        assert prepare(tmp_path / "a" / "thing", build) == tmp_path / "a" / "thing"
    assert calls == [tmp_path / "a" / "thing"]


def test_half_built_is_built_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from prepared import prepare

    def dies(directory: Path) -> None:
        (directory / "half").touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(tmp_path / "thing", dies)
    prepare(tmp_path / "thing", lambda directory: (directory / "whole").touch())
    assert not (tmp_path / "thing" / "half").exists()
    assert (tmp_path / "thing" / "whole").exists()
    assert "left unfinished" in capsys.readouterr().err


def test_a_second_run_waits_for_the_first(tmp_path: Path) -> None:
    """Of two processes, one builds; the other one says that it waits, and finds the result."""
    script = f"""
import sys
sys.path.insert(0, {str(TOOLS)!r})
from pathlib import Path
from prepared import prepare

def build(directory):
    print("building", flush=True)
    sys.stdin.readline()
    print("built", flush=True)

prepare(Path({str(tmp_path / "thing")!r}), build)
print("done", flush=True)
"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    first = subprocess.Popen([sys.executable, "-c", script], text=True, **pipes)
    assert first.stdout is not None
    assert first.stdout.readline() == "building\n"
    second = subprocess.Popen([sys.executable, "-c", script], text=True, **pipes)
    assert second.stderr is not None
    assert "waiting" in second.stderr.readline()
    assert first.communicate("go\n", timeout=60)[0] == "built\ndone\n"
    assert second.communicate(timeout=60)[0] == "done\n"


def test_a_failed_step_shows_what_it_said(tmp_path: Path) -> None:
    from prepared import PreparationError, run_step

    log = tmp_path / "log"
    command = [sys.executable, "-c", "print('the reason'); raise SystemExit(3)"]
    with pytest.raises(PreparationError, match=r"(?s)a title: exit code 3.*the reason.*log"):
        run_step("a title", command, log)
    with pytest.raises(PreparationError, match="can't run"):
        run_step("a title", [tmp_path / "nothing"], log)


def test_where_directories_live(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from prepared import cache_root

    monkeypatch.setenv("LMCACHE_ENVS", str(tmp_path / "chosen"))
    assert cache_root() == tmp_path / "chosen"
    monkeypatch.delenv("LMCACHE_ENVS")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert cache_root() == tmp_path / "cache" / "lmcache-envs"


def test_recipes_differ_where_any_part_does() -> None:
    from prepared import recipe_digest

    digests = [recipe_digest("ab", "c"), recipe_digest("a", "bc"), recipe_digest(b"abc")]
    assert len(set(digests)) == 3
    assert recipe_digest("ab", "c") == digests[0]
