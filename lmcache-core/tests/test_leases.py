"""Leases: given back once, by whoever holds them; the last one ends what is shared."""

from __future__ import annotations

import gc
import threading

import pytest

from lmcache_core.errors import LeaseError
from lmcache_core.memory.leases import Ledger, SharedResource
from lmcache_core.metrics import Counters


class Kept:
    """A ledger, and what ended."""

    def __init__(self) -> None:
        self.counters = Counters()
        self.ledger = Ledger("slot", self.counters)
        self.ended: list[str] = []

    def shared(self, what: str = "7") -> SharedResource:
        return SharedResource(self.ledger, lambda: self.ended.append(what), what)


def test_a_lease_is_given_back_once() -> None:
    kept = Kept()
    lease = kept.ledger.lease(lambda: kept.ended.append("7"), "7")
    assert kept.ledger.out == 1
    assert lease.live
    lease.release()
    assert kept.ended == ["7"]
    assert kept.ledger.out == 0
    assert not lease.live
    with pytest.raises(LeaseError, match="slot 7 was given back before"):
        lease.release()
    assert kept.ended == ["7"]
    assert kept.ledger.out == 0


def test_a_context_releases_whatever_happens() -> None:
    kept = Kept()
    with pytest.raises(KeyboardInterrupt), kept.shared().lease():
        raise KeyboardInterrupt
    assert kept.ended == ["7"]
    assert kept.ledger.out == 0


def test_what_is_shared_ends_with_its_last_lease() -> None:
    kept = Kept()
    shared = kept.shared()
    first, second = shared.lease(), shared.lease()
    first.release()
    assert not kept.ended
    assert kept.ledger.out == 1
    with pytest.raises(LeaseError):
        first.release()
    assert not kept.ended  # a release too many doesn't release for the others
    second.release()
    assert kept.ended == ["7"]
    with pytest.raises(LeaseError, match="last user"):
        shared.lease()


def test_a_forgotten_lease_is_reported_and_stays_taken(caplog: pytest.LogCaptureFixture) -> None:
    kept = Kept()
    kept.shared("9").lease()
    gc.collect()
    assert "The lease of slot 9 was forgotten" in caplog.text
    assert kept.counters.snapshot() == {("leases_forgotten", (("kind", "slot"),)): 1}
    assert not kept.ended
    assert kept.ledger.out == 1


def test_of_many_threads_one_gives_it_back() -> None:
    kept = Kept()
    for _ in range(200):
        lease = kept.shared().lease()
        raised: list[LeaseError] = []
        start = threading.Barrier(4)

        def give_back() -> None:
            start.wait()  # noqa: B023 - joined before the next round
            try:
                lease.release()  # noqa: B023
            except LeaseError as error:
                raised.append(error)  # noqa: B023

        threads = [threading.Thread(target=give_back) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(raised) == 3
    assert kept.ended == ["7"] * 200
    assert kept.ledger.out == 0
