"""Do two vLLM servers share one cache? Asks them, and says so.

    python3 check.py http://localhost:8080 http://localhost:8081

Sends the first server a prompt that nobody has seen before, waits until it is stored, and sends it
to the second one: most of it has to come from the cache, and the greedy answers have to be equal.
Ends with 0 if so, 1 if not, 2 if a server can't be asked. Standard library only.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import urllib.error
import urllib.request
from typing import Any

TOPICS = ("storage", "scheduling", "attention", "networks", "compilers", "caches", "queues")


def prompt_of(words: int) -> str:
    """A text that is new each time, and the same for all who are given it."""
    now = time.time_ns()
    sentences = (
        f"Note {i} of {now} is about {TOPICS[(now + i) % len(TOPICS)]} and why it matters."
        for i in range(words // 10 + 1)
    )
    return " ".join(sentences)


def ask(url: str, prompt: str, tokens: int) -> dict[str, Any]:
    """A greedy completion, and how many prompt tokens the server didn't compute."""
    with urllib.request.urlopen(url + "/v1/models", timeout=30) as answer:
        model = json.load(answer)["data"][0]["id"]
    body = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0}
    request = urllib.request.Request(
        url + "/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    began = time.perf_counter()
    with urllib.request.urlopen(request, timeout=600) as answer:
        found = json.load(answer)
    usage = found["usage"]
    return {
        "text": found["choices"][0]["text"],
        "prompt_tokens": usage["prompt_tokens"],
        "cached_tokens": (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0,
        "seconds": time.perf_counter() - began,
    }


def main(arguments: list[str] | None = None) -> int:
    """Ask both servers and compare."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n", maxsplit=1)[0],
        epilog="The servers need --enable-prompt-tokens-details to say what they didn't compute.",
    )
    parser.add_argument("first", help="address of the server that computes the prompt")
    parser.add_argument("second", help="address of the server that should find it")
    parser.add_argument("--words", type=int, default=600, help="length of the prompt")
    parser.add_argument("--tokens", type=int, default=16, help="length of the answer")
    parser.add_argument("--wait", type=float, default=3.0, help="seconds to store it in")
    options = parser.parse_args(arguments)
    prompt = prompt_of(options.words)
    answers = []
    for place, url in (("first", options.first), ("second", options.second)):
        try:
            answer = ask(url.rstrip("/"), prompt, options.tokens)
        except (urllib.error.URLError, OSError, KeyError, ValueError) as error:
            print(f"{place} server, {url}: {error}", file=sys.stderr)
            return 2
        answers.append(answer)
        print(
            f"{place:6} {url}: {answer['prompt_tokens']} prompt tokens, "
            f"{answer['cached_tokens']} of them from the cache, {answer['seconds']:.2f} s"
        )
        if place == "first":
            time.sleep(options.wait)
    hit = answers[1]["cached_tokens"] * 2 > answers[1]["prompt_tokens"]
    equal = answers[0]["text"] == answers[1]["text"]
    print("answers: " + ("equal" if equal else "DIFFERENT"))
    if not hit:
        print("the second server found less than half of the prompt: they don't share a cache")
    return 0 if hit and equal else 1


if __name__ == "__main__":
    raise SystemExit(main())
