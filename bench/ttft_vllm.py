"""Time to first token in real vLLM on CPU: what a hit saves, and what a miss costs.

    python3 bench/ttft_vllm.py            about 15 minutes
    python3 bench/ttft_vllm.py --quick    about 4 minutes, wider spread
    python3 bench/ttft_vllm.py --connector none    two equal engines: how far from 1 is noise?

Two ratios, both from the same run:

- hit ÷ miss: a prompt whose whole blocks are stored, by the time of the same prompt before that;
- with ÷ without: an engine with the connector, by one without, on prompts that nobody has seen.

How the second is measured, since it must show 2 % on a shared machine: both engines live in one
process each, and take turns. While one answers a few prompts, one after the other, the other one
waits for input, so they never compete. The order within a pair of turns alternates. A turn ends
when its process is idle: what an engine still stores in the background may slow its own next
prompt, which is part of its price, and never the other's turn. Each turn also measures how much CPU
others used meanwhile; a run goes on until it has enough pairs of turns in quiet, or has tried three
times as many, and then keeps the quietest. Pairs are chosen by others' load, never by their result.
The ratio of a run is that of the medians of its prompts, and each run has fresh processes, because
where memory happens to lie makes two equal processes differ.

Time to first token here is ``LLM.generate`` with one token, in process: no HTTP in either term.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
ENGINE = Path(__file__).with_name("ttft_engine.py")

# A few tokens more than 8 blocks of 128, vLLM's block size on CPU, and 4 chunks of 256: a hit is
# everything but those few.
PROMPT_TOKENS = 1030
WHOLE_TOKENS = 1024
VOCABULARY = range(1000, 40000)
WARM_UP_PROMPTS = 3
# CPUs that others may use on average during a pair of turns that counts as quiet. Kernel threads
# and the measuring process alone come to about 0.02.
QUIET_CPUS = 0.05
ATTEMPTS = 3

TRANSFER: dict[str, Callable[[str], dict[str, Any] | None]] = {
    "lmcache": lambda _: {"kv_connector": "LMCacheConnectorV1", "kv_role": "kv_both"},
    "example": lambda folder: {
        "kv_connector": "ExampleConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"shared_storage_path": folder},
    },
    "none": lambda _: None,
}


class BenchError(Exception):
    """A measurement would not mean what its name says. The message says why."""


@dataclass(frozen=True)
class Turn:
    """Prompts answered one after the other."""

    seconds: list[float]
    cached: list[int]
    """Tokens of each prompt that weren't computed."""
    others_cpus: float
    """How many CPUs other processes used meanwhile, on average."""


class Engine:
    """A process with one engine, which works only when asked."""

    def __init__(self, command: Sequence[str], env: dict[str, str], log: Path) -> None:
        self._log = log
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                list(command),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                env=env,
                cwd=log.parent,
                text=True,
            )

    def wait_ready(self) -> None:
        self._read()

    def turn(self, prompts: Sequence[Sequence[int]]) -> Turn:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(prompts) + "\n")
        self._process.stdin.flush()
        return Turn(**json.loads(self._read()))

    def close(self) -> None:
        # The end of its input ends it. Nothing else can, if it hangs, except a signal.
        with contextlib.suppress(OSError):
            self._process.stdin.close()  # type: ignore[union-attr]
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _read(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            tail = "\n".join(self._log.read_text(errors="replace").splitlines()[-30:])
            raise BenchError(f"the engine has ended:\n{tail}")
        return line


@dataclass(frozen=True)
class Pair:
    """Seconds of each prompt in adjacent turns on the same new prompts."""

    without: list[float]
    present: list[float]
    hit: list[float]
    others_cpus: float


@dataclass(frozen=True)
class Run:
    """What one pair of fresh processes showed: the quiet pairs of turns, as one."""

    without: list[float]
    present: list[float]
    hit: list[float]
    others_cpus: float

    @property
    def overhead(self) -> float:
        return statistics.median(self.present) / statistics.median(self.without)

    @property
    def saved(self) -> float | None:
        if not self.hit:
            return None
        return statistics.median(self.hit) / statistics.median(self.present)


def _joined(lists: Iterable[list[float]]) -> list[float]:
    return [seconds for one in lists for seconds in one]


def measure(engines: Sequence[Engine], turns: int, per_turn: int, seed: int, hits: bool) -> Run:
    """Let the engine without the connector and the one with it take turns.

    Raises:
        BenchError: a prompt that should be new was found, or one that was stored was not.
    """
    rng = random.Random(seed)

    def prompts(count: int) -> list[list[int]]:
        return [rng.choices(VOCABULARY, k=PROMPT_TOKENS) for _ in range(count)]

    for one in engines:
        warm = prompts(WARM_UP_PROMPTS)
        one.turn(warm)
        one.turn(warm)
    pairs: list[Pair] = []
    for number in range(turns * ATTEMPTS):
        pairs.append(_pair(engines, prompts(per_turn), bool(number % 2), hits))
        if sum(pair.others_cpus <= QUIET_CPUS for pair in pairs) == turns:
            break
    quiet = sorted(pairs, key=lambda pair: pair.others_cpus)[:turns]
    return Run(
        without=_joined(pair.without for pair in quiet),
        present=_joined(pair.present for pair in quiet),
        hit=_joined(pair.hit for pair in quiet),
        others_cpus=statistics.median(pair.others_cpus for pair in quiet),
    )


def _pair(engines: Sequence[Engine], new: list[list[int]], swapped: bool, hits: bool) -> Pair:
    if swapped:
        present, without = (one.turn(new) for one in reversed(engines))
    else:
        without, present = (one.turn(new) for one in engines)
    if any(without.cached + present.cached):
        raise BenchError(f"prompts that nobody has seen hit {without.cached} {present.cached}")
    hit: list[float] = []
    if hits:
        again = engines[1].turn(new)
        if min(again.cached) < WHOLE_TOKENS:
            raise BenchError(f"prompts that were stored hit {again.cached}, not {WHOLE_TOKENS}")
        hit = again.seconds
    others = max(without.others_cpus, present.others_cpus)
    return Pair(without.seconds, present.seconds, hit, others)


@contextlib.contextmanager
def pair(arguments: argparse.Namespace, work: Path) -> Iterator[list[Engine]]:
    """Fresh engines, without the connector and with it, ended on the way out."""
    storage = work / "storage"
    storage.mkdir()
    engines: list[Engine] = []
    try:
        for name, connector in (("without", "none"), ("with", arguments.connector)):
            transfer = json.dumps(TRANSFER[connector](str(storage)))
            command = [str(arguments.python), str(ENGINE), str(arguments.model), transfer]
            one = Engine(command, _environment(), work / f"{name}.log")
            engines.append(one)
            # One after the other: starting takes all cores, and vLLM measures free memory.
            one.wait_ready()
        yield engines
    finally:
        for one in engines:
            one.close()


def _environment() -> dict[str, str]:
    # LMCACHE_ settings are the user's to measure with, except those that are meant for the tools.
    tools = ("LMCACHE_ENVS", "LMCACHE_VLLM_PYTHON")
    kept = {k: v for k, v in os.environ.items() if not k.startswith("VLLM_") and k not in tools}
    return {
        "LMCACHE_MAX_LOCAL_CPU_SIZE": "1",
        "LMCACHE_CHUNK_SIZE": "256",
        **kept,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        # By itself vLLM leaves one more core free where there is a connector.
        "VLLM_CPU_OMP_THREADS_BIND": _cores(),
    }


def _cores() -> str:
    if sys.platform != "linux":
        return "auto"
    return ",".join(map(str, sorted(os.sched_getaffinity(0))))


def result(
    name: str, value: Sequence[float], base: Sequence[float], ratios: Sequence[float]
) -> Any:
    """One line of the table: times are medians of all prompts, the ratio is the runs' median."""
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return {
        "name": name,
        "value": round(statistics.median(value) * 1e3, 2),
        "unit": "ms",
        "calibration": round(statistics.median(base) * 1e3, 2),
        "ratio": round(statistics.median(ratios), 4),
        "runs": len(ratios),
        "spread": round(high - low, 4),
    }


def results(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Both ratios, the second only if hits were measured."""
    without, present, hit = (
        _joined(run.without for run in runs),
        _joined(run.present for run in runs),
        _joined(run.hit for run in runs),
    )
    name = "ttft, connector present, nothing reused / no connector"
    lines = [result(name, present, without, [run.overhead for run in runs])]
    saved = [run.saved for run in runs if run.saved is not None]
    if saved:
        lines.append(result("ttft, hit / miss", hit, present, saved))
    return lines


def table(lines: Sequence[dict[str, Any]]) -> str:
    """What people read. Spread is the interquartile range of the runs' ratios."""
    head = f"{'':56}{'ms':>10}{'base ms':>10}{'ratio':>9}{'IQR':>9}{'runs':>6}"
    rows = [
        f"{x['name']:56}{x['value']:10.1f}{x['calibration']:10.1f}"
        f"{x['ratio']:9.4f}{x['spread']:9.4f}{x['runs']:6}"
        for x in lines
    ]
    return "\n".join([head, *rows])


def parse() -> argparse.Namespace:
    """Read the command line; prepare what isn't named there."""
    parser = argparse.ArgumentParser(description="Time to first token in vLLM on CPU.")
    parser.add_argument("--python", type=Path, help="has vLLM and our packages (default: prepare)")
    parser.add_argument("--model", type=Path, help="directory (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--connector", choices=TRANSFER, default="lmcache")
    parser.add_argument("--quick", action="store_true", help="3 runs of 5 turns")
    parser.add_argument("--runs", type=int, help="pairs of fresh processes (default: 7)")
    parser.add_argument("--turns", type=int, help="per run and engine (default: 12)")
    parser.add_argument("--prompts", type=int, default=3, help="in a turn")
    parser.add_argument("--json", type=Path, help="write the results here too")
    arguments = parser.parse_args()
    arguments.runs = arguments.runs or (3 if arguments.quick else 7)
    arguments.turns = arguments.turns or (5 if arguments.quick else 12)
    if arguments.runs < 2:
        parser.error("--runs: a spread needs at least 2")
    sys.path.insert(0, str(REPOSITORY / "tools"))
    if arguments.python is None:
        from engine_env import overlay, shared_environment

        arguments.python = overlay(shared_environment())
    if arguments.model is None:
        command = [str(arguments.python), str(REPOSITORY / "tools" / "models.py"), "smollm2"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        arguments.model = Path(done.stdout.strip())
    return arguments


def main() -> int:
    """Measure, print the table and the JSON list."""
    # The default action would leave the engines and their folder behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    arguments = parse()
    runs: list[Run] = []
    began = time.monotonic()
    for number in range(arguments.runs):
        with (
            tempfile.TemporaryDirectory(prefix="ttft-vllm-") as work,
            pair(arguments, Path(work)) as engines,
        ):
            run = measure(
                engines,
                arguments.turns,
                arguments.prompts,
                seed=number,
                hits=arguments.connector != "none",
            )
        runs.append(run)
        saved = "" if run.saved is None else f", hit/miss {run.saved:.4f}"
        busy = "" if run.others_cpus <= QUIET_CPUS else f", others used {run.others_cpus:.2f} CPUs"
        print(
            f"run {number + 1}/{arguments.runs}, {time.monotonic() - began:.0f} s: "
            f"with/without {run.overhead:.4f}{saved}{busy}",
            file=sys.stderr,
            flush=True,
        )
    if any(run.others_cpus > QUIET_CPUS for run in runs):
        print("this machine was busy: don't trust the last digits", file=sys.stderr)
    lines = results(runs)
    print(table(lines))
    text = json.dumps(lines, indent=2)
    print(text)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BenchError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
