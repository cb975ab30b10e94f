"""Time to first token in real vLLM on CPU: what a hit saves, and what a miss costs.

    python3 bench/ttft_vllm.py            about 20 minutes
    python3 bench/ttft_vllm.py --quick    about 2 minutes: one set of processes
    python3 bench/ttft_vllm.py --connector none    two equal engines: how far from 1 is noise?

Ratios, all from the same run, each with the compiled kernels and with the torch reference:

- hit / miss: a prompt whose whole blocks are stored, by the time of the same prompt before that;
- present / without: an engine with the connector, by one without, on prompts that nobody has seen;
- hit, kernels / reference: the same prompts, stored and found, by the two kinds of copying.

How this is measured, since it must show 2 % on a shared machine: engines live in one process each,
and take turns. While one answers a few prompts, one after the other, the others wait for input, so
they never compete. Each round of turns begins with another engine. A turn ends when its process is
idle: what an engine still stores in the background may slow its own next prompt, which is part of
its price, and never another one's turn. Each turn also measures how much CPU others used meanwhile;
a run goes on until it has enough rounds in quiet, or has tried twice as many, and then keeps
the quietest. Rounds are chosen by others' load, never by their result. The ratio of a run is that
of the medians of its prompts, and each run has fresh processes, because where memory happens to lie
makes two equal processes differ. With a single set of processes (``--runs 1``, ``--quick``) rounds
count as runs, and that difference isn't seen. Once it was 12 %.

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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measuring import Report, Result, parse, parser, spread

REPOSITORY = Path(__file__).resolve().parent.parent
ENGINE = Path(__file__).with_name("ttft_engine.py")

# A few tokens more than 8 blocks of 128, vLLM's block size on CPU, and 4 chunks of 256: a hit is
# everything but those few.
PROMPT_TOKENS = 1030
WHOLE_TOKENS = 1024
VOCABULARY = range(1000, 40000)
WARM_UP_PROMPTS = 3
# CPUs that others may use on average during a round of turns that counts as quiet. Kernel threads
# and the measuring process alone come to about 0.02.
QUIET_CPUS = 0.05
ATTEMPTS = 2

TRANSFER: dict[str, Callable[[str], dict[str, Any] | None]] = {
    "lmcache": lambda _: {"kv_connector": "LMCacheConnectorV1", "kv_role": "kv_both"},
    "example": lambda folder: {
        "kv_connector": "ExampleConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"shared_storage_path": folder},
    },
    "none": lambda _: None,
}
DISABLED = "LMCACHE_DISABLE_PLUGINS"
WITHOUT = "without"


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

    def wait_ready(self) -> bool:
        """Answer whether the compiled kernels are loaded."""
        return bool(json.loads(self._read())["kernels"])

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
class Round:
    """Seconds of each prompt, by engine: adjacent turns on the same new prompts."""

    miss: dict[str, list[float]]
    hit: dict[str, list[float]]
    """Empty where hits aren't measured, and without `WITHOUT`, which has none."""
    others_cpus: float

    @classmethod
    def joined(cls, rounds: Sequence[Round]) -> Round:
        """All of them, as one."""
        return cls(
            _joined(one.miss for one in rounds),
            _joined(one.hit for one in rounds),
            statistics.median(one.others_cpus for one in rounds),
        )


def _joined(parts: Iterable[Mapping[str, list[float]]]) -> dict[str, list[float]]:
    whole: dict[str, list[float]] = {}
    for part in parts:
        for name, seconds in part.items():
            whole.setdefault(name, []).extend(seconds)
    return whole


def measure(
    engines: dict[str, Engine], turns: int, per_turn: int, seed: int, hits: bool
) -> list[Round]:
    """Let the engines take turns; answer the quiet rounds.

    Raises:
        BenchError: a prompt that should be new was found, or one that was stored was not.
    """
    rng = random.Random(seed)

    def prompts(count: int) -> list[list[int]]:
        return [rng.choices(VOCABULARY, k=PROMPT_TOKENS) for _ in range(count)]

    for one in engines.values():
        warm = prompts(WARM_UP_PROMPTS)
        one.turn(warm)
        one.turn(warm)
    names, rounds = list(engines), []
    for number in range(turns * ATTEMPTS):
        first = number % len(names)
        order = names[first:] + names[:first]
        rounds.append(_round(engines, order, prompts(per_turn), hits))
        if sum(one.others_cpus <= QUIET_CPUS for one in rounds) == turns:
            break
    return sorted(rounds, key=lambda one: one.others_cpus)[:turns]


def _round(
    engines: Mapping[str, Engine], order: Sequence[str], new: list[list[int]], hits: bool
) -> Round:
    misses = {name: engines[name].turn(new) for name in order}
    for name, turn in misses.items():
        if any(turn.cached):
            raise BenchError(f"{name}: prompts that nobody has seen hit {turn.cached}")
    again = {name: engines[name].turn(new) for name in order if hits and name != WITHOUT}
    for name, turn in again.items():
        if min(turn.cached) < WHOLE_TOKENS:
            raise BenchError(f"{name}: stored prompts hit {turn.cached}, not {WHOLE_TOKENS}")
    return Round(
        {name: turn.seconds for name, turn in misses.items()},
        {name: turn.seconds for name, turn in again.items()},
        max(turn.others_cpus for turn in misses.values()),
    )


@contextlib.contextmanager
def started(arguments: argparse.Namespace, work: Path) -> Iterator[dict[str, Engine]]:
    """Fresh engines by name, the one without the connector first, ended on the way out."""
    engines: dict[str, Engine] = {}
    try:
        for name in (WITHOUT, *arguments.variants):
            storage = work / name
            storage.mkdir()
            connector = "none" if name == WITHOUT else arguments.connector
            transfer = json.dumps(TRANSFER[connector](str(storage)))
            command = engine_command(arguments, transfer)
            one = Engine(command, engine_environment(name), work / f"{name}.log")
            engines[name] = one
            # One after the other: starting takes all cores, and vLLM measures free memory.
            kernels = one.wait_ready()
            if name in ("kernels", "reference") and kernels != (name == "kernels"):
                there = "the compiled kernels are" + ("" if kernels else "n't")
                raise BenchError(f"{name}: {there} in use; see {DISABLED} and `lmcache doctor`")
        yield engines
    finally:
        for one in engines.values():
            one.close()


def engine_command(arguments: argparse.Namespace, transfer: str) -> list[str]:
    """How `ttft_engine` is started; ``transfer`` is JSON."""
    return [str(arguments.python), str(ENGINE), str(arguments.model), transfer]


def engine_environment(name: str) -> dict[str, str]:
    """An engine's variables; one called ``reference`` does without the compiled kernels."""
    # LMCACHE_ settings are the user's to measure with, except those that are meant for the tools.
    tools = ("LMCACHE_ENVS", "LMCACHE_VLLM_PYTHON")
    kept = {k: v for k, v in os.environ.items() if not k.startswith("VLLM_") and k not in tools}
    if name == "reference":
        kept[DISABLED] = ",".join(filter(None, (kept.get(DISABLED), "kernels")))
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


def result(name: str, value: Sequence[Sequence[float]], base: Sequence[Sequence[float]]) -> Result:
    """Times are medians of all prompts; the ratio is ``value / base``, the median of the runs'."""
    ratios = [statistics.median(a) / statistics.median(b) for a, b in zip(value, base, strict=True)]

    def in_ms(runs: Sequence[Sequence[float]]) -> float:
        return round(statistics.median(seconds for run in runs for seconds in run) * 1e3, 2)

    ratio = round(statistics.median(ratios), 4)
    return Result(
        name, in_ms(value), "ms", in_ms(base), ratio, len(ratios), round(spread(ratios), 4)
    )


def results(runs: Sequence[Round], variants: Sequence[str]) -> list[Result]:
    """All ratios that these runs have."""
    lines = []
    without = [run.miss[WITHOUT] for run in runs]
    for name in variants:
        miss = [run.miss[name] for run in runs]
        lines.append(result(f"present / without, {name}", miss, without))
        if runs[0].hit:
            lines.append(result(f"hit / miss, {name}", [run.hit[name] for run in runs], miss))
    if runs[0].hit and {"kernels", "reference"} <= set(variants):
        hits = [[run.hit[name] for run in runs] for name in ("kernels", "reference")]
        lines.append(result("hit, kernels / reference", *hits))
    return lines


def arguments_given() -> argparse.Namespace:
    """Read the command line."""
    options = parser(__doc__, runs=7, quick_runs=1)
    options.add_argument("--python", type=Path, help="has vLLM and our packages (default: prepare)")
    options.add_argument("--model", type=Path, help="directory (default: SmolLM2-135M-Instruct)")
    options.add_argument("--connector", choices=TRANSFER, default="lmcache")
    options.add_argument(
        "--variants",
        nargs="+",
        choices=("kernels", "reference"),
        default=["kernels", "reference"],
        help="what copies for the connector lmcache: an engine each",
    )
    options.add_argument("--turns", type=int, default=12, help="per run and engine")
    options.add_argument("--prompts", type=int, default=3, help="in a turn")
    arguments = parse(options)
    if arguments.connector != "lmcache":
        arguments.variants = [arguments.connector]
    prepare(arguments)
    return arguments


def prepare(arguments: argparse.Namespace, model: str = "smollm2") -> None:
    """Fill in what the command line doesn't name: ``python`` and ``model``."""
    sys.path.insert(0, str(REPOSITORY / "tools"))
    if arguments.python is None:
        from engine_env import overlay, shared_environment

        arguments.python = overlay(shared_environment())
    if arguments.model is None:
        command = [str(arguments.python), str(REPOSITORY / "tools" / "models.py"), model]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        arguments.model = Path(done.stdout.strip())


def main() -> int:
    """Measure, print the table, write the JSON list."""
    # The default action would leave the engines and their folder behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    arguments = arguments_given()
    report = Report(arguments, "base")
    runs: list[Round] = []
    began = time.monotonic()
    for number in range(arguments.runs):
        with (
            tempfile.TemporaryDirectory(prefix="ttft-vllm-") as work,
            started(arguments, Path(work)) as engines,
        ):
            hits = arguments.connector != "none"
            rounds = measure(engines, arguments.turns, arguments.prompts, seed=number, hits=hits)
        run = Round.joined(rounds)
        runs += rounds if arguments.runs == 1 else [run]
        shown = "; ".join(
            f"{line.name}: {line.ratio:.4f}" for line in results([run], arguments.variants)
        )
        busy = "" if run.others_cpus <= QUIET_CPUS else f", others used {run.others_cpus:.2f} CPUs"
        print(
            f"run {number + 1}/{arguments.runs}, {time.monotonic() - began:.0f} s: {shown}{busy}",
            file=sys.stderr,
            flush=True,
        )
    if any(run.others_cpus > QUIET_CPUS for run in runs):
        print("this machine was busy: don't trust the last digits", file=sys.stderr)
    report.add(*results(runs, arguments.variants))
    report.write()
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BenchError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
