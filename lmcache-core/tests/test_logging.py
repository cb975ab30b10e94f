"""The form of log lines, and who prints them."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys

import pytest

from lmcache_core.logging import Seldom


def run(program: str, **environ: str) -> str:
    """What ``program`` writes to standard error in a process of its own."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("LMCACHE_")}
    result = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env={**clean, **environ},
    )
    return result.stderr


HELLO = "from lmcache_core.logging import init_logger\ninit_logger('lmcache_x.y').info('hello')\n"


def test_a_line_has_the_form_that_operators_know() -> None:
    expected = (
        r"\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}\] LMCache INFO: hello \(.*:2:lmcache_x\.y\)\n"
    )
    assert re.fullmatch(expected, run(HELLO))


def test_a_line_is_printed_once_however_often_it_is_set_up() -> None:
    assert run(HELLO + HELLO.replace("'hello'", "'again'")).count("again") == 1


def test_lines_of_core_are_shown_too() -> None:
    program = HELLO + "import logging\nlogging.getLogger('lmcache_core.deep').info('below')"
    assert "below" in run(program)


def test_an_application_that_prints_its_own_lines_gets_them_once() -> None:
    before = "import logging\nlogging.basicConfig(format='app %(message)s', level='INFO')\n"
    assert run(before + HELLO) == "app hello\n"
    after = HELLO.replace("hello", "early") + before + "init_logger('lmcache_x.y').info('hello')"
    assert run(after).endswith("app hello\n")


@pytest.mark.parametrize(("level", "shown"), [("warning", False), ("DEBUG", True), ("", True)])
def test_the_level_comes_from_the_environment(level: str, shown: bool) -> None:
    assert ("hello" in run(HELLO, LMCACHE_LOG_LEVEL=level)) is shown


def test_a_level_that_does_not_exist_is_reported() -> None:
    stderr = run(HELLO, LMCACHE_LOG_LEVEL="LOUD")
    assert "LMCACHE_LOG_LEVEL=LOUD is no log level" in stderr
    assert "hello" in stderr


def test_engines_find_it_under_the_name_that_they_import() -> None:
    from lmcache.utils import init_logger

    assert init_logger("vllm.some.module") is logging.getLogger("vllm.some.module")
    assert logging.getLogger("vllm").handlers == []


def test_what_others_bring_about_is_said_seldom(caplog: pytest.LogCaptureFixture) -> None:
    now = [100.0]
    seldom = Seldom(logging.getLogger("lmcache_core.test"), 30.0, lambda: now[0])
    for _ in range(4):
        seldom.warn("one", "%s came", "somebody %s")
        seldom.warn("two", "twice")
        now[0] += 1.0
    now[0] += 30.0
    seldom.warn("one", "%s came", "again")
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        "somebody %s came",
        "twice",
        "again came (3 more since the last such line)",
    ]
