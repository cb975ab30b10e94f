"""What crosses between an engine and an isolated backend, and who waits for shared memory."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from contextlib import suppress
from enum import Enum
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field, SecretBytes, SecretStr

from lmcache_core.chunks.keys import CacheNamespace
from lmcache_core.chunks.layout import (
    AttentionKind,
    DType,
    KVLayout,
    LayerGroup,
    full_attention,
    mla,
)
from lmcache_core.config import load_config
from lmcache_core.contracts.storage import BackendContext, HostRegion
from lmcache_core.errors import BackendUnavailable, ConfigError, LeaseError, PluginLoadError
from lmcache_core.isolation import wire
from lmcache_core.isolation.process import Child, describe_exit
from lmcache_core.isolation.scratch import Extent, Scratch
from lmcache_core.isolation.wire import (
    Answers,
    Channel,
    ClientError,
    context_from_plain,
    context_to_plain,
    error_from_plain,
    error_to_plain,
    options_to_plain,
)
from lmcache_core.memory.host_memory import PAGE_BYTES
from lmcache_core.metrics import Counters
from lmcache_core.plugins.creation import NotCreated
from lmcache_core.plugins.manager import Plugins

# -- messages ------------------------------------------------------------------------------


class Received:
    """A channel without a socket."""

    def __init__(self) -> None:
        self.messages: list[Any] = []
        self.lost: list[str] = []
        self.channel = Channel(self.messages.append, self.lost.append)


def framed(body: bytes) -> bytes:
    return len(body).to_bytes(4, "little") + body


@given(st.lists(st.dictionaries(st.text(), st.integers() | st.text())), st.integers(1, 7))
def test_messages_arrive_whole_however_they_are_cut(
    messages: list[dict[str, Any]], step: int
) -> None:
    received = Received()
    stream = b"".join(framed(json.dumps(message).encode()) for message in messages)
    for start in range(0, len(stream), step):
        received.channel.data_received(stream[start : start + step])
    assert received.messages == messages


@pytest.mark.parametrize(
    ("stream", "wrong"),
    [
        (framed(b"\xff\xfe"), "isn't JSON"),
        (framed(b"[1, 2]"), "not a message"),
        (framed(b"[" * 20_000 + b"]" * 20_000), "isn't JSON"),
        (b"\xff\xff\xff\xff", "4294967295 bytes"),
    ],
)
def test_nonsense_ends_the_conversation(stream: bytes, wrong: str) -> None:
    received = Received()
    received.channel.data_received(stream + framed(b"{}"))
    received.channel.connection_lost(None)
    assert received.messages == []
    assert wrong in received.lost[0]


@pytest.mark.parametrize("number", [None, 3, "3", [3], {}, True, 1.5])
def test_an_answer_to_nothing_ends_the_process(number: object) -> None:
    async def answered() -> Child:
        child, loop = Child("toy"), asyncio.get_running_loop()
        child._calls[7] = "load", loop.create_future(), loop.call_later(60, int)
        child._answered({"id": number, "ok": 1})
        return child

    assert "wasn't asked" in asyncio.run(answered()).end


def test_what_isnt_plain_cant_be_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    channel = Received().channel
    for message in ({"id": object()}, {"id": float("nan")}):
        with pytest.raises((TypeError, ValueError)):
            channel.send(message)
    monkeypatch.setattr(wire, "MAX_MESSAGE_BYTES", 10)
    with pytest.raises(ValueError, match="too long"):
        channel.send({"id": "x" * 10})


def test_answers_of_many_threads_arrive_whole() -> None:
    """More than the socket holds, so that each has to wait for the reader."""
    here, there = socket.socketpair()
    lost: list[int] = []
    answers = Answers(there, lambda: lost.append(1))

    def answer(number: int) -> None:
        for i in range(20):
            answers.send({"id": number, "ok": [i] * 20_000})

    threads = [threading.Thread(target=answer, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    received = Received()
    with here:
        while len(received.messages) < 160 and not received.lost:
            received.channel.data_received(here.recv(1 << 20))
    for thread in threads:
        thread.join()
    there.close()
    assert not received.lost
    assert not lost
    for number in range(8):
        mine = [message["ok"] for message in received.messages if message["id"] == number]
        assert mine == [[i] * 20_000 for i in range(20)]


def test_after_an_answer_to_nobody_all_is_over() -> None:
    here, there = socket.socketpair()
    lost: list[int] = []
    answers = Answers(there, lambda: lost.append(1))
    answers.send({"id": 1})
    assert not lost
    here.close()
    answers.send({"id": 2})
    assert lost
    there.close()


# -- errors --------------------------------------------------------------------------------


@pytest.mark.parametrize("class_", wire._ERRORS.values())
def test_errors_keep_their_class(class_: type[Exception]) -> None:
    again = error_from_plain(json.loads(json.dumps(error_to_plain(class_("why")))))
    assert type(again) is class_
    assert str(again) == "why"


def test_other_errors_keep_their_name() -> None:
    again = error_from_plain(error_to_plain(KeyError("k")))
    assert (type(again), str(again)) == (ClientError, "KeyError: 'k'")
    assert type(error_from_plain(error_to_plain(asyncio.TimeoutError()))) is TimeoutError


@pytest.mark.parametrize("problem", [ConfigError("why"), PluginLoadError("why")])
def test_what_kept_a_backend_from_being_made_is_kept(problem: Any) -> None:
    again = error_from_plain(error_to_plain(NotCreated(problem)))
    assert isinstance(again, NotCreated)
    assert type(again.problem) is type(problem)
    assert str(again.problem) == "why"


@pytest.mark.parametrize(
    "plain", [None, [], ["rejected"], ["rejected", 7], "rejected", ["not_created"] * 5000]
)
def test_an_error_that_makes_no_sense_is_an_error(plain: Any) -> None:
    assert isinstance(error_from_plain(plain), ClientError)


# -- options and contexts ------------------------------------------------------------------


class Colour(Enum):
    RED = "red"


class Inner(BaseModel):
    model_config = ConfigDict(extra="forbid")
    key: SecretBytes = SecretBytes(b"")


class Options(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    path: Path
    password: SecretStr = SecretStr("")
    tokens: tuple[SecretStr, ...] = ()
    colour: Colour = Colour.RED
    inner: Inner = Inner()
    named: dict[str, SecretStr] = Field(default_factory=dict)
    other_name: int = Field(1, alias="other-name")


@given(st.text(), st.text(), st.binary().filter(lambda one: _is_text(one)))
def test_options_are_the_same_on_the_other_side(one: str, two: str, three: bytes) -> None:
    options = Options(
        path=Path("/x"),
        password=SecretStr(one),
        tokens=(SecretStr(two),),
        inner=Inner(key=SecretBytes(three)),
        named={"a": SecretStr(two)},
        **{"other-name": 5},
    )
    plain = json.loads(json.dumps(options_to_plain(options)))
    assert Options.model_validate(plain) == options


def _is_text(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def test_a_context_names_the_same_chunks_on_the_other_side() -> None:
    window = LayerGroup((3,), AttentionKind.SLIDING_WINDOW, 2, 1, 8, DType.F8_E4M3, 128)
    groups = (
        full_attention(layers=2, heads=2, head_size=8, dtype=DType.BF16),
        window,
        mla(layers=1, latent_size=9, dtype=DType.F16),
    )
    namespace = CacheNamespace("m", KVLayout(16, groups).for_rank(0, 2), salt="s")
    context = BackendContext("name", namespace, None, 123, lookup_only=True, deadline_s=1.5)
    plain = json.loads(json.dumps(context_to_plain(context)))
    again = context_from_plain(plain, None)
    assert again == context
    assert again.namespace.fingerprint == namespace.fingerprint
    assert again.namespace.root == namespace.root


# -- scratch memory ------------------------------------------------------------------------


def scratch(pages: int) -> Scratch:
    return Scratch(HostRegion(0, pages * PAGE_BYTES, memoryview(b"")), Counters())


def place(extent: Extent) -> tuple[int, int]:
    return extent.start, extent.nbytes


def test_ranges_are_given_in_order_and_joined_again() -> None:
    async def use() -> None:
        memory = scratch(4)
        small = [await memory.take(1) for _ in range(4)]
        assert [one.start for one in small] == [i * PAGE_BYTES for i in range(4)]
        waiting = asyncio.ensure_future(memory.take(3 * PAGE_BYTES))
        behind = asyncio.ensure_future(memory.take(1))
        for index in (0, 2):
            small[index].release()
        await asyncio.sleep(0)
        assert not waiting.done()
        assert not behind.done()  # or large ones would wait for ever
        small[1].release()
        first = await waiting
        assert place(first) == (0, 3 * PAGE_BYTES)
        small[3].release()
        second = await behind
        assert place(second) == (3 * PAGE_BYTES, PAGE_BYTES)
        for one in (first, second):
            one.release()
        assert not memory.leases.out

    asyncio.run(use())


def test_who_stops_waiting_keeps_nothing() -> None:
    async def use() -> None:
        memory = scratch(2)
        both = await memory.take(2 * PAGE_BYTES)
        first, second = (asyncio.ensure_future(memory.take(2 * PAGE_BYTES)) for _ in range(2))
        await asyncio.sleep(0)
        both.release()
        first.cancel()  # it has its turn, but hasn't noticed
        await asyncio.wait([first])
        last = await second
        assert place(last) == place(both)
        last.release()
        assert not memory.leases.out

    asyncio.run(use())


def test_what_a_cancelled_call_may_still_use_goes_to_nobody_else() -> None:
    async def use() -> None:
        memory = scratch(2)
        for error in (asyncio.CancelledError(), BackendUnavailable("its process is gone")):
            with suppress(type(error)), await memory.take(1):
                raise error
        other = await memory.take(1)
        assert place(other) == (PAGE_BYTES, PAGE_BYTES)
        other.release()
        with pytest.raises(LeaseError):
            other.release()
        assert memory.leases.out == 1  # the first one, for good

    asyncio.run(use())


def test_more_than_there_is_is_refused() -> None:
    with pytest.raises(ValueError, match="scratch memory"):
        asyncio.run(scratch(1).take(PAGE_BYTES + 1))


@given(st.lists(st.tuples(st.integers(0, 3 * PAGE_BYTES), st.booleans()), max_size=40))
def test_ranges_never_overlap(steps: list[tuple[int, bool]]) -> None:
    async def use() -> None:
        memory, held, waiting = scratch(8), [], []
        for nbytes, back in steps:
            if back and held:
                held.pop(nbytes % len(held)).release()
            else:
                waiting.append(asyncio.ensure_future(memory.take(nbytes)))
            await asyncio.sleep(0)
            held += [one.result() for one in waiting if one.done()]
            waiting = [one for one in waiting if not one.done()]
            ranges = sorted((one.start, one.start + one.nbytes) for one in held)
            assert all(a[1] <= b[0] for a, b in pairwise(ranges))
        while held:
            held.pop().release()
            await asyncio.sleep(0)
            held += [one.result() for one in waiting if one.done()]
            waiting = [one for one in waiting if not one.done()]
        assert not memory.leases.out
        with await memory.take(8 * PAGE_BYTES) as everything:
            assert place(everything) == (0, 8 * PAGE_BYTES)

    asyncio.run(use())


# -- configuration -------------------------------------------------------------------------

PLUGIN = """
@hookimpl
def lmcache_storage_backends():
    return [backend("unsafe", isolated=True), backend("safe")]
"""


@pytest.mark.parametrize(
    ("kind", "said", "expected"),
    [
        ("safe", None, False),
        ("safe", "true", True),
        ("unsafe", None, True),
        ("unsafe", "false", False),
    ],
)
def test_the_plugin_decides_unless_the_user_does(
    distribution: Any, kind: str, said: str | None, expected: bool
) -> None:
    distribution("lmcache-backend-kinds", PLUGIN)
    settings = [f"backends.mine.type={kind}"]
    settings += [f"backends.mine.isolated={said}"] if said else []
    config = load_config(Plugins(environ={}), environ={}, assignments=settings)
    assert config.backends[0].isolated is expected
    assert config.shares_region is expected
    rows = {name: (value, origin) for name, value, origin in config.rows()}
    assert rows["backends.mine.isolated"][0] is expected


def test_a_limit_of_no_memory_is_refused() -> None:
    settings = ["backends.memory.isolated=true", "backends.memory.isolated_memory_gib=0"]
    with pytest.raises(ConfigError, match=r"backends\.memory\.isolated_memory_gib"):
        load_config(Plugins(environ={}), environ={}, assignments=settings)


def test_exits_in_words() -> None:
    assert describe_exit(-11) == "was killed by SIGSEGV"
    assert describe_exit(-99) == "was killed by signal 99"
    assert describe_exit(3) == "ended with exit code 3"
