"""Many threads, overlapping prefixes, a full arena: is every loaded byte what it must be?

    python3 bench/stress.py                        60 s, host memory alone
    python3 bench/stress.py --tier filesystem      with a slow tier behind: threads fetch too
    python3 bench/stress.py --tier shaky           two tiers that fail: see `shaky`
    python3 bench/stress.py --seconds 2            for a test suite

Sixteen threads load, store, look up, prefetch, pin and unpin prompts that share prefixes, as
branches of a tree do. Each word of a chunk says where it belongs: its position in the chunk, XORed
with 64 bits that name the chunk's prefix. So a loaded chunk that is another one's, older, torn or
misplaced is found. What lies beyond the loaded tokens must be untouched. The arena is smaller than
what the threads use: nearly each store evicts, and some find nothing that may be evicted, most of
all while chunks wait for a slow tier.

Exit status 1: a byte was wrong, a call failed, somebody still holds a lease at the end, or what is
left can't hold as many chunks as the arena has slots, so that somebody kept one. Exit status 3: a
thread made no progress for ``--patience`` seconds; all stacks are printed.

Operations per second have a calibration too: as many as memcpy on two threads could serve if an
operation were nothing but a copy of the bytes that it moved. Most of the time goes into making and
checking content, so that ratio is for comparison with other versions of this, not with 1.
"""

from __future__ import annotations

import argparse
import faulthandler
import hashlib
import os
import random
import statistics
import sys
import tempfile
import threading
import time
import traceback
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
import shaky
from calibrations import Memcpy, address, aligned
from measuring import Report, Result, parse, parser, spread

from lmcache_core import Cache, DType, KVLayout, full_attention, load_config
from lmcache_core.cache.mover import slots_in
from lmcache_core.chunks.keys import CacheNamespace
from lmcache_core.testing.faults import Faults

CHUNK_TOKENS, LAYERS, HEADS, HEAD_SIZE = 64, 4, 2, 64
GROUP = full_attention(layers=LAYERS, heads=HEADS, head_size=HEAD_SIZE, dtype=DType.BF16)
LAYOUT = KVLayout(CHUNK_TOKENS, (GROUP,))
MODEL = "stress"
CHUNK_WORDS = GROUP.chunk_bytes(CHUNK_TOKENS) // 8
DEPTH, BRANCHES = 12, (6, 3, 2)
"""A prompt has up to so many chunks; each goes on in one of three ways, with these weights."""
ARENA_MIB = 4
"""31 slots, for 16 threads that use up to 12 each."""
SWITCH_S = 1e-5
"""How long a thread keeps the interpreter. By default long enough for a whole call: nothing would
ever be evicted while somebody reads."""
UNTOUCHED = 0xDEAD_BEEF_DEAD_BEEF
SLICES = 9  # of the time, for medians
SHOWN = (
    *("evicted_chunks", "store_dropped", "load_failures", "frame_rejected", "plugin_failures"),
    *("backend_errors", "leases_forgotten"),
)

Prefix = tuple[int, ...]
"""Which branch is taken after each chunk. Names a prefix."""


class Content:
    """What the chunks of a prompt hold. Vectorised: one XOR a chunk."""

    def __init__(self) -> None:
        shape = (LAYERS, 2, CHUNK_TOKENS, CHUNK_WORDS // (LAYERS * 2 * CHUNK_TOKENS))
        self._positions = np.arange(CHUNK_WORDS, dtype=np.uint64).reshape(shape)
        self._row = shape[-1]

    def empty(self, tokens: int) -> np.ndarray:
        return np.empty((LAYERS, 2, tokens, self._row), dtype=np.uint64)

    def fill(self, kv: np.ndarray, path: Prefix) -> None:
        """Write the KV of a prompt: its whole chunks, and something in its unfull last one."""
        for index, part in enumerate(self._chunks(kv, len(path))):
            np.bitwise_xor(self._positions, name_of(path[: index + 1]), out=part)
        kv[:, :, len(path) * CHUNK_TOKENS :] = 7

    def wrong(self, kv: np.ndarray, path: Prefix) -> int:
        """How many words of the prompt's whole chunks aren't what they should be."""
        return sum(
            int(np.count_nonzero((part ^ name_of(path[: index + 1])) != self._positions))
            for index, part in enumerate(self._chunks(kv, len(path)))
        )

    def _chunks(self, kv: np.ndarray, count: int) -> Iterator[np.ndarray]:
        for index in range(count):
            yield kv[:, :, index * CHUNK_TOKENS : (index + 1) * CHUNK_TOKENS]


def as_bytes(kv: np.ndarray) -> np.ndarray:
    """The same memory as KV is handed over: four elements are in each word here."""
    return kv.view(np.uint8).reshape(-1)


@cache
def name_of(prefix: Prefix) -> np.uint64:
    """64 bits that no other prefix has. Not made by what is tested."""
    digest = hashlib.sha256(bytes(prefix)).digest()
    return np.uint64(int.from_bytes(digest[:8], "little"))


def tokens_of(path: Prefix, tail: int) -> bytes:
    """Token ids: the same for the same branch at the same depth, so that prefixes decide."""
    ids = array("I")
    for depth, branch in enumerate(path):
        first = 1000 * (depth * len(BRANCHES) + branch + 1)
        ids.extend(range(first, first + CHUNK_TOKENS))
    ids.extend(range(tail))
    return ids.tobytes()


class Worker(threading.Thread):
    """One of the threads: does something, says that it did, until told to stop."""

    def __init__(self, number: int, cache: Cache, content: Content, stop: threading.Event) -> None:
        super().__init__(name=f"stress-{number}", daemon=True)
        self.operations = 0
        self.moved_bytes = 0
        self.asked_tokens = 0
        self.hit_tokens = 0
        self.wrong: list[str] = []
        self.last_progress = time.monotonic()
        self._random = random.Random(number)
        self._cache = cache
        self._content = content
        self._stopping = stop

    def run(self) -> None:
        kinds: tuple[Callable[[Prefix, int], None], ...]
        kinds = (self._turn, self._store, self._load, self._look_up, self._pin, self._prefetch)
        weights = (10, 4, 4, 2, 1, 1)
        while not self._stopping.is_set() and not self.wrong:
            path = tuple(self._random.choices(range(3), BRANCHES, k=self._random.randint(1, DEPTH)))
            (kind,) = self._random.choices(kinds, weights)
            try:
                kind(path, self._random.randrange(CHUNK_TOKENS))
            except Exception:  # noqa: BLE001 - whatever it is, it is what we are looking for
                self.wrong.append(traceback.format_exc())
            self.operations += 1
            self.last_progress = time.monotonic()

    def _turn(self, path: Prefix, tail: int) -> None:
        """What an engine does: load what is there, compute the rest, store all of it."""
        self._load(path, tail)
        self._store(path, tail)

    def _store(self, path: Prefix, tail: int) -> None:
        kv = self._content.empty(len(path) * CHUNK_TOKENS + tail)
        self._content.fill(kv, path)
        stored = self._cache.store(tokens_of(path, tail), as_bytes(kv))
        self._expect(stored <= len(path) * CHUNK_TOKENS, f"store answered {stored}", path)
        self.moved_bytes += GROUP.chunk_bytes(stored)

    def _load(self, path: Prefix, tail: int) -> None:
        kv = self._content.empty(len(path) * CHUNK_TOKENS + tail)
        kv[:] = UNTOUCHED
        loaded = self._cache.load(tokens_of(path, tail), as_bytes(kv))
        chunks, rest = divmod(loaded, CHUNK_TOKENS)
        self._expect(not rest and 0 <= chunks <= len(path), f"load answered {loaded}", path)
        wrong = self._content.wrong(kv, path[:chunks])
        self._expect(not wrong, f"{wrong} words of {loaded} loaded tokens are wrong", path)
        beyond = int(np.count_nonzero(kv[:, :, loaded:] != UNTOUCHED))
        self._expect(not beyond, f"{beyond} words beyond {loaded} loaded tokens were written", path)
        self.moved_bytes += GROUP.chunk_bytes(loaded)
        self.asked_tokens += len(path) * CHUNK_TOKENS
        self.hit_tokens += loaded

    def _look_up(self, path: Prefix, tail: int) -> None:
        found = self._cache.lookup(tokens_of(path, tail))
        self._expect(0 <= found <= len(path) * CHUNK_TOKENS, f"lookup answered {found}", path)

    def _pin(self, path: Prefix, tail: int) -> None:
        tokens = tokens_of(path, tail)
        pinned = self._cache.pin(tokens)
        # Others may have unpinned and evicted the end of it; what is found must be right.
        self._load(path[: pinned // CHUNK_TOKENS], tail)
        self._cache.unpin(tokens)

    def _prefetch(self, path: Prefix, tail: int) -> None:
        found = self._cache.prefetch(tokens_of(path, tail)).result()
        self._expect(0 <= found <= len(path) * CHUNK_TOKENS, f"prefetch answered {found}", path)

    def _expect(self, true: bool, otherwise: str, path: Prefix) -> None:
        if not true:
            self.wrong.append(f"{otherwise}; prompt {path}")


@contextmanager
def opened(arguments: argparse.Namespace, folder: str, faults: Faults) -> Iterator[Cache]:
    tier = {
        "none": [],
        "memory": ["backends.memory.max_size_gib=0.25"],
        "filesystem": [
            f"backends.filesystem.path={folder}/fs",
            "backends.filesystem.max_size_gib=1",
        ],
        # Both keep less than what the threads use, so that they evict, too.
        "shaky": [
            *("backends.shaky.serde=shaky", "backends.shaky.max_size_gib=0.01"),
            *("backends.sound.type=memory", "backends.sound.max_size_gib=0.005"),
        ],
    }[arguments.tier]
    assignments = [
        f"chunk_size={CHUNK_TOKENS}",
        f"max_local_cpu_size={arguments.arena_mib / 1024}",
        "pin_timeout_sec=1",
        *tier,
    ]
    with shaky.plugins(Path(folder) / "site", faults) as plugins:
        config = load_config(plugins, environ={}, assignments=assignments)
        with Cache.open(model=MODEL, layout=LAYOUT, config=config, plugins=plugins) as cache:
            if arguments.tier == "shaky":
                shaky.begin(faults)
            yield cache
            faults.disarm()


def watch(workers: Sequence[Worker], seconds: float, patience_s: float) -> list[tuple[float, ...]]:
    """Let them work; answer operations and bytes per second, slice by slice."""
    rates: list[tuple[float, ...]] = []
    for _ in range(SLICES):
        began, before = time.monotonic(), _totals(workers)
        while time.monotonic() < began + seconds / SLICES:
            time.sleep(min(0.2, seconds / SLICES))
            _require_progress(workers, patience_s)
            if any(worker.wrong for worker in workers):
                return rates
        wall = time.monotonic() - began
        rates.append(tuple((b - a) / wall for a, b in zip(before, _totals(workers), strict=True)))
    return rates


def _totals(workers: Sequence[Worker]) -> tuple[int, int]:
    return sum(w.operations for w in workers), sum(w.moved_bytes for w in workers)


def _require_progress(workers: Sequence[Worker], patience_s: float) -> None:
    """End the process if a thread stands still: its stacks are all that can be had then."""
    now = time.monotonic()
    stuck = [w for w in workers if w.is_alive() and now - w.last_progress > patience_s]
    if not stuck:
        return
    print(f"no progress for {patience_s:.0f} s: {', '.join(w.name for w in stuck)}", flush=True)
    faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
    sys.stderr.flush()
    os._exit(3)


def leftovers(cache: Cache, slots: int) -> list[str]:
    """What is wrong with the cache after the storm: a prompt as big as the arena must fit in.

    A lease that nobody gave back would keep its slot.
    """
    time.sleep(1.2)  # pins expire
    if not cache.flush():
        return ["the slow tier didn't take in what was stored"]
    cache.lookup([])  # takes in what movers report
    if cache._running.mover.leases or cache._running.planner.pending:
        leases, pending = cache._running.mover.leases, cache._running.planner.pending
        return [f"{leases} leases and {pending} operations at rest; there must be none"]
    content, path = Content(), (2,) * slots
    tokens = (np.arange(slots * CHUNK_TOKENS, dtype="<u4") + 1_000_000).tobytes()
    kv = content.empty(slots * CHUNK_TOKENS)
    content.fill(kv, path)
    stored = cache.store(tokens, as_bytes(kv))
    problems = []
    if stored != slots * CHUNK_TOKENS:
        problems.append(f"{slots} slots took {stored // CHUNK_TOKENS} chunks: some are never freed")
    kv[:] = UNTOUCHED
    loaded = cache.load(tokens, as_bytes(kv))
    if loaded != stored or content.wrong(kv, path[: loaded // CHUNK_TOKENS]):
        problems.append(f"of {stored} tokens stored at the end {loaded} were loaded, or wrong ones")
    return problems


def memcpy_rate() -> float:
    """Bytes per second on two threads."""
    nbytes = 64 << 20
    memory = aligned(nbytes), aligned(nbytes)
    with Memcpy(2) as memcpy:
        seconds = []
        for _ in range(9):
            began = time.perf_counter()
            memcpy(address(memory[0]), address(memory[1]), nbytes)
            seconds.append(time.perf_counter() - began)
    return nbytes / statistics.median(seconds)


def summary(cache: Cache, workers: Sequence[Worker], rates: Sequence[tuple[float, ...]]) -> str:
    totals: dict[str, int] = {}
    for (name, labels), value in cache.counters.snapshot().items():
        if name in SHOWN:
            what = ", ".join(label for _, label in labels)
            totals[f"{name} ({what})"] = int(value)
    operations, moved = _totals(workers)
    hits = sum(w.hit_tokens for w in workers) / max(1, sum(w.asked_tokens for w in workers))
    rate = statistics.median(rate for rate, _ in rates) if rates else 0
    lines = [
        f"{operations:,} operations, {rate:,.0f}/s, {moved / 2**30:.1f} GiB moved, "
        f"{hits:.0%} of the tokens that were asked for were hits",
        *(f"{name}: {count:,}" for name, count in sorted(totals.items())),
    ]
    return "\n".join(lines)


def result(
    arguments: argparse.Namespace, rates: Sequence[tuple[float, ...]], rate: float
) -> Result:
    """Operations per second by those that memcpy alone would allow."""
    ratios = [moved / rate for _, moved in rates]
    ratio, operations = statistics.median(ratios), statistics.median(ops for ops, _ in rates)
    return Result(
        f"{arguments.threads} threads, arena full, tier {arguments.tier}",
        round(operations, 1),
        "ops/s",
        round(operations / ratio, 1),
        round(ratio, 4),
        len(rates),
        round(spread(ratios), 3),
    )


def main() -> int:
    options = parser(__doc__, runs=SLICES)
    options.add_argument("--seconds", type=float, help="default: 60, with --quick 10")
    options.add_argument("--threads", type=int, default=16)
    options.add_argument(
        "--tier", choices=("none", "memory", "filesystem", "shaky"), default="none"
    )
    options.add_argument("--seed", type=int, default=0, help="of what fails")
    options.add_argument("--arena-mib", type=int, default=ARENA_MIB)
    options.add_argument("--patience", type=float, default=20.0, metavar="SECONDS")
    arguments = parse(options)
    seconds = arguments.seconds or (10.0 if arguments.quick else 60.0)
    faulthandler.enable()
    sys.setswitchinterval(SWITCH_S)
    report = Report(arguments, "memcpy")
    rate = memcpy_rate()
    stop, content, faults = threading.Event(), Content(), Faults(arguments.seed)
    with (
        tempfile.TemporaryDirectory(prefix="stress-") as folder,
        opened(arguments, folder, faults) as cache,
    ):
        workers = [Worker(i, cache, content, stop) for i in range(arguments.threads)]
        for worker in workers:
            worker.start()
        rates = watch(workers, seconds, arguments.patience)
        stop.set()
        for worker in workers:
            while worker.is_alive():
                worker.join(0.2)
                _require_progress(workers, arguments.patience)
        wrong = [text for worker in workers for text in worker.wrong]
        faults.disarm()
        print(summary(cache, workers, rates))
        if faults.count():
            print(f"{faults.count():,} faults were injected, seed {faults.seed}")
        slots = slots_in(arguments.arena_mib << 20, CacheNamespace(MODEL, LAYOUT))
        if not any(name == "evicted_chunks" for name, _ in cache.counters.snapshot()):
            wrong.append("nothing was evicted: the arena wasn't full, and this shows nothing")
        if any(name == "leases_forgotten" for name, _ in cache.counters.snapshot()):
            wrong.append("a lease was forgotten")
        if not wrong:
            wrong = leftovers(cache, slots)
    for text in wrong:
        print(f"WRONG: {text}")
    if not wrong:
        print("no wrong byte, nothing stuck, no slot lost")
        report.add(result(arguments, rates, rate))
    report.write()
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
