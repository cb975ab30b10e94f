"""vLLM engines, one after the other, under a load that comes by the clock: half of `outage_vllm`.

    python outage_engine.py      a job a line on standard input, two answers on standard output

Runs in the environment that has vLLM, which is imported once: each job is done by a forked process,
and one that dies costs its own answer only. A job: engine (arguments of ``vllm.LLM``), environ and
requests, in the order in which they come. A request: prompt (token ids), max_tokens, at_s (when it
comes), and ``tokens`` or ``leaves_s``: it is aborted when it has so many, or so long after it came.
The first answer says that requests begin to come, the second what became of them.

Knows nothing about stores, nor about what is compared.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import json
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, TextIO, TypeVar

SLOW_S = 0.05
"""Calls of the engine that take longer are reported with their times."""
STANDS_S = 1.0
"""After so long, the log says where the process's threads stand."""
IDLE_S = 0.001
"""After a step in which nothing could be computed, as vLLM's own loop rests."""
PATIENCE_S = 120.0
"""Where nothing comes of any request for so long, nothing will."""
REST_S = 20.0
_PR_SET_PDEATHSIG = 1
T = TypeVar("T")


class Load:
    """Requests that come and go, and the engine's loop that serves them."""

    def __init__(self, llm: Any, requests: Sequence[dict[str, Any]]) -> None:
        self.answers: list[dict[str, Any]] = [
            {"tokens": [], "reason": None, "cached": 0} for _ in requests
        ]
        self.calls = 0
        self.longest_s = 0.0
        self.slow: list[tuple[str, float, float]] = []
        self._llm = llm
        self._engine = llm.llm_engine
        self._core = llm.llm_engine.engine_core.engine_core
        self._requests = requests
        self._waiting: set[int] = set()
        self._moved_s = 0.0

    def run(self) -> None:
        """Serve until everything has ended, or nothing more will."""
        began = time.monotonic()
        coming = deque(enumerate(self._requests))
        self._moved_s = time.monotonic() + self._requests[-1]["at_s"]
        while time.monotonic() < self._moved_s + PATIENCE_S:
            now = time.monotonic() - began
            while coming and coming[0][1]["at_s"] <= now:
                self._add(coming.popleft()[0])
            for index in [index for index in self._waiting if self._leaves(index, now)]:
                self._abort(index)
            if self._core.scheduler.has_requests():
                self._step()
            elif not coming:
                return
            else:
                time.sleep(IDLE_S)

    def _add(self, index: int) -> None:
        from vllm import SamplingParams

        request = self._requests[index]
        sampling = SamplingParams(
            max_tokens=request["max_tokens"], temperature=0, ignore_eos=True, detokenize=False
        )
        prompt = {"prompt_token_ids": request["prompt"]}
        self._waiting.add(index)
        self._timed("add", self._engine.add_request, str(index), prompt, sampling)

    def _leaves(self, index: int, now: float) -> bool:
        request = self._requests[index]
        leaves_s = request.get("leaves_s")
        return leaves_s is not None and now >= request["at_s"] + leaves_s

    def _abort(self, index: int) -> None:
        self._waiting.discard(index)
        self.answers[index]["reason"] = "aborted"
        self._timed("abort", self._engine.abort_request, [str(index)])

    def _step(self) -> None:
        outputs = self._timed("step", self._engine.step)
        for output in outputs:
            index = int(output.request_id)
            if index not in self._waiting:
                continue
            answer, completion = self.answers[index], output.outputs[0]
            answer["tokens"] = list(completion.token_ids)
            answer["cached"] = output.num_cached_tokens or 0
            enough = self._requests[index].get("tokens")
            if output.finished:
                self._waiting.discard(index)
                answer["reason"] = str(completion.finish_reason)
            elif enough is not None and len(answer["tokens"]) >= enough:
                self._abort(index)
        if outputs:
            self._moved_s = max(self._moved_s, time.monotonic())
        else:
            time.sleep(IDLE_S)

    def _timed(self, name: str, call: Callable[..., T], *args: Any) -> T:
        faulthandler.dump_traceback_later(STANDS_S, file=sys.stderr)
        began = time.monotonic()
        try:
            return call(*args)
        finally:
            ended = time.monotonic()
            faulthandler.cancel_dump_traceback_later()
            self.calls += 1
            self.longest_s = max(self.longest_s, ended - began)
            if ended - began >= SLOW_S:
                self.slow.append((name, began, ended))

    def left(self) -> list[str]:
        """What the connector still holds for requests, all of which have ended; in words."""
        connector = self._core.scheduler.connector
        if connector is None:
            return []
        planner, tracked = connector.scheduler._planner, connector.scheduler._requests
        until = time.monotonic() + REST_S
        number = len(self._requests)
        while planner.leases and time.monotonic() < until:
            # Reports come with steps, and steps with requests.
            self._requests = [*self._requests, {"prompt": [3, 5, 7], "max_tokens": 1, "at_s": 0.0}]
            self.answers.append({"tokens": [], "reason": None, "cached": 0})
            self._add(len(self._requests) - 1)
            while self._core.scheduler.has_requests() and time.monotonic() < until:
                self._step()
            time.sleep(0.1)
        del self.answers[number:]
        found = []
        if planner.leases:
            found.append(f"{planner.leases} leases of host memory")
        if tracked:
            found.append(f"{len(tracked)} requests that the scheduler's half remembers")
        return found


def done(job: dict[str, Any], ready: Callable[[], None]) -> dict[str, Any]:
    """Start an engine, warm it up, say so, serve the job's requests, end it."""
    os.environ.update(job["environ"])
    from vllm import LLM, SamplingParams
    from vllm.config import KVTransferConfig

    arguments = dict(job["engine"])
    if transfer := arguments.pop("kv_transfer_config", None):
        arguments["kv_transfer_config"] = KVTransferConfig(**transfer)
    llm = LLM(disable_log_stats=False, seed=0, **arguments)
    warm = [{"prompt_token_ids": [2 + i] * (40 * i)} for i in range(1, 6)]
    llm.generate(warm, SamplingParams(max_tokens=8, temperature=0, ignore_eos=True), use_tqdm=False)
    before = _metrics(llm)
    load = Load(llm, job["requests"])
    ready()
    load.run()
    left = load.left()
    metrics = {name: value - before.get(name, 0.0) for name, value in _metrics(llm).items()}
    began = time.monotonic()
    llm.llm_engine.engine_core.shutdown()
    return {
        "requests": load.answers,
        "calls": load.calls,
        "longest_s": load.longest_s,
        "slow": load.slow,
        "left": left,
        "metrics": metrics,
        "close_s": time.monotonic() - began,
        "sources": [sys.modules[one].__file__ for one in _OURS if one in sys.modules],
    }


_OURS = ("lmcache_core", "lmcache_connector_vllm")


def _metrics(llm: Any) -> dict[str, float]:
    """Those that are numbers, by name and the values of our own labels."""
    found: dict[str, float] = {}
    for one in llm.get_metrics():
        if hasattr(one, "value"):
            of = [one.labels[label] for label in ("tier", "reason") if label in one.labels]
            name = " ".join([one.name.removeprefix("vllm:"), *of])
            found[name] = found.get(name, 0.0) + one.value
    return found


def main() -> None:
    """Do jobs until there are no more."""
    # vLLM and its libraries print to standard output; keep the answers' pipe to ourselves.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import vllm.model_executor.models.llama
    import vllm.v1.engine.core
    import vllm.v1.worker.cpu_worker  # noqa: F401

    faulthandler.enable()
    _end_with_parent()
    while line := sys.stdin.readline():
        job = json.loads(line)
        if (child := os.fork()) == 0:
            _answer(job, answers)
        _, status = os.waitpid(child, 0)
        if status:
            _say(answers, {"died": os.waitstatus_to_exitcode(status)})


def _answer(job: dict[str, Any], answers: TextIO) -> None:
    """In the forked process, which ends here whatever is left in it."""
    _end_with_parent()
    status = 1
    try:
        _say(answers, done(job, lambda: _say(answers, {"ready": True})))
        status = 0
    except BaseException:  # noqa: BLE001 - its status says so, and the log why
        import traceback

        with contextlib.suppress(Exception):
            traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def _end_with_parent() -> None:
    """Nobody wants answers any more when that one is gone, however it went."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _say(answers: TextIO, answer: dict[str, Any]) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
