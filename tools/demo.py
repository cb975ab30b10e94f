"""Shows one thing: a real vLLM server stops prefilling the same prefix twice.

    python3 tools/demo.py

Starts vLLM on a small real model twice, first as it is, then with LMCache, and sends the same two
overlapping prompts to both. vLLM's own prefix caching is off in both, so that every hit is
LMCache's; and both compute in float32: in bf16, on a CPU without instructions for it, a prefix that
isn't computed again changes greedy texts, whoever caches it. Ends with 0 only if the second prompt
hit and every text is the one that was computed without a cache. Needs nothing installed; what it
needs besides is prepared on first use, outside the clone.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from engine_env import overlay, shared_environment
from prepared import REPOSITORY, PreparationError, say

# Nothing is installed here, and what is imported of core needs nothing.
sys.path.insert(0, str(REPOSITORY / "lmcache-core" / "src"))
sys.path.insert(0, str(REPOSITORY / "tests" / "vllm"))

from server import Completion, ServerError, VllmServer

CHUNK_TOKENS = 8
"""For this demonstration; the default of 256 is right in production."""
MAX_TOKENS = 32
CONNECTOR = {"kv_connector": "LMCacheConnectorV1", "kv_role": "kv_both"}
HITS = "vllm:lmcache_load_tokens_total"
"""What was loaded. vLLM's own counts say what was scheduled to be, also where that failed."""
LOGS = REPOSITORY / "build" / "demo"
BEGINNING = (
    "Qwen3 is the latest generation of large language models in Qwen series, offering a "
    "comprehensive suite of dense and mixture-of-experts"
)


@dataclass(frozen=True)
class Answer:
    """One prompt's completion, and how many of its tokens came from outside the engine."""

    completion: Completion
    hit_tokens: int


def prompts() -> list[str]:
    """Two prompts with a long shared beginning: a text of some 2,500 tokens and one sentence."""
    # What a long system prompt or a document would be. This file is there, long, and never changes.
    document = (REPOSITORY / "LICENSE").read_text()
    return [f"{document}\n\n{BEGINNING}", f"{document}\n\n{BEGINNING} (MoE) models"]


def serve(
    python: Path,
    model: Path,
    name: str,
    arguments: Sequence[str] = (),
    environ: Mapping[str, str] | None = None,
) -> tuple[list[Answer], str]:
    """Start one server, send it the prompts, one after the other, and stop it.

    Returns the answers and the server's log.
    """
    server = VllmServer(
        python,
        model,
        LOGS / f"{name}.log",
        arguments=[
            *("--enforce-eager", "--max-model-len", "4096", "--dtype", "float32"),
            *("--no-enable-prefix-caching", *arguments),
        ],
        environ=environ or {},
        progress=lambda message: say(f"    {message}"),
    )
    answers = []
    with server:
        # The first request of a server pays for what is only set up then.
        server.complete("Once upon a time", max_tokens=4)
        for prompt in prompts():
            before = server.metric(HITS)
            completion = server.complete(prompt, max_tokens=MAX_TOKENS)
            answers.append(Answer(completion, int(server.metric(HITS) - before)))
        log = server.log_text()
    return answers, log


def report(without: Sequence[Answer], cached: Sequence[Answer]) -> bool:
    """Print what was seen; say whether it is what was promised."""
    print(f"{'':>10}  prompt tokens  hit tokens  TTFT without  TTFT with  greedy text")
    for number, (plain, ours) in enumerate(zip(without, cached, strict=True), 1):
        same = ours.completion.token_ids == plain.completion.token_ids
        print(
            f"request {number:>2}  {ours.completion.prompt_tokens:>13}  {ours.hit_tokens:>10}"
            f"  {plain.completion.ttft_s:>10.3f} s  {ours.completion.ttft_s:>7.3f} s"
            f"  {'the same' if same else 'DIFFERENT'}"
        )
        if not same:
            print(f"  without: {plain.completion.text!r}\n  with:    {ours.completion.text!r}")
    print(f"\nrequest  2 continued: {cached[-1].completion.text!r}")
    hit = cached[-1].hit_tokens > 0
    if not hit:
        print("request 2 did not hit")
    return hit and all(
        ours.completion.token_ids == plain.completion.token_ids
        for plain, ours in zip(without, cached, strict=True)
    )


def main() -> int:
    """Prepare, run both servers, report."""
    # As on Ctrl-C: leave the blocks that servers run in, so that they end.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        say("1. Environment and model (minutes on the first run, then nothing)")
        python = overlay(shared_environment())
        made = subprocess.run(
            [str(python), str(REPOSITORY / "tools" / "models.py"), "smollm2"],
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        )
        if made.returncode:
            return made.returncode
        model = Path(made.stdout.strip().splitlines()[-1])
        say("2. vLLM without LMCache")
        without, _ = serve(python, model, "without")
        say(f"3. vLLM with LMCache, LMCACHE_CHUNK_SIZE={CHUNK_TOKENS}")
        cached, log = serve(
            python,
            model,
            "with",
            ["--kv-transfer-config", json.dumps(CONNECTOR)],
            {"LMCACHE_CHUNK_SIZE": str(CHUNK_TOKENS)},
        )
    except (PreparationError, ServerError) as error:
        say(f"error: {error}")
        return 1
    print("\nWhat the server with LMCache logged about the two requests:\n")
    for line in log.splitlines():
        if "LMCache" in line and any(w in line for w in ("Reqid", "Retrieved", "Stor")):
            print(f"  {line}")
    print()
    good = report(without, cached)
    print(f"\n(logs: {os.path.relpath(LOGS)})")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
