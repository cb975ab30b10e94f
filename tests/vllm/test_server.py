"""The harness and the models themselves, without any connector.

If these fail, look here before looking at anything else that runs vLLM.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from server import ServerError, VllmServer

pytestmark = pytest.mark.vllm

ENGINE = Path(sys.executable)


def _runs(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_the_real_model_knows_something(smollm2: Path, tmp_path: Path) -> None:
    """The conversion kept the weights: random ones answer nonsense."""
    log = tmp_path / "vllm.log"
    arguments = ["--enforce-eager", "--max-model-len", "512", "--no-enable-prefix-caching"]
    with VllmServer(ENGINE, smollm2, log, arguments) as server:
        pids = server.pids()
        assert len(pids) > 1
        answer = server.complete("The capital of France is", max_tokens=5)
        assert "Paris" in answer.text
        assert len(answer.token_ids) == 5
        assert answer.finish_reason == "length"
        assert answer.prompt_tokens == len(server.tokenize("The capital of France is"))
        assert 0 < answer.ttft_s < answer.total_s
        assert server.metric("vllm:generation_tokens_total") == 5
        with pytest.raises(ServerError, match="HTTP 400"):
            server.complete([1] * 600)
    assert not [pid for pid in pids if _runs(pid)]


def test_a_server_that_cannot_start_says_why(tiny: Path, tmp_path: Path) -> None:
    server = VllmServer(ENGINE, tiny, tmp_path / "vllm.log", ["--no-such-option"])
    with pytest.raises(ServerError, match=r"(?s)exit code 2.*no-such-option"):
        server.start()
