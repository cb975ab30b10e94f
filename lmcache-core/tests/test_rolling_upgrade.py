"""Versions and serdes side by side in a store: nobody deletes, misreads or misses for it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from lm_server import RunningServer

from lmcache_core.chunks.frame import VERSION

WORKER = Path(__file__).parent / "servers" / "upgrade_worker.py"
PROMPTS, CHUNKS = 125, 8
INSTANCES = [(VERSION, "raw"), (VERSION + 1, "raw"), (VERSION, "raw+raw")]


def run(action: str, assignments: list[str]) -> list[dict[str, object]]:
    """All instances at the same time."""
    running = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(version), serde, action, str(PROMPTS), *assignments],
            stdout=subprocess.PIPE,
            text=True,
        )
        for version, serde in INSTANCES
    ]
    answers = [process.communicate(timeout=300)[0] for process in running]
    assert [process.returncode for process in running] == [0] * len(INSTANCES)
    return [json.loads(answer) for answer in answers]


@pytest.fixture(params=["filesystem", "lm"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[list[str]]:
    """How the store is configured."""
    if request.param == "filesystem":
        folder = tmp_path / "kv"
        yield [
            "backends.shared.type=filesystem",
            f"backends.shared.path={folder}",
            "backends.shared.min_free_gib=0",
        ]
        files = list(folder.glob("*/??/*"))
        assert len(files) == PROMPTS * CHUNKS * len(INSTANCES)
    else:
        server = RunningServer("--memory-gib", "0.1")
        try:
            yield [
                "backends.shared.type=lm",
                "backends.shared.host=localhost",
                f"backends.shared.port={server.port}",
            ]
        finally:
            server.stop()


def test_a_thousand_chunks_of_each(store: list[str]) -> None:
    """Two versions and two serdes write the same prompts at once; each reads its own, all of it."""
    run("store", store)
    for _ in range(2):  # reading deletes nothing
        for answer in run("load", store):
            assert answer["hits"] == PROMPTS * CHUNKS
            assert answer["wrong"] == 0
            assert not any("rejected" in str(name) for name in dict(answer["counted"]))  # type: ignore[call-overload]
