"""What holds for all test suites of this repository: a part of the system that is missing is a
failure with one line.
"""

from __future__ import annotations

from collections.abc import Generator

import pytest
from system_packages import Missing


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
