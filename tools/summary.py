"""Adds up what several test runners reported, and closes with one line.

    python3 tools/summary.py build/results

Reads the JUnit XML files in the folder. Prints each file's counts, what failed, what was skipped,
and last ``N passed, N failed[, N skipped]``. Ends with 1 if anything failed or nothing ran. Knows
nothing about who ran the tests. Standard library only.
"""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ElementTree  # the files are our own
from collections import Counter
from pathlib import Path


def outcome(case: ElementTree.Element) -> str:
    """``failed``, ``skipped`` or ``passed``."""
    if case.find("failure") is not None or case.find("error") is not None:
        return "failed"
    # pytest writes an expected failure as a skip; it did run, and did what the test says.
    skip = case.find("skipped")
    if skip is not None and skip.get("type") != "pytest.xfail":
        return "skipped"
    return "passed"


def main() -> int:
    """Print the sum over all files in a folder."""
    if len(sys.argv) != 2:
        print("usage: summary.py FOLDER", file=sys.stderr)
        return 2
    total: Counter[str] = Counter()
    for file in sorted(Path(sys.argv[1]).glob("*.xml")):
        counts: Counter[str] = Counter()
        for case in ElementTree.parse(file).iter("testcase"):  # noqa: S314
            result = outcome(case)
            counts[result] += 1
            if result != "passed":
                print(f"{result}: {case.get('classname')}::{case.get('name')}")
        print(f"{file.stem}: {_line(counts)}")
        total += counts
    print(_line(total))
    return 1 if total["failed"] or not total["passed"] else 0


def _line(counts: Counter[str]) -> str:
    line = f"{counts['passed']} passed, {counts['failed']} failed"
    return line + (f", {counts['skipped']} skipped" if counts["skipped"] else "")


if __name__ == "__main__":
    sys.exit(main())
