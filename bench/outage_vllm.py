"""Real vLLM while its store is killed and stopped every 5 s: are texts right, does it ever stand?

    .venv/bin/python bench/outage_vllm.py                     about 15 minutes
    .venv/bin/python bench/outage_vllm.py --stores redis --modes async --seconds 300 --seed 7

Three hundred requests with shared prefixes come in bursts; some are aborted while they wait, others
after a few tokens; the engine has KV memory for some of a burst, so that it preempts. Host memory
holds a part of the prefixes: most hits come from the store. That one is stopped (SIGSTOP), and
killed (SIGKILL) and started again with its data and without, in turn. One engine for each store and
way of loading, with the connector's defaults, and one without a connector on the same requests. In
float32 no token hangs on what else was computed at the same time.

Printed for each: how many requests were aborted, preempted, and differ from the texts of an engine
without a connector that computes all of them (an aborted one's must be how its text begins);
outages; prompt tokens that weren't computed, and chunks that came from the store; the longest call
of the engine, `step`, `add_request` and `abort_request` alike, not counting what a canary in
another process lost meanwhile; and how long the engine took to end.

Exit status 1: a text differs, a request was lost, something is held for requests that have ended, a
call took more than a second longer than the engine's own longest, or ending took longer than it
may. Also if it shows nothing: no preemption, no outage, or no chunk from the store.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

from measuring import machine
from ttft_vllm import REPOSITORY, BenchError, prepare

for _tests in (
    "tools",
    "lmcache-core/tests/servers",
    "lmcache-backend-lm/tests/servers",
    "lmcache-backend-redis/tests",
):
    sys.path.insert(0, str(REPOSITORY / _tests))

from faulting.canary import Canary  # noqa: E402
from faulting.places import Lm, LmUnix, Redis, Served, stopped  # noqa: E402

ENGINE = Path(__file__).with_name("outage_engine.py")
MODES: dict[str, dict[str, object]] = {
    "sync": {},
    "async": {"enable_async_loading": True},
    "layerwise": {"use_layerwise": True},
}
STORES: dict[str, Callable[[Path, random.Random], Served]] = {
    "lm-tcp": Lm,
    "lm-unix": LmUnix,
    "redis": Redis,
}
KINDS = ("stopped", "killed", "stopped", "killed and emptied")
BURST = 20
DOCUMENTS, LONGEST, MAX_TOKENS = 12, 450, 32
"""A prompt is the beginning of a document, and a question about it that nobody has asked."""
BLOCK_TOKENS, BLOCKS = 32, 56
"""A burst takes some 190 blocks, and each of its requests one more while it generates."""
CHUNK_TOKENS = 16
HOST_GIB = 0.006
"""92 chunks of the tiny model; the documents have more than twice as many."""
ABOVE_S = 1.0
"""What a call may take longer than the engine's own longest."""
ENDS_S = 2 * 10.0 * 1.1
"""`blocking_timeout_secs`, which closing has, for each half of the connector, and a tenth."""
REMEMBERED = 1 << 20
"""Of the canary: an hour of losses, which are looked at when an engine is done."""
WAIT_S = 3600.0
"""For an engine that may share its machine."""


@dataclass(frozen=True)
class Request:
    """What `outage_engine` is told of one. Aborted at ``tokens``, or ``leaves_s`` after it came."""

    prompt: list[int]
    at_s: float
    max_tokens: int = MAX_TOKENS
    tokens: int | None = None
    leaves_s: float | None = None

    @property
    def is_aborted(self) -> bool:
        return self.tokens is not None or self.leaves_s is not None


def requests_of(count: int, seconds: float, seed: int) -> list[Request]:
    """``count`` requests in bursts over ``seconds``; a fifth is aborted."""
    dice = random.Random(seed)
    bursts = -(-count // BURST)
    documents = [_fresh(dice, dice.randrange(LONGEST // 2, LONGEST)) for _ in range(DOCUMENTS)]
    found = []
    for index in range(count):
        document = dice.choice(documents)
        prompt = document[: dice.randrange(len(document) // 2, len(document) + 1)]
        prompt += _fresh(dice, dice.randrange(1, 60))
        at_s = (index // BURST + dice.random() / 5) * seconds / bursts
        way = dice.random()
        found.append(
            Request(
                prompt,
                at_s,
                tokens=dice.randrange(1, MAX_TOKENS // 2) if way < 0.1 else None,
                leaves_s=dice.uniform(0, 2) if 0.1 <= way < 0.2 else None,
            )
        )
    return sorted(found, key=lambda one: one.at_s)


def _fresh(dice: random.Random, count: int) -> list[int]:
    """Tokens that nobody has seen."""
    return [dice.randrange(10, 1000) for _ in range(count)]


# -- what is done to the store -----------------------------------------------------------------


class Outages:
    """Has a store stopped and killed in turn, until the ``with`` ends; then it works again."""

    def __init__(self, store: Served, every_s: float, seed: int) -> None:
        self.counts: Counter[str] = Counter()
        self._store = store
        self._every_s = every_s
        self._dice = random.Random(seed)
        self._ends = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="outages", daemon=True)

    def __enter__(self) -> Outages:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ends.set()
        self._thread.join()
        if self._error is not None and error[0] is None:
            raise BenchError(f"the store didn't come back: {self._error}") from self._error

    def _run(self) -> None:
        try:
            due = time.monotonic()
            for kind in cycle(KINDS):
                due += self._every_s
                if self._ends.wait(due - time.monotonic()):
                    return
                self._harm(kind, self._dice.uniform(0.1, 0.8) * self._every_s)
                self.counts[kind] += 1
        except BaseException as error:  # noqa: BLE001 - told at the end
            self._error = error

    def _harm(self, kind: str, down_s: float) -> None:
        if kind == "stopped":
            stopped(self._store.pid, down_s)
            return
        self._store.kill()
        self._ends.wait(down_s)
        if kind == "killed and emptied":
            self._store.forget()
        self._store.start()


def section(store: Served) -> dict[str, object]:
    """How the engine is told of it: an address, and nothing but defaults."""
    if isinstance(store, Redis):
        return {"type": "redis", "url": f"redis://127.0.0.1:{store.target}"}
    if isinstance(store, LmUnix):
        return {"type": "lm", "path": str(store.target)}
    return {"type": "lm", "host": "127.0.0.1", "port": store.target}


# -- engines -----------------------------------------------------------------------------------


class Engines:
    """The process of `outage_engine`: does one job after the other, each in a fresh engine."""

    def __init__(self, python: Path, log: Path) -> None:
        self._log = log
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [str(python), str(ENGINE)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                env=environment(),
                cwd=log.parent,
                start_new_session=True,
            )

    def __enter__(self) -> Engines:
        return self

    def __exit__(self, *error: object) -> None:
        # Its group: a job is done by a child.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def do(self, job: dict[str, Any], wait_s: float) -> dict[str, Any]:
        """What became of a job.

        Raises:
            BenchError: the engine died, or nothing came in ``wait_s``.
        """
        self.start(job, wait_s)
        return self.answer(wait_s)

    def start(self, job: dict[str, Any], wait_s: float) -> None:
        """Begin a job; over when its requests begin to come. Raises as `do`."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(job).encode() + b"\n")
        self._process.stdin.flush()
        self.answer(wait_s)

    def answer(self, wait_s: float) -> dict[str, Any]:
        """What the engine says next. Raises as `do`."""
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            line = self._process.stdout.readline() if selector.select(wait_s) else b""
        answer: dict[str, Any] = json.loads(line) if line else {"died": "without a word"}
        if "died" in answer:
            tail = "\n".join(self._log.read_text(errors="replace").splitlines()[-60:])
            raise BenchError(f"the engine died ({answer['died']}):\n{tail}")
        return answer


def environment() -> dict[str, str]:
    """An engine's variables: of ours none, whatever the user has set."""
    ours = ("LMCACHE_", "VLLM_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
    return {
        "OMP_WAIT_POLICY": "passive",
        **kept,
        "LMCACHE_LOG_LEVEL": "WARNING",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        # By itself vLLM leaves one more core free where there is a connector.
        "VLLM_CPU_OMP_THREADS_BIND": os.environ.get("VLLM_CPU_OMP_THREADS_BIND", cores),
    }


def job_of(
    model: Path, requests: Sequence[Request], config: Path | None = None, **more: object
) -> dict[str, Any]:
    """A job for `Engines`, with a connector if there is a configuration file."""
    engine: dict[str, object] = {
        "model": str(model),
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 1024,
        "block_size": BLOCK_TOKENS,
        "enable_prefix_caching": False,
        **more,
    }
    if config is not None:
        engine["kv_transfer_config"] = {"kv_connector": "LMCacheConnectorV1", "kv_role": "kv_both"}
    return {
        "engine": engine,
        "environ": {} if config is None else {"LMCACHE_CONFIG_FILE": str(config)},
        "requests": [asdict(one) for one in requests],
    }


# -- what is said about it ---------------------------------------------------------------------


@dataclass
class Row:
    """What one engine showed."""

    name: str
    preempted: int
    aborted: int
    hit_tokens: int
    store_chunks: int
    outages: dict[str, int]
    longest_s: float
    """The engine's longest call, without what the canary lost."""
    differing: list[int]
    lost: list[int]
    left: list[str]
    close_s: float
    metrics: dict[str, float]

    def wrong(self, own_s: float | None) -> list[str]:
        """What mustn't be, and what makes it show nothing; ``own_s``: the engine's own longest."""
        found = [f"request {index} has another text" for index in self.differing]
        found += [f"request {index} was lost" for index in self.lost]
        found += [f"held for nobody: {what}" for what in self.left]
        if not self.preempted:
            found.append("nothing was preempted: KV memory was never full")
        if self.store_chunks == 0:
            found.append("no chunk came from the store")
        if not self.outages:
            found.append("there was no outage")
        if self.close_s > ENDS_S:
            found.append(f"ending took {self.close_s:.1f} s")
        if own_s is not None and self.longest_s > own_s + ABOVE_S:
            found.append(f"a call took {self.longest_s:.2f} s, the engine's own {own_s:.2f} s")
        return found


def row_of(
    name: str,
    answer: dict[str, Any],
    requests: Sequence[Request],
    texts: Sequence[list[int]],
    outages: Mapping[str, int],
    lost: Callable[[float, float], float],
) -> Row:
    """Compare an engine's answer with the texts, and its slow calls with the canary."""
    answers, metrics = answer["requests"], answer["metrics"]
    pairs = list(zip(answers, requests, texts, strict=True))
    slow = [ended - began - lost(began, ended) for _, began, ended in answer["slow"]]
    loaded = {key: count for key, count in metrics.items() if key.startswith("lmcache_load_chunks")}
    return Row(
        name,
        preempted=int(metrics.get("num_preemptions", 0)),
        aborted=sum(one["reason"] == "aborted" for one in answers),
        hit_tokens=sum(one["cached"] for one in answers),
        store_chunks=int(sum(count for key, count in loaded.items() if not key.endswith(" host"))),
        outages=dict(outages),
        longest_s=max(slow) if slow else answer["longest_s"],
        differing=[
            index
            for index, (one, _, text) in enumerate(pairs)
            if one["tokens"] != (text if one["reason"] == "length" else text[: len(one["tokens"])])
        ],
        lost=[
            index
            for index, (one, request, _) in enumerate(pairs)
            if one["reason"] != "length" and not (request.is_aborted and one["reason"] == "aborted")
        ],
        left=answer["left"],
        close_s=answer["close_s"],
        metrics=metrics,
    )


HEAD = ("engine", "preempted", "aborted", "outages", "hit tokens", "of the store", "differ")
HEAD += ("lost", "longest call", "ended in")


def shown(row: Row) -> str:
    """A line of the table."""
    cells = (
        *(row.preempted, row.aborted, sum(row.outages.values()), row.hit_tokens, row.store_chunks),
        *(
            len(row.differing),
            len(row.lost),
            f"{row.longest_s * 1e3:.0f} ms",
            f"{row.close_s:.1f} s",
        ),
    )
    return f"{row.name:20}" + "".join(f"{cell!s:>14}" for cell in cells)


# -- the program -------------------------------------------------------------------------------


class Run:
    """One engine after the other, as the command line says."""

    def __init__(self, arguments: argparse.Namespace, work: Path) -> None:
        self._arguments = arguments
        self._work = work
        self._requests = requests_of(arguments.requests, arguments.seconds, arguments.seed)
        self._canary = Canary(remembered=REMEMBERED)
        self._canary.start()
        self._sources: list[str] = []
        self.rows: list[Row] = []
        self.wrong: list[str] = []

    def go(self) -> None:
        """All of it; prints as it goes."""
        arguments = self._arguments
        with Engines(arguments.python, self._work / "engine.log") as engines:
            answers, own_s = self._without(engines)
            texts = [one["tokens"] for one in answers]
            for store in arguments.stores:
                for mode in arguments.modes:
                    self._one(engines, store, mode, texts, own_s)

    def _without(self, engines: Engines) -> tuple[list[dict[str, Any]], float | None]:
        """What every request is answered without a connector; and that engine's longest call."""
        arguments, requests = self._arguments, self._requests
        print(f"{'':20}" + "".join(f"{cell:>14}" for cell in HEAD[1:]), flush=True)
        answers, own_s = [{"reason": None} for _ in requests], None
        if not arguments.no_steps:
            job = job_of(arguments.model, requests, num_gpu_blocks_override=BLOCKS)
            answer = engines.do(job, WAIT_S)
            answers = answer["requests"]
            own_s = self._row("without", answer, [one["tokens"] for one in answers], {}).longest_s
        due = [index for index, one in enumerate(answers) if one["reason"] != "length"]
        calm = [Request(requests[index].prompt, 0.0) for index in due]
        rest = engines.do(job_of(arguments.model, calm), WAIT_S)["requests"] if calm else []
        for index, one in zip(due, rest, strict=True):
            answers[index] = one
        if any(one["reason"] != "length" for one in answers):
            raise BenchError("an engine without a connector didn't answer every request")
        return answers, own_s

    def _one(
        self, engines: Engines, store: str, mode: str, texts: list[list[int]], own_s: float | None
    ) -> None:
        arguments, name = self._arguments, f"{store}, {mode}"
        folder = self._work / f"{store}-{mode}"
        with running(STORES[store], folder, arguments.seed) as served:
            config = folder / "lmcache.yaml"
            options = {"chunk_size": CHUNK_TOKENS, "max_local_cpu_size": HOST_GIB, **MODES[mode]}
            config.write_text(json.dumps({**options, "backends": {"store": section(served)}}))
            job = job_of(arguments.model, self._requests, config, num_gpu_blocks_override=BLOCKS)
            engines.start(job, WAIT_S)
            with Outages(served, arguments.every, arguments.seed) as outages:
                answer = engines.answer(WAIT_S)
        row = self._row(name, answer, texts, outages.counts)
        self.wrong += [f"{name}: {what}" for what in row.wrong(own_s)]
        if answer["sources"] != self._sources:
            self._sources = answer["sources"]
            print("sources:", *self._sources, file=sys.stderr, flush=True)

    def _row(
        self, name: str, answer: dict[str, Any], texts: list[list[int]], outages: Mapping[str, int]
    ) -> Row:
        row = row_of(name, answer, self._requests, texts, outages, self._canary.lost_between)
        self.rows.append(row)
        print(shown(row), flush=True)
        return row


@contextlib.contextmanager
def running(
    make: Callable[[Path, random.Random], Served], folder: Path, seed: int
) -> Iterator[Served]:
    """A store; ended on the way out."""
    store = make(folder, random.Random(seed))
    try:
        yield store
    finally:
        store.close()


def arguments_given() -> argparse.Namespace:
    """Read the command line."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--requests", type=int, default=300)
    options.add_argument("--seconds", type=float, default=60.0, help="in which they come")
    options.add_argument("--every", type=float, default=5.0, help="seconds from outage to outage")
    options.add_argument("--stores", nargs="+", choices=STORES, default=list(STORES))
    options.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    options.add_argument("--seed", type=int, default=1, help="of requests and outages")
    options.add_argument("--no-steps", action="store_true", help="don't judge how long calls take")
    options.add_argument("--python", type=Path, help="has vLLM and our packages (default: prepare)")
    options.add_argument("--model", type=Path, help="directory (default: the tiny one)")
    options.add_argument("--work", type=Path, help="keep logs and stores' data here")
    options.add_argument("--json", type=Path, metavar="FILE", help="write the rows here too")
    arguments = options.parse_args()
    prepare(arguments, "tiny")
    return arguments


def main() -> int:
    """Run, print the table, say what is wrong."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    arguments = arguments_given()
    print(f"{machine()}, seed {arguments.seed}", flush=True)
    with contextlib.ExitStack() as stack:
        if arguments.work is None:
            work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="outage-")))
        else:
            work = arguments.work
            work.mkdir(parents=True, exist_ok=True)
        run = Run(arguments, work)
        run.go()
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([asdict(row) for row in run.rows], indent=1))
    for what in run.wrong:
        print(f"WRONG: {what}")
    if not run.wrong:
        print("no text differs, no request was lost, nothing stood still")
    return 1 if run.wrong else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BenchError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
