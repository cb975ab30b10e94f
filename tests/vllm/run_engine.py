"""Runs prompts through real vLLM engines in this process, one case after another.

    python run_engine.py CASES.json RESULTS.json

Runs in the engine environment. A case: name, engine (arguments of ``vllm.LLM``), environ, prompts,
wave (prompts at a time), max_tokens, restarts. Its result: for each prompt the token ids and the
tokens that vLLM took from a cache, and the connector's metrics at the end.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
# Threads that spin while they wait make two engines on two cores crawl.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("KMP_BLOCKTIME", "0")


def run(case: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM, SamplingParams
    from vllm.config import KVTransferConfig

    arguments = dict(case["engine"])
    if transfer := arguments.pop("kv_transfer_config", None):
        arguments["kv_transfer_config"] = KVTransferConfig(**transfer)
    started = time.perf_counter()
    llm = LLM(disable_log_stats=False, seed=0, **arguments)
    ready = time.perf_counter()
    sampling = SamplingParams(
        max_tokens=case["max_tokens"], temperature=0, ignore_eos=True, detokenize=False
    )
    tokens: list[list[int]] = []
    cached: list[int] = []
    prompts = [{"prompt_token_ids": prompt} for prompt in case["prompts"]]
    for start in range(0, len(prompts), case["wave"]):
        for output in llm.generate(prompts[start : start + case["wave"]], sampling, use_tqdm=False):
            tokens.append(list(output.outputs[0].token_ids))
            cached.append(output.num_cached_tokens or 0)
    metrics = {
        metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")
    }
    done = time.perf_counter()
    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()
    return {
        "name": case["name"],
        "tokens": tokens,
        "cached": cached,
        "metrics": metrics,
        "seconds": {"start": ready - started, "run": done - ready},
    }


def main() -> None:
    cases = json.loads(Path(sys.argv[1]).read_text())
    results = []
    before = dict(os.environ)
    for case in cases:
        os.environ.clear()
        os.environ.update(before)
        os.environ.update(case.get("environ", {}))
        for repeat in range(case.get("restarts", 0) + 1):
            result = run(case)
            result["repeat"] = repeat
            results.append(result)
            figures = " ".join(f"{k} {v:.1f} s" for k, v in result["seconds"].items())
            print(f"{case['name']} [{repeat}]: {figures}", flush=True)
            Path(sys.argv[2]).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
