"""What `bench/compare.py` says of two builds: quotients of pairs, and no judgement."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench"
PROGRAM = """
import sys
sys.path.insert(0, {bench!r})
from pathlib import Path
from lmcache_core import SPEED
from measuring import Result, write_json
with open({log!r}, "a") as log:
    print(__file__, SPEED, file=log)
if {needs!r} and SPEED != {needs!r}:
    raise SystemExit("no such API")
write_json(Path(sys.argv[-1]), [Result("row", 1.0, "ms", 1.0, SPEED, 1, 0.0), *{more}])
"""


@pytest.fixture(autouse=True)
def _bench_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))


def git(root: Path, *arguments: str) -> str:
    names = ("-c", "user.name=it", "-c", "user.email=it@example.org")
    command = ["git", "-C", str(root), *names, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


class Tree:
    """A repository whose build is as fast as ``SPEED`` says, with programs that show that."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.log = root.parent / "log"
        self.core = root / "lmcache-core" / "src" / "lmcache_core" / "__init__.py"
        self.core.parent.mkdir(parents=True)
        (root / "bench").mkdir()
        (root / "kernels").mkdir()
        (root / "kernels" / "kept").touch()
        git(root, "init", "-q")

    def has(self, speed: float) -> None:
        self.core.write_text(f"SPEED = {speed}\n")

    def program(self, name: str, *, needs: float = 0.0, more: str = "[]") -> None:
        text = PROGRAM.format(bench=str(BENCH), log=str(self.log), needs=needs, more=more)
        (self.root / "bench" / f"{name}.py").write_text(text)

    def commit(self) -> str:
        git(self.root, "add", "-A")
        git(self.root, "commit", "-qm", "it")
        return git(self.root, "rev-parse", "HEAD")

    def ran(self) -> list[tuple[str, str, float]]:
        """Whose program ran with whose build: (folder, program, speed)."""
        lines = [line.split() for line in self.log.read_text().splitlines()]
        return [
            ("this" if Path(file).is_relative_to(self.root) else "base", Path(file).stem, float(by))
            for file, by in lines
        ]


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tree:
    import compare
    from run_all import Program

    made = Tree(tmp_path / "tree")
    kernels = tmp_path / "kernels"
    (kernels / "lmcache_kernels").mkdir(parents=True)
    (kernels / "lmcache_kernels" / "__init__.py").touch()
    monkeypatch.setattr(compare, "ROOT", made.root)
    monkeypatch.setattr(compare, "kernels_of", lambda root, revision: kernels)
    monkeypatch.setattr(compare, "PROGRAMS", {name: Program(name) for name in ("one", "two")})
    monkeypatch.setattr(compare, "DEFAULT", ("one",))
    return made


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    import compare

    monkeypatch.setattr(sys, "argv", ["compare.py", *arguments])
    return compare.main()


def test_pairs_take_turns_and_what_is_shown_is_this_by_base(
    tree: Tree, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    tree.has(2.0)
    tree.program("one")
    base = tree.commit()
    tree.has(1.5)  # not committed: the working tree as it is
    found = tmp_path / "found.json"
    assert run(monkeypatch, "--base", base, "--pairs", "3", "--json", str(found)) == 0
    assert [speed for _, _, speed in tree.ran()] == [1.5, 2.0, 2.0, 1.5, 1.5, 2.0]
    assert {where for where, _, _ in tree.ran()} == {"this"}, "both measured by the same program"
    assert json.loads(found.read_text()) == [{"name": "one: row", "quotients": [0.75] * 3}]
    said = capsys.readouterr().out
    assert "geometric mean of 1 rows" in said
    assert "wholly below 0.97: one: row" in said
    assert len(git(tree.root, "worktree", "list").splitlines()) == 1, "the checkout is gone"


def test_what_looks_slower_is_measured_again(
    tree: Tree, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By itself, and only programs with such rows."""
    tree.has(2.0)
    tree.program("one")
    tree.program("two", more="[Result('same', 1.0, 'ms', 1.0, 1.0, 1, 0.0)]")
    with (tree.root / "bench" / "two.py").open("a") as program:
        # By chance: slower in the first pair alone.
        program.write(
            f"if SPEED == 1.5 and len(open({str(tree.log)!r}).readlines()) > 4:\n"
            "    write_json(Path(sys.argv[-1]), [Result('row', 1.0, 'ms', 1.0, 2.0, 1, 0.0)])\n"
        )
    base = tree.commit()
    tree.has(1.5)
    more = ("--base", base, "--pairs", "1", "--again", "--programs", "one", "two")
    assert run(monkeypatch, *more) == 0
    assert [name for _, name, _ in tree.ran()] == ["one", "one", "two", "two"] * 2
    said = capsys.readouterr().out
    first, _, second = said.partition("these again, in 1 more pairs")
    assert "wholly below 0.97: one: row" in first
    assert "wholly below 0.97: two: row" in first
    one, two = second.splitlines()[1:3]
    assert one.startswith("one: row")
    assert one.endswith("slower")
    assert two.startswith("two: row")
    assert not two.endswith("slower")


def test_stopped_it_shows_the_pairs_that_were_run(
    tree: Tree, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tree.has(2.0)
    tree.program("one")
    with (tree.root / "bench" / "one.py").open("a") as program:
        program.write(
            f"if len(open({str(tree.log)!r}).readlines()) == 3:\n"
            "    import os, signal\n"
            "    os.kill(os.getppid(), signal.SIGTERM)\n"
        )
    base = tree.commit()
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert run(monkeypatch, "--base", base, "--pairs", "3") == 130
    finally:
        signal.signal(signal.SIGTERM, before)
    said = capsys.readouterr().out
    assert "1 of 3 pairs" in said
    assert "geometric mean of 1 rows" in said
    assert len(git(tree.root, "worktree", "list").splitlines()) == 1, "the checkout is gone"


def test_a_program_whose_api_is_new_runs_as_it_was(
    tree: Tree, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tree.has(2.0)
    tree.program("one", needs=2.0)
    base = tree.commit()
    tree.has(4.0)
    tree.program("one", needs=4.0, more="[Result('new', 1.0, 'ms', 1.0, 1.0, 1, 0.0)]")
    assert run(monkeypatch, "--base", base, "--pairs", "2") == 0
    assert tree.ran() == [
        ("this", "one", 4.0),
        ("this", "one", 2.0),  # fails, once
        ("base", "one", 2.0),
        ("base", "one", 2.0),
        ("this", "one", 4.0),
    ]
    said = capsys.readouterr().out
    assert "one: for base as it was at that revision" in said
    assert "one: new: only this has it" in said
    assert "no interval lies wholly below 0.97" in said


def test_a_program_that_fails_is_named_and_stops_no_other(
    tree: Tree, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tree.has(2.0)
    tree.program("one", needs=7.0)
    tree.program("two")
    base = tree.commit()
    assert run(monkeypatch, "--base", base, "--pairs", "2", "--programs", "one", "two") == 1
    said = capsys.readouterr().out
    assert "one: failed with this" in said
    assert "geometric mean of 1 rows" in said
    assert sum(name == "two" for _, name, _ in tree.ran()) == 4


def test_a_build_that_is_not_its_own_is_refused(
    tree: Tree, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import compare

    tree.has(2.0)
    elsewhere = tmp_path / "kernels"
    build = compare.Build("base", tmp_path / "nothing-here", elsewhere)
    with pytest.raises(SystemExit, match="base: imports"):
        compare.require_own(build, build.environment({}))
    with pytest.raises(SystemExit, match="git rev-parse"):
        run(monkeypatch, "--base", "no-such-revision")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([3.0], (3.0, 3.0)),
        ([5.0, 1.0, 3.0, 2.0, 4.0], (1.0, 5.0)),  # 94 %: not enough for less than all
        ([float(n) for n in range(9)], (1.0, 7.0)),  # 96 %
        ([float(n) for n in range(25)], (7.0, 17.0)),  # 96 %
    ],
)
def test_the_interval_is_between_two_of_the_values(
    values: Sequence[float], expected: tuple[float, float]
) -> None:
    from compare import interval_of

    assert interval_of(values) == expected


def test_a_row_is_slower_only_if_all_of_its_interval_is() -> None:
    from compare import Build, Comparison, Row

    found = Comparison(*(Build(name, BENCH, BENCH) for name in ("this", "base")), [])
    found.rows = {
        "p: slow": Row("p: slow", [0.9] * 8 + [1.2]),
        "p: noisy": Row("p: noisy", [0.9] * 7 + [1.2] * 2),
    }
    found.pairs = [[1.0, 1.0]] * 9
    assert [line for line in found.report().splitlines() if "wholly" in line] == [
        "wholly below 0.97: p: slow"
    ]


def test_the_list_names_programs_that_exist() -> None:
    from compare import DEFAULT, PROGRAMS, chosen

    assert all((BENCH / f"{one.file}.py").exists() for one in PROGRAMS.values())
    assert {one.title for one in chosen(DEFAULT, quick=True)} == set(DEFAULT)
