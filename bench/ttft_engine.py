"""One vLLM engine that works only when asked, and says how long it took: half of `ttft_vllm`.

    python ttft_engine.py MODEL TRANSFER      TRANSFER: fields of KVTransferConfig as JSON, or null

Runs in the environment that has vLLM. Knows nothing of what is compared.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

IDLE_CPU_SHARE = 0.05
IDLE_WINDOW_S = 0.05
IDLE_TIMEOUT_S = 30.0


def serve(model: str, transfer: dict[str, Any] | None) -> None:
    """Say what is ready; answer each line of prompts with a line like `Turn`, until input ends."""
    # vLLM and its libraries print to standard output; keep the answers' pipe to ourselves.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    from vllm import LLM, SamplingParams
    from vllm.config import KVTransferConfig

    more = {} if transfer is None else {"kv_transfer_config": KVTransferConfig(**transfer)}
    llm = LLM(
        model,
        dtype="bfloat16",
        enforce_eager=True,
        max_model_len=2048,
        max_num_batched_tokens=2048,
        max_num_seqs=1,
        enable_prefix_caching=False,
        seed=0,
        **more,
    )
    sampling = SamplingParams(max_tokens=1, temperature=0, detokenize=False)
    kernels = "lmcache_kernels.cpu" in sys.modules  # the connector is there: no later import
    print(json.dumps({"kernels": kernels}), file=answers, flush=True)
    for line in sys.stdin:
        seconds, cached = [], []
        began_turn, own, everyone = time.perf_counter(), time.process_time(), _busy_s()
        for prompt in json.loads(line):
            began = time.perf_counter()
            (output,) = llm.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)
            seconds.append(time.perf_counter() - began)
            cached.append(output.num_cached_tokens or 0)
        wall = time.perf_counter() - began_turn
        others = (_busy_s() - everyone - (time.process_time() - own)) / wall
        _wait_idle()
        answer = {"seconds": seconds, "cached": cached, "others_cpus": others}
        print(json.dumps(answer), file=answers, flush=True)


def _busy_s() -> float:
    """Seconds that all CPUs together have worked since boot, or that a hypervisor took from us."""
    try:
        first = Path("/proc/stat").read_text().split("\n", 1)[0]
    except OSError:  # not Linux: nothing is known about others, and every turn counts as quiet
        return time.process_time()
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, first.split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _wait_idle() -> None:
    """Wait until this process, all threads together, uses next to no CPU."""
    deadline = time.monotonic() + IDLE_TIMEOUT_S
    while time.monotonic() < deadline:
        began = time.process_time()
        time.sleep(IDLE_WINDOW_S)
        if time.process_time() - began < IDLE_CPU_SHARE * IDLE_WINDOW_S:
            return


if __name__ == "__main__":
    serve(sys.argv[1], json.loads(sys.argv[2]))
