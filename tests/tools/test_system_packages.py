"""What the system lacks is installed, or named in the first line, and fails tests with one line."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from prepared import PreparationError, need_room
from system_packages import (
    PARTS,
    Missing,
    Part,
    allowed,
    need,
    need_to_build,
    provide,
    wrong_python,
)

ROOT = Path(__file__).parents[2]
pytest_plugins = ["pytester"]

FAKE = """#!/bin/sh
echo "$@" >> {calls}
case "$*" in *update*) exit {update} ;; esac
{install}
"""


@pytest.fixture
def there(tmp_path: Path) -> Path:
    """A folder in which parts are found: `part` looks there."""
    folder = tmp_path / "there"
    folder.mkdir()
    return folder


@pytest.fixture
def part(there: Path) -> Callable[..., Part]:
    def one(name: str, goals: frozenset[str] | None = frozenset({"unit", "test"})) -> Part:
        return Part(name, f"{name}-package", f"tests of {name}", (there / name).exists, goals)

    return one


@pytest.fixture
def apt_get(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Puts a fake one first on the path; answers where it writes how it was called."""

    def one(install: str = "", update: int = 0) -> Path:
        binaries, calls = tmp_path / "bin", tmp_path / "calls"
        binaries.mkdir()
        calls.touch()
        fake = binaries / "apt-get"
        fake.write_text(FAKE.format(calls=calls, update=update, install=install))
        fake.chmod(0o755)
        monkeypatch.setenv("PATH", f"{binaries}:{os.environ['PATH']}")
        return calls

    return one


@pytest.fixture
def provided(tmp_path: Path) -> Callable[..., list[str]]:
    """`provide` for make unit, and the names of what is missing still."""

    def one(*parts: Part, root: bool, environ: Mapping[str, str]) -> list[str]:
        log = tmp_path / "log"
        return [p.name for p in provide(["unit"], parts, root=root, environ=environ, log=log)]

    return one


INSTALL = [{"CI": "true"}, {"LMCACHE_INSTALL": "1"}]


@pytest.mark.parametrize("environ", INSTALL, ids=str)
def test_root_that_may_installs_what_is_missing_and_no_more(
    there: Path,
    part: Callable[..., Part],
    apt_get: Callable[..., Path],
    provided: Callable[..., list[str]],
    capsys: pytest.CaptureFixture[str],
    environ: dict[str, str],
) -> None:
    (there / "here").touch()
    calls = apt_get(f"touch {there}/gone")
    elsewhere = part("elsewhere", frozenset({"demo"}))
    assert provided(part("here"), part("gone"), elsewhere, root=True, environ=environ) == []
    update, install = calls.read_text().splitlines()
    assert update.endswith("update")
    assert install.endswith("install -y --no-install-recommends gone-package")
    output = capsys.readouterr()
    assert output.out == ""
    assert "installing gone-package" in output.err


def test_nothing_is_done_where_nothing_is_missing(
    there: Path,
    part: Callable[..., Part],
    apt_get: Callable[..., Path],
    provided: Callable[..., list[str]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    (there / "here").touch()
    calls = apt_get()
    assert provided(part("here"), root=True, environ={"CI": "true"}) == []
    assert calls.read_text() == ""
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("root", "environ", "first"),
    [
        (True, {}, "LMCACHE_INSTALL=1 make unit"),
        (True, {"CI": "false"}, "LMCACHE_INSTALL=1 make unit"),
        (
            False,
            {"CI": "true"},
            "sudo apt-get update && "
            "sudo apt-get install -y --no-install-recommends one-package two-package",
        ),
    ],
)
def test_otherwise_the_first_line_is_the_command(
    part: Callable[..., Part],
    apt_get: Callable[..., Path],
    provided: Callable[..., list[str]],
    capsys: pytest.CaptureFixture[str],
    root: bool,
    environ: dict[str, str],
    first: str,
) -> None:
    calls = apt_get()
    assert provided(part("one"), part("two"), root=root, environ=environ) == ["one", "two"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == first
    assert lines[-1] == "  two (package two-package): tests of two"
    assert calls.read_text() == ""


def test_an_apt_get_that_fails_shows_why_and_names_the_packages(
    part: Callable[..., Part],
    apt_get: Callable[..., Path],
    provided: Callable[..., list[str]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    apt_get("echo no such package; exit 100")
    assert provided(part("one"), root=True, environ={"CI": "true"}) == ["one"]
    told = capsys.readouterr().out
    assert "exit code 100\n" in told
    assert "\nno such package\n" in told
    assert "\nsudo apt-get update && sudo apt-get install -y" in told
    assert "one-package" in told


def test_a_failing_update_is_no_reason_to_give_up(
    there: Path,
    part: Callable[..., Part],
    apt_get: Callable[..., Path],
    provided: Callable[..., list[str]],
) -> None:
    apt_get(f"touch {there}/one", update=100)
    assert provided(part("one"), root=True, environ={"CI": "true"}) == []


def test_installed_and_still_not_there(
    part: Callable[..., Part],
    apt_get: Callable[..., Path],
    provided: Callable[..., list[str]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    apt_get("true")
    assert provided(part("one"), root=True, environ={"CI": "true"}) == ["one"]
    assert "installed one-package, and still there is no one" in capsys.readouterr().out


def test_without_apt_get_the_packages_are_named(
    part: Callable[..., Part],
    provided: Callable[..., list[str]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provided(part("one"), root=True, environ={"CI": "true"}) == ["one"]
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith("this system has no apt-get")
    assert first.endswith("one-package")


def test_what_may_be_installed() -> None:
    yes = [
        {"CI": "1"},
        {"CI": "true"},
        {"LMCACHE_INSTALL": "1"},
        {"CI": "0", "LMCACHE_INSTALL": "1"},
    ]
    no = [{}, {"CI": ""}, {"CI": "False"}, {"LMCACHE_INSTALL": "0"}]
    assert [allowed(one) for one in yes + no] == [True] * len(yes) + [False] * len(no)


@pytest.mark.parametrize("version", [(3, 10, 0), (3, 11, 7), (3, 12, 1), (3, 13, 9)])
def test_pythons_that_do(version: tuple[int, ...]) -> None:
    assert wrong_python(version) is None


@pytest.mark.parametrize("version", [(3, 9, 21), (2, 7, 18), (3, 14, 0)])
def test_pythons_that_do_not_are_told_in_one_line(version: tuple[int, ...]) -> None:
    told = str(wrong_python(version))
    assert f"is Python {'.'.join(map(str, version))}, and this needs 3.10 to 3.13" in told
    assert "make PYTHON=" in told
    assert "\n" not in told


def test_what_environments_are_made_with_stops_their_making(
    part: Callable[..., Part], there: Path
) -> None:
    compiler, server = part("compiler", None), part("server")
    with pytest.raises(
        PreparationError, match=r"^compiler: not here, .*apt-get.* compiler-package$"
    ):
        need_to_build([compiler, server])
    (there / "compiler").touch()
    need_to_build([compiler, server])


def test_each_part_is_found_or_not_without_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where there is nothing at all on the path."""
    monkeypatch.setenv("PATH", "/nowhere")
    for variable in ("CC", "CXX"):
        monkeypatch.delenv(variable, raising=False)
    found = {part.name: part.found() for part in PARTS}
    commands = ("a C compiler", "a C++ compiler", "redis-server", "ip", "infiniband/verbs.h")
    assert not any(found[name] for name in commands)
    assert len(found) == len(PARTS)


def test_too_little_room_is_said_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need_room(tmp_path / "not" / "made", 1)
    with pytest.raises(PreparationError, match=r"not/made: this takes .* GB .*LMCACHE_ENVS"):
        need_room(tmp_path / "not" / "made", 1 << 60)
    assert not (tmp_path / "not").exists()


def test_a_test_that_needs_what_is_missing_fails_with_one_line(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not skipped, and no error: also where a fixture asks."""
    monkeypatch.setenv("COLUMNS", "200")  # or pytest leaves the reason out
    pytester.makeconftest((ROOT / "conftest.py").read_text())
    pytester.makepyfile(
        """
        import pytest
        from system_packages import Part, need

        PARTS = [Part("no-such", "no-package", "tests", bool)]

        @pytest.fixture(scope="module")
        def server():
            need("no-such", parts=PARTS)
            yield

        def test_by_a_fixture(server): pass
        def test_again(server): pass
        def test_itself(): need("no-such", parts=PARTS)
        def test_without(): pass
        """
    )
    result = pytester.runpytest("-p", "no:cacheprovider", "--junit-xml=out.xml")
    result.assert_outcomes(passed=1, failed=3)
    result.stdout.no_fnmatch_line("*Traceback*")
    result.stdout.no_fnmatch_line("*need(*")
    result.stdout.fnmatch_lines(
        ["FAILED *test_itself - *no-such isn't here (tests); run: apt-get install -y no-package"]
    )
    assert (pytester.path / "out.xml").read_text().count("<failure ") == 3


def test_need_is_content_with_what_is_there(part: Callable[..., Part], there: Path) -> None:
    parts = [part("one"), replace(part("two"), found=partial(bool, 1))]
    with pytest.raises(Missing, match=r"^one isn't here \(tests of one\)"):
        need("two", "one", parts=parts)
    (there / "one").touch()
    need("two", "one", parts=parts)


def test_what_make_calls() -> None:
    """A Python in which nothing is installed will do."""
    tool = ROOT / "tools" / "system_packages.py"
    done = subprocess.run(
        [sys.executable, "-S", str(tool), "lint"], capture_output=True, text=True, check=False
    )
    assert done.returncode in (0, 1), done.stderr
    assert done.stderr == ""
