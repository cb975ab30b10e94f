"""Every program runs, whatever becomes of the others, and the page shows what they found."""

from __future__ import annotations

from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench"
GOOD = """
import sys
from pathlib import Path
sys.path.insert(0, {bench!r})
from measuring import Result, write_json
write_json(Path(sys.argv[-1]), [Result(sys.argv[1], 2.0, "ms", 4.0, 2.0, 7, 0.01)])
"""


@pytest.fixture(autouse=True)
def _bench_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))


def test_the_list_names_programs_that_exist_each_once() -> None:
    from run_all import PROGRAMS

    assert all((BENCH / f"{one.file}.py").exists() for one in PROGRAMS)
    assert len({one.title for one in PROGRAMS}) == len(PROGRAMS)


def test_one_that_fails_stops_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import run_all
    from measuring import read_json
    from run_all import Program

    (tmp_path / "good.py").write_text(GOOD.format(bench=str(BENCH)))
    (tmp_path / "silent.py").write_text("")
    (tmp_path / "dies.py").write_text("raise SystemExit(3)")
    programs = [
        Program("dies"),
        Program("good", ("first",)),
        Program("silent"),
        Program("good", ("second",), "again"),
    ]
    monkeypatch.setattr(run_all, "HERE", tmp_path)
    monkeypatch.setattr(run_all, "PROGRAMS", programs)
    latest = tmp_path / "results" / "latest.json"
    assert run_all.run_all(programs, latest) == 1
    assert [one.name for one in read_json(latest)] == ["good: first", "again: second"]
    said = capfd.readouterr().out
    assert "dies: exit status 3" in said
    assert "silent: no results" in said
    assert "failed: dies, silent" in said

    # Some of them again: others keep their results, and what fails now loses them.
    (tmp_path / "good.py").write_text("raise SystemExit(1)")
    assert run_all.run_all(programs[1:2], latest) == 1
    assert [one.name for one in read_json(latest)] == ["again: second"]


def test_the_page_is_refreshed_between_its_markers(tmp_path: Path) -> None:
    from measuring import Result, write_json
    from run_all import BEGIN, END, write_page

    page, latest = tmp_path / "page.md", tmp_path / "latest.json"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    write_json(latest, [Result("index: a", 1234.5, "µs", 4.0, 2.0, 7, 0.012)])
    (tmp_path / "machine.txt").write_text("2 CPUs\n")
    for _ in range(2):
        write_page(latest, page)
        text = page.read_text()
        assert text.startswith(f"before\n{BEGIN}\n\n2 CPUs\n\n| what |")
        assert text.endswith(f"\n{END}\nafter\n")
        assert "| index: a | 1,234.50 | 4.00 | µs | 2.000 | 1.2% | 7 |" in text
        assert "old" not in text
    page.write_text("nothing")
    with pytest.raises(ValueError, match="the page has no"):
        write_page(latest, page)
