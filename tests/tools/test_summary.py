"""The closing line counts what ran, and the exit code says whether it is good."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SUMMARY = Path(__file__).parents[2] / "tools" / "summary.py"
CASES = {
    "passed": '<testcase classname="m" name="a"/>',
    "failed": '<testcase classname="m" name="b"><failure message="x"/></testcase>',
    "error": '<testcase classname="m" name="c"><error message="x"/></testcase>',
    "skipped": '<testcase classname="m" name="d"><skipped type="pytest.skip"/></testcase>',
    "xfailed": '<testcase classname="m" name="e"><skipped type="pytest.xfail"/></testcase>',
}


@pytest.mark.parametrize(
    ("files", "line", "code"),
    [
        (["passed"], "1 passed, 0 failed", 0),
        (["passed passed", "passed skipped"], "3 passed, 0 failed, 1 skipped", 0),
        (["passed xfailed"], "2 passed, 0 failed", 0),
        (["passed", "failed"], "1 passed, 1 failed", 1),
        (["passed error"], "1 passed, 1 failed", 1),
        (["skipped"], "0 passed, 0 failed, 1 skipped", 1),
        ([], "0 passed, 0 failed", 1),
    ],
)
def test_the_last_line_and_the_exit_code(
    tmp_path: Path, files: list[str], line: str, code: int
) -> None:
    for number, cases in enumerate(files):
        body = "".join(CASES[case] for case in cases.split())
        text = f"<testsuites><testsuite>{body}</testsuite></testsuites>"
        (tmp_path / f"part{number}.xml").write_text(text)
    done = subprocess.run(
        [sys.executable, str(SUMMARY), str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.stdout.splitlines()[-1] == line
    assert done.returncode == code
