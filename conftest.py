"""What holds for all test suites of this repository: a part of the system that is missing is a
failure with one line, and vLLM's cache is one for all.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from pathlib import Path

import pytest
from system_packages import Missing

# vLLM starts an interpreter of its own to find out what a class of models can do, and remembers it
# there. So this is everybody's, whichever cache folder a test gives to us.
os.environ.setdefault(
    "VLLM_CACHE_ROOT",
    str(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vllm"),
)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    call: pytest.CallInfo[None],
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if call.excinfo is not None and isinstance(call.excinfo.value, Missing):
        report.longrepr = call.excinfo.getrepr(style="value", chain=False)
        # A fixture may have asked for it. The test has failed all the same: setting it up hasn't.
        report.when = "call"
    return report
