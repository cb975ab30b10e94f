"""Time to first token when the cache is on another machine: do compressed chunks pay?

    python3 bench/ttft_link.py                     about 6 minutes
    python3 bench/ttft_link.py --quick             one store, three serdes
    python3 bench/ttft_link.py --rate 10gbit       another link

Needs root, iproute2 and redis-server. Stores live on another host, a network namespace behind a
cable that `tc` shapes to 1 Gb/s in both directions. One vLLM engine computes prompts and stores
them everywhere; then for each store and serde a fresh engine, whose own memory is empty, is asked
the same prompts. Two figures of each:

- ttft: the median of its prompts, by that of the same store with `naive`, in the name `a / b`;
- wire: bytes that came over the cable for a prompt, by those of `naive`.

The first line is what a hit over the cable saves: `naive` by computing the prompt. A prompt that
isn't found whole ends the program: its figures would mean something else. The model is
SmolLM2-135M-Instruct, 22.5 KiB of KV a token; engines that answer are the only ones that work.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from measuring import Report, Result, parse, parser, spread
from ttft_vllm import (
    PROMPT_TOKENS,
    REPOSITORY,
    TRANSFER,
    VOCABULARY,
    WHOLE_TOKENS,
    BenchError,
    Engine,
    Turn,
    engine_command,
    engine_environment,
    prepare,
)

sys.path.insert(0, str(REPOSITORY / "tests" / "network"))
from netns import ADDRESS, Host, another_host, why_not

SERDES = ("naive", "lossless", "cachegen", "cachegen+aesgcm")
STORES = ("lm", "redis")
KEY_VARIABLE = "LMCACHE_AESGCM_KEYS"
KEYS = "1 " + "5a" * 32  # a measurement has no secrets
LM_PORT, REDIS_PORT = 65432, 6379
WARM_UP = 2
QUIET_S, PATIENCE_S, START_S = 1.0, 120.0, 30.0


@dataclass(frozen=True)
class Place:
    """A store and a serde: what one engine reads from. ``number`` keeps places apart."""

    store: str
    serde: str
    number: int

    @property
    def url(self) -> str:
        if self.store == "lm":
            return f"lm://{ADDRESS}:{LM_PORT + self.number}"
        return f"redis://{ADDRESS}:{REDIS_PORT}/{self.number}"

    def start(self, host: Host, work: Path) -> None:
        """Run what it needs on the other host. Redis has one server for all."""
        log = work / f"{self.store}{self.number}.log"
        if self.store == "lm":
            code = "import sys; from lmcache_core.cli import main; sys.exit(main(sys.argv[1:]))"
            port = str(LM_PORT + self.number)
            options = ["--memory-gib", "1", "--unix", "none"]
            host.start([sys.executable, "-c", code, "server", ADDRESS, port, *options], log)
            listening(int(port), log)
        elif self.number == 0:
            options = [
                "--bind",
                ADDRESS,
                "--protected-mode",
                "no",
                "--save",
                "",
                "--dir",
                str(work),
            ]
            host.start(["redis-server", "--port", str(REDIS_PORT), *options], log)


def listening(port: int, log: Path) -> None:
    """Wait for a server on the other host."""
    until = time.monotonic() + START_S
    while time.monotonic() < until:
        with contextlib.suppress(OSError):
            socket.create_connection((ADDRESS, port), timeout=1).close()
            return
        time.sleep(0.1)
    raise BenchError(f"nothing listens at {ADDRESS}:{port}: {log.read_text(errors='replace')}")


@dataclass(frozen=True)
class Read:
    """What one engine saw."""

    seconds: list[float]
    wire_bytes: float
    """For a prompt."""


def config_of(places: Sequence[Place]) -> str:
    """A configuration with these tiers, in YAML's subset that is JSON."""
    backends = {
        f"{place.store}{place.number}": {
            "type": place.store,
            "serde": place.serde,
            "deadline_s": 30,
            **_address(place),
        }
        for place in places
    }
    return json.dumps({"chunk_size": 256, "max_local_cpu_size": 1, "backends": backends})


def _address(place: Place) -> dict[str, object]:
    if place.store == "lm":
        return {"host": ADDRESS, "port": LM_PORT + place.number}
    return {"url": place.url}


@contextlib.contextmanager
def engine(arguments: argparse.Namespace, work: Path, name: str, config: str) -> Iterator[Engine]:
    """A fresh engine with this configuration file."""
    file = work / f"{name}.yaml"
    file.write_text(config)
    transfer = json.dumps(TRANSFER["lmcache"](str(work)))
    environment = {
        **engine_environment(name),
        "LMCACHE_CONFIG_FILE": str(file),
        KEY_VARIABLE: KEYS,
        "LMCACHE_LOOKUP_TIMEOUT_MS": "20000",
    }
    for ours in ("LMCACHE_MAX_LOCAL_CPU_SIZE", "LMCACHE_CHUNK_SIZE"):
        environment.pop(ours, None)
    one = Engine(engine_command(arguments, transfer), environment, work / f"{name}.log")
    try:
        one.wait_ready()
        yield one
    finally:
        one.close()


def settled(host: Host) -> None:
    """Wait until nothing goes over the cable any more."""
    until = time.monotonic() + PATIENCE_S
    sent, since = host.sent_bytes(), time.monotonic()
    while time.monotonic() - since < QUIET_S:
        time.sleep(0.1)
        now = host.sent_bytes()
        if now - sent > 100_000:
            sent, since = now, time.monotonic()
        if time.monotonic() > until:
            raise BenchError(f"the stores aren't filled after {PATIENCE_S:.0f} s")


def computed(one: Engine, host: Host, prompts: list[list[int]]) -> Turn:
    """Let an engine compute and store the prompts, one after the other."""
    seconds: list[float] = []
    for prompt in prompts:
        turn = one.turn([prompt])
        if any(turn.cached):
            raise BenchError(f"a prompt that nobody has seen hit {turn.cached}")
        seconds += turn.seconds
        settled(host)
    return Turn(seconds, [], 0.0)


def read(one: Engine, host: Host, place: Place, prompts: list[list[int]]) -> Read:
    """Let a fresh engine load the prompts. The first ones warm it up and don't count."""
    seconds, wire = [], []
    for prompt in prompts:
        before = host.received_bytes()
        turn = one.turn([prompt])
        if turn.cached != [WHOLE_TOKENS]:
            raise BenchError(f"{place.url}, {place.serde}: hit {turn.cached}, not {WHOLE_TOKENS}")
        seconds += turn.seconds
        wire.append(host.received_bytes() - before)
    return Read(seconds[WARM_UP:], statistics.median(wire[WARM_UP:]))


def results(place: Place, one: Read, base: Read) -> list[Result]:
    """Both lines of a place, ``base`` being the same store with `naive`."""
    name = f"{place.store}, {place.serde}"
    times = [mine / theirs for mine, theirs in zip(one.seconds, base.seconds, strict=True)]
    mine, theirs = (round(statistics.median(each.seconds) * 1e3, 1) for each in (one, base))
    lines = [
        Result(
            f"ttft {name} / naive",
            mine,
            "ms",
            theirs,
            round(statistics.median(times), 3),
            len(times),
            round(spread(times), 3),
        )
    ]
    own, whole = (round(each.wire_bytes / 2**20, 2) for each in (one, base))
    return [
        *lines,
        Result(f"wire {name} / naive", own, "MiB", whole, round(own / whole, 3), len(times), 0.0),
    ]


def against_computing(store: str, base: Read, computing: list[float]) -> Result:
    """What a hit over the cable saves."""
    times = [mine / theirs for mine, theirs in zip(base.seconds, computing, strict=True)]
    mine, theirs = (round(statistics.median(x) * 1e3, 1) for x in (base.seconds, computing))
    ratio, width = round(statistics.median(times), 3), round(spread(times), 3)
    return Result(f"ttft {store}, naive / computed", mine, "ms", theirs, ratio, len(times), width)


def main() -> int:
    """Measure, print the table, write the JSON list."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    options = parser(__doc__, runs=9, quick_runs=5)
    options.add_argument("--python", type=Path, help="has vLLM and our packages (default: prepare)")
    options.add_argument("--model", type=Path, help="directory (default: SmolLM2-135M-Instruct)")
    options.add_argument("--rate", default="1gbit", help="of the link, as tc writes it")
    arguments = parse(options)
    if (missing := why_not()) is not None:
        options.error(missing)
    prepare(arguments)
    stores, serdes = (STORES[:1], SERDES[:3]) if arguments.quick else (STORES, SERDES)
    places = [Place(store, serde, i) for store in stores for i, serde in enumerate(serdes)]
    dice = random.Random(0)
    count = arguments.runs + WARM_UP
    prompts = [dice.choices(VOCABULARY, k=PROMPT_TOKENS) for _ in range(count)]
    report = Report(arguments, "base")
    with tempfile.TemporaryDirectory(prefix="ttft-link-") as folder, another_host() as host:
        work = Path(folder)
        host.slow_down(arguments.rate)
        for place in places:
            place.start(host, work)
        with engine(arguments, work, "writer", config_of(places)) as one:
            computing = computed(one, host, prompts).seconds[WARM_UP:]
        base: Read | None = None
        for place in places:
            name = f"{place.store}-{place.number}"
            with engine(arguments, work, name, config_of([place])) as one:
                found = read(one, host, place, prompts)
            if base is None or place.serde == SERDES[0]:
                base = found
                report.add(against_computing(place.store, base, computing))
            else:
                report.add(*results(place, found, base))
    report.write()
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (BenchError, subprocess.CalledProcessError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
