"""One round: threads that use a cache, faults all around it, and what must hold afterwards."""

from __future__ import annotations

import itertools
import json
import random
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from faulting import plugin
from faulting.canary import Canary, Latencies
from faulting.content import CHUNK_TOKENS, UNTOUCHED, Content, Prompt, Prompts, as_bytes
from faulting.findings import Findings
from faulting.kinds import DEADLINE_S, LOOKUP_DEADLINE_S, switch, total
from faulting.places import Place, sections
from faulting.rest import Held, Rest, Undisturbed, settled
from lmcache_core import Cache, Plugins, load_config
from lmcache_core.aio.guard import BreakerState

WORKERS = 6
SLOTS_MIB = {"small": 0.125, "large": 1.0}
"""31 slots, for threads that use up to 8 each."""
AT_ONCE_S = 0.25
"""For calls that wait for nobody."""
PATIENCE_S = 90.0
"""A thread that makes no progress for so long hangs."""
PAUSE_S = 0.05
"""Between the calls of a thread while no tier is asked: they only take CPU from other places."""


class Worker(threading.Thread):
    """Uses a cache as an engine does, and checks what it gets."""

    def __init__(
        self,
        cache: Cache,
        content: Content,
        prompts: Prompts,
        findings: Findings,
        latencies: Latencies,
        seed: int,
        ends: threading.Event,
    ) -> None:
        super().__init__(name=f"harness-worker-{seed}", daemon=True)
        self.progress = time.monotonic()
        self._cache = cache
        self._content = content
        self._prompts = prompts
        self._findings = findings
        self._latencies = latencies
        self._chance = random.Random(seed)
        self._ends = ends
        self.counts: Counter[str] = Counter()
        """What it adds to `Findings`, by their name."""

    def run(self) -> None:
        kinds: tuple[Callable[[Prompt], None], ...] = (
            *(self._turn, self._store, self._load, self._look_up),
            *(self._prefetch, self._pin, self._flush, self._clear),
        )
        weights = (45, 5, 40, 10, 5, 5, 0.5, 0.1)
        while not self._ends.is_set():
            (kind,) = self._chance.choices(kinds, weights)
            prompt = self._prompts.draw(self._chance)
            try:
                kind(prompt)
            except BaseException:  # noqa: BLE001  whatever it is, it is what we are looking for
                self._findings.failed.append(f"{kind.__name__}: {traceback.format_exc()}")
            self.counts["operations"] += 1
            if self._alone:
                self._ends.wait(PAUSE_S)
            self.progress = time.monotonic()

    @property
    def _alone(self) -> bool:
        """Whether the breakers of all tiers are open."""
        open_tiers = self._cache._running.tiers
        tiers = open_tiers.tiers if open_tiers is not None else ()
        return bool(tiers) and all(one.guard.state is BreakerState.OPEN for one in tiers)

    def _timed(self, name: str, deadline_s: float, *, waits: bool = True) -> Any:
        return self._latencies.timed(name, deadline_s, waits=waits)

    def _turn(self, prompt: Prompt) -> None:
        self._load(prompt)
        self._store(prompt)

    def _store(self, prompt: Prompt) -> None:
        kv = self._content.made(prompt)
        with self._timed("store", AT_ONCE_S, waits=False):
            self._cache.store(prompt.tokens, as_bytes(kv), salt=prompt.salt)
        kv[:] = UNTOUCHED  # it was copied, or it is found now

    def _load(self, prompt: Prompt) -> None:
        kv = self._content.empty(prompt)
        with self._timed("load", DEADLINE_S):
            loaded = self._cache.load(prompt.tokens, as_bytes(kv), salt=prompt.salt)
        chunks, rest = divmod(loaded, CHUNK_TOKENS)
        possible = not rest and 0 <= chunks <= len(prompt.path)
        wrong = self._content.wrong_words(kv, prompt, chunks) if possible else 0
        if wrong or not possible:
            text = f"{wrong} words of {loaded} loaded tokens, {prompt}"
            self._findings.wrong.append(text)
        self.counts["asked_chunks"] += len(prompt.path)
        self.counts["hit_chunks"] += chunks
        self.counts["checked_bytes"] += chunks * self._content.chunk_bytes

    def _look_up(self, prompt: Prompt) -> None:
        with self._timed("lookup", LOOKUP_DEADLINE_S):
            found = self._cache.lookup(prompt.tokens, salt=prompt.salt)
        self._expect(found, prompt, "lookup")

    def _prefetch(self, prompt: Prompt) -> None:
        with self._timed("prefetch", DEADLINE_S):
            found = self._cache.prefetch(prompt.tokens, salt=prompt.salt).result()
        self._expect(found, prompt, "prefetch")

    def _pin(self, prompt: Prompt) -> None:
        with self._timed("pin", AT_ONCE_S, waits=False):
            self._cache.pin(prompt.tokens, salt=prompt.salt)
        self._load(prompt)
        with self._timed("unpin", AT_ONCE_S, waits=False):
            self._cache.unpin(prompt.tokens, salt=prompt.salt)

    def _flush(self, _: Prompt) -> None:
        with self._timed("flush", DEADLINE_S):
            self._cache.flush(DEADLINE_S)

    def _clear(self, _: Prompt) -> None:
        with self._timed("clear", DEADLINE_S):
            self._cache.clear()

    def _expect(self, tokens: int, prompt: Prompt, call: str) -> None:
        if tokens % CHUNK_TOKENS or not 0 <= tokens <= len(prompt.path) * CHUNK_TOKENS:
            self._findings.wrong.append(f"{call} answered {tokens} for {prompt}")


class Round:
    """A cache on one place, for some faults. Its seed varies what is configured.

    Storms of several places take ``turns``; ``enough`` says that the run has seen what it wants.
    """

    def __init__(
        self,
        name: str,
        place: Place,
        folder: Path,
        findings: Findings,
        canary: Canary,
        prompts: Prompts,
        numbers: Iterator[int],
        turns: AbstractContextManager[object],
        enough: Callable[[], bool],
    ) -> None:
        self.name = name
        self._place = place
        self._folder = folder
        self._switch = switch(folder)
        self._findings = findings
        self._latencies = Latencies(canary, findings)
        self._canary = canary
        self._prompts = prompts
        self._numbers = numbers
        self._turns = turns
        self._enough = enough

    def run(self, faults: int, seed: int, told: Callable[[], None]) -> None:
        """Go on until so many faults were injected; ``told`` is called now and then."""
        chance = random.Random(seed)
        shape = chance.choice(("small", "small", "large"))
        content = Content(shape)
        before = Held.now()
        with self._place.used():
            cache = self._opened(content, chance, shape)
            try:
                with self._turns:
                    self._storm(cache, content, faults, chance, told)
                self._calm(cache, content)
            finally:
                self._switch.turn(False)
                with self._latencies.timed("close", DEADLINE_S):
                    cache.close()
        del cache
        self._left(settled(self._canary, lambda: Held.now().more_than(before)))

    def _opened(self, content: Content, chance: random.Random, shape: str) -> Cache:
        plugins = Plugins()
        serde = chance.choice(list(plugin.SERDES))
        tiers = sections(self._place, serde)
        options = {
            "chunk_size": CHUNK_TOKENS,
            "max_local_cpu_size": SLOTS_MIB[shape] / 1024,
            # Without: staging only, and everything that is loaded comes from a tier.
            "local_cpu": not tiers or chance.random() < 0.5,
            "cache_policy": "harness" if plugin.broken() else chance.choice(self._place.policies),
            "blocking_timeout_secs": DEADLINE_S,
            "lookup_timeout_ms": int(1000 * LOOKUP_DEADLINE_S),
            "pin_timeout_sec": 1,
            "backends": tiers,
        }
        file = self._folder / "config.yaml"
        file.write_text(json.dumps(options))
        config = load_config(plugins, environ={"LMCACHE_CONFIG_FILE": str(file)})
        return Cache.open(
            model="fault harness", layout=content.layout, config=config, plugins=plugins
        )

    def _storm(
        self,
        cache: Cache,
        content: Content,
        faults: int,
        chance: random.Random,
        told: Callable[[], None],
    ) -> None:
        ends = threading.Event()
        seeds = [chance.getrandbits(32) for _ in range(WORKERS)]
        workers = [
            Worker(cache, content, self._prompts, self._findings, self._latencies, one, ends)
            for one in seeds
        ]
        weather = [threading.Thread(target=self._annoy, args=(ends,), name="harness-annoyer")]
        if self._place.outages:
            rng = random.Random(chance.getrandbits(32))
            weather.append(
                threading.Thread(target=self._harm, args=(ends, rng), name="harness-harmer")
            )
        wanted = self.faults + min(faults, self._place.most)
        until = time.monotonic() + self._place.longest_s
        self._switch.turn(True)
        self._place.upset()
        try:
            for thread in (*workers, *weather):
                thread.start()
            while self.faults < wanted and time.monotonic() < until and not self._enough():
                time.sleep(0.1)
                told()
                self._require_progress(workers)
        finally:
            self._switch.turn(False)
            ends.set()
            for thread in (*weather, *workers):
                thread.join(PATIENCE_S)
                if thread.is_alive():
                    self._left([f"thread {thread.name} doesn't end"])
            for worker in workers:
                for name, count in worker.counts.items():
                    setattr(self._findings, name, getattr(self._findings, name) + count)
        self._place.mend()

    def _require_progress(self, workers: list[Worker]) -> None:
        for worker in workers:
            if time.monotonic() - worker.progress > PATIENCE_S:
                raise TimeoutError(f"{worker.name} made no progress for {PATIENCE_S:g} s")

    @property
    def faults(self) -> int:
        """Injected into this place so far."""
        link = getattr(self._place, "link", None)
        passing = sum(link.counts.values()) if link is not None else 0
        return total(self._folder) + self._place.counts.total() + passing

    def _calm(self, cache: Cache, content: Content) -> None:
        """Everything works again soon, and nothing is held."""
        clock = Undisturbed(self._canary)
        rest = Rest(cache, content, list(self._place.tiers()), self._numbers)
        self._left(settled(self._canary, rest.unworking))
        self._findings.recovered_s.append(clock.seconds)
        time.sleep(1.1)  # pins expire
        self._left(settled(self._canary, rest.still_held))
        forgotten = [name for name, _ in cache.counters.snapshot() if name == "leases_forgotten"]
        self._left(["a lease was forgotten"] if forgotten else [])

    def _left(self, problems: list[str]) -> None:
        self._findings.left += [f"{self.name}: {problem}" for problem in problems]

    def _annoy(self, ends: threading.Event) -> None:
        with self._recorded("annoy"):
            while not ends.wait(0.1):
                self._place.annoy()

    def _harm(self, ends: threading.Event, chance: random.Random) -> None:
        # Each opens the breaker for ten seconds, in which nothing reaches the tier.
        with self._recorded("harm"):
            while not ends.wait(chance.uniform(5.0, 40.0)):
                self._place.harm()

    @contextmanager
    def _recorded(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception:  # noqa: BLE001  or nobody would hear that there are no more outages
            text = f"{self.name}: {what}: {traceback.format_exc()}"
            self._findings.failed.append(text)


def numbers() -> Iterator[int]:
    """Each once in a run."""
    return itertools.count(1000)
