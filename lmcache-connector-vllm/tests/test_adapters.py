"""Which adapter a request computes with: what a worker saw, and what the scheduler made of it."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("default")]

worker_manager = pytest.importorskip("vllm.lora.worker_manager")

from vllm.lora.request import LoRARequest  # noqa: E402

from lmcache_connector_vllm.adapter_watch import AdapterWatch  # noqa: E402
from lmcache_connector_vllm.adapters import (  # noqa: E402
    AdapterNames,
    AdapterUse,
    Board,
    Published,
    RequestAdapter,
    adapter_facts,
)
from lmcache_core.chunks.identity import adapter_identity  # noqa: E402


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def write(folder: Path, weights: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_model.safetensors").write_text(weights)
    (folder / "adapter_config.json").write_text('{"r": 8}')
    return folder


def lora(folder: Path, number: int = 1, **more: Any) -> LoRARequest:
    return LoRARequest(**{"lora_name": "sql", "lora_int_id": number, **more}, lora_path=str(folder))


# -- in the worker ---------------------------------------------------------------------------------


class Adapters(worker_manager.LRUCacheLoRAModelManager):
    """Two adapters that are names of contents."""

    capacity = 2

    def __init__(self) -> None:
        self.loaded: dict[int, str] = {}
        self.full = False

    def __len__(self) -> int:
        return len(self.loaded)

    def add_adapter(self, lora: Any) -> bool:
        if self.full:
            raise RuntimeError("no room")
        self.loaded[lora.id] = lora.content
        return True

    def activate_adapter(self, lora_id: int, warmup: bool = False) -> bool:
        return True

    def remove_adapter(self, adapter_id: int) -> bool:
        return self.loaded.pop(adapter_id, None) is not None

    def remove_oldest_adapter(self) -> bool:
        return self.remove_adapter(next(iter(self.loaded)))

    def remove_all_adapters(self) -> None:
        self.loaded.clear()

    def list_adapters(self) -> dict[int, Any]:
        return dict(self.loaded)

    def get_adapter(self, adapter_id: int) -> Any:
        return self.loaded.get(adapter_id)


class Manager(worker_manager.LRUCacheWorkerLoRAManager):
    """vLLM's own, with files instead of tensors. ``reading`` happens while one is loaded."""

    def __init__(self) -> None:
        self.reading: Callable[[], object] = lambda: None
        self._adapter_manager = Adapters()


def _read(manager: Manager, request: LoRARequest) -> Any:
    content = (Path(request.lora_path) / "adapter_model.safetensors").read_text()
    manager.reading()
    return SimpleNamespace(id=request.lora_int_id, content=content)


@pytest.fixture
def board(tmp_path: Path) -> Board:
    (tmp_path / "boards").mkdir()
    return Board("engine", lambda: tmp_path / "boards")


@pytest.fixture
def watch(board: Board, monkeypatch: pytest.MonkeyPatch) -> Iterator[AdapterWatch]:
    monkeypatch.setattr(worker_manager.WorkerLoRAManager, "_load_adapter", _read)
    one = AdapterWatch(board)
    assert one.install()
    yield one
    one.close()


def read(board: Board) -> Published:
    found = board.read()
    assert found is not None
    return found


def test_a_worker_publishes_what_it_loaded(
    board: Board, watch: AdapterWatch, tmp_path: Path
) -> None:
    assert read(board).loaded == {}
    folder = write(tmp_path / "adapter", "one")
    manager = Manager()
    manager.add_adapter(lora(folder))
    use = AdapterUse(1, adapter_identity(folder))
    assert read(board).loaded == {"1": use.content}
    assert watch.agrees("r", use)
    write(folder, "two")
    manager.add_adapter(lora(folder))
    assert watch.agrees("r", use), "vLLM keeps what it has loaded"
    assert read(board).replaced == []
    manager.remove_adapter(1)
    assert read(board).loaded == {}


def test_reloaded_in_place(board: Board, watch: AdapterWatch, tmp_path: Path) -> None:
    folder = write(tmp_path / "adapter", "one")
    manager = Manager()
    manager.add_adapter(lora(folder))
    before = AdapterUse(1, adapter_identity(folder))
    assert watch.agrees("early", before)
    manager.add_adapter(lora(folder, load_inplace=True))
    assert watch.agrees("early", before), "the same content again changes nothing"
    write(folder, "two")
    manager.add_adapter(lora(folder, load_inplace=True))
    after = AdapterUse(1, adapter_identity(folder))
    assert not watch.agrees("late", before)
    assert watch.agrees("new", after)
    assert read(board).replaced == [["sql", str(folder)]]
    write(folder, "one")
    manager.add_adapter(lora(folder, load_inplace=True))
    assert not watch.agrees("early", before), "part of it was computed with another one"
    assert not watch.agrees("late", before)
    assert watch.agrees("newest", before)
    watch.forget(["early"])
    assert watch.agrees("early", before), "a request of the same name"


def test_files_that_change_while_they_are_loaded(
    board: Board, watch: AdapterWatch, tmp_path: Path
) -> None:
    folder = write(tmp_path / "adapter", "one")
    manager = Manager()
    manager.reading = lambda: write(folder, "two")
    manager.add_adapter(lora(folder))
    assert read(board).loaded == {"1": ""}
    assert not watch.agrees("r", AdapterUse(1, adapter_identity(folder)))
    assert not watch.agrees("r", AdapterUse(1, ""))


def test_a_load_that_fails_leaves_no_name(
    board: Board, watch: AdapterWatch, tmp_path: Path
) -> None:
    folder = write(tmp_path / "adapter", "one")
    manager = Manager()

    with pytest.raises(FileNotFoundError):
        manager.add_adapter(lora(tmp_path / "gone", 2))
    manager._adapter_manager.full = True
    with pytest.raises(RuntimeError):
        manager.add_adapter(lora(folder))
    assert read(board).loaded == {}
    assert not watch.agrees("r", AdapterUse(1, adapter_identity(folder)))


def test_evicted_and_loaded_again(board: Board, watch: AdapterWatch, tmp_path: Path) -> None:
    folder = write(tmp_path / "adapter", "one")
    manager = Manager()
    manager.add_adapter(lora(folder))
    use = AdapterUse(1, adapter_identity(folder))
    assert watch.agrees("r", use)
    for number in (2, 3):
        manager.add_adapter(lora(write(tmp_path / f"{number}", f"{number}"), number))
    assert set(read(board).loaded) == {"2", "3"}
    write(folder, "two")
    manager.add_adapter(lora(folder))
    assert not watch.agrees("r", use)
    assert read(board).replaced == [["sql", str(folder)]]


def test_vllm_is_left_as_it_was(board: Board, tmp_path: Path) -> None:
    before = [dict(vars(cls)) for cls in (worker_manager.WorkerLoRAManager, Manager.__bases__[0])]
    watch = AdapterWatch(board)
    assert watch.install()
    assert worker_manager.WorkerLoRAManager._load_adapter is not before[0]["_load_adapter"]
    watch.close()
    after = [dict(vars(cls)) for cls in (worker_manager.WorkerLoRAManager, Manager.__bases__[0])]
    assert after == before
    assert board.read() is None


def test_a_worker_that_cannot_publish(watch: AdapterWatch, board: Board, tmp_path: Path) -> None:
    manager = Manager()
    folder = write(tmp_path / "adapter", "one")
    board._folder().rename(tmp_path / "moved")
    manager.add_adapter(lora(folder))
    assert board.read() is None
    assert not watch.agrees("r", AdapterUse(1, adapter_identity(folder)))


# -- the board -------------------------------------------------------------------------------------


def test_boards_of_engines_that_are_gone_are_taken_away(board: Board, tmp_path: Path) -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    gone = tmp_path / "boards" / "gone.json"
    gone.write_text(f'{{"pid": {pid}, "loaded": {{}}, "replaced": []}}')
    other = Board("other", lambda: tmp_path / "boards")
    other.write(Published())
    board.write(Published())
    board.remove()
    assert [file.name for file in (tmp_path / "boards").iterdir()] == ["other.json"]


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]", "[" * 100_000, '{"loaded": 1, "what": 2}', '{"loaded": 1}'),
        *('{"replaced": {}}', '{"pid": "1"}', f'{{"pid": {1 << 70}}}', '{"pid": -1}'),
    ],
    ids=range(10),
)
def test_a_damaged_board_says_nothing(board: Board, tmp_path: Path, text: str) -> None:
    board.write(Published(loaded={"1": "x"}))
    assert read(board).loaded == {"1": "x"}
    (tmp_path / "boards" / "engine.json").write_text(text)
    assert board.read() is None
    (tmp_path / "boards" / "other.json").write_text(text)
    board.remove()
    assert list((tmp_path / "boards").iterdir()) == []


# -- in the scheduler ------------------------------------------------------------------------------


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def config(**options: Any) -> Any:
    values = {
        "lora_dtype": "auto",
        "target_modules": None,
        "enable_tower_connector_lora": False,
        "enable_mixed_moe_lora_format": False,
        "enable_moe_shared_loras": False,
        **options,
    }
    return SimpleNamespace(
        lora_config=SimpleNamespace(**values), model_config=SimpleNamespace(dtype="torch.bfloat16")
    )


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def names(board: Board, clock: Clock) -> Iterator[AdapterNames]:
    one = AdapterNames(config(), board, deadline_s=5, resolve=str, clock=clock)
    yield one
    one.close()


def asked(names: AdapterNames, adapter: LoRARequest, media: bool = False) -> RequestAdapter:
    request: Any = SimpleNamespace(lora_request=adapter, mm_features=[1] if media else [])
    found = names.of(request, cacheable=True)
    assert found is not None
    return found


def settled(adapter: RequestAdapter) -> RequestAdapter:
    while not adapter.settle():
        if adapter._files is not None:
            adapter._files.exception(30)
    return adapter


def test_a_request_without_an_adapter(names: AdapterNames) -> None:
    request: Any = SimpleNamespace(lora_request=None)
    assert names.of(request, cacheable=True) is None


def test_what_is_loaded_counts_and_not_the_files(
    names: AdapterNames, board: Board, tmp_path: Path
) -> None:
    folder = write(tmp_path / "adapter", "files")
    board.write(Published(loaded={"1": "loaded"}))
    one = asked(names, lora(folder))
    assert one.settle()
    assert one.use == AdapterUse(1, "loaded")
    board.write(Published(loaded={"1": "other"}))
    assert one.settle()
    assert one.use == AdapterUse(1, "other"), "nothing was planned yet"
    assert one.offered(asynchronous=True)
    one.plan()
    assert not one.offered(asynchronous=False), "once"
    board.write(Published(loaded={"1": "loaded"}))
    assert one.settle()
    assert one.use == AdapterUse(1, "other")
    assert one.changed(board.read())


def test_what_is_not_loaded_yet_is_what_the_files_hold(
    names: AdapterNames, board: Board, tmp_path: Path
) -> None:
    folder = write(tmp_path / "adapter", "one")
    board.write(Published())
    one = settled(asked(names, lora(folder)))
    assert one.use == AdapterUse(1, adapter_identity(folder))
    assert one.offered(asynchronous=False)
    assert not one.offered(asynchronous=True), "nobody could check"
    write(folder, "two")
    two = settled(asked(names, lora(folder)))
    assert two.use == AdapterUse(1, adapter_identity(folder)), "not what was read before"
    assert two.fact != one.fact
    copy = settled(asked(names, lora(write(tmp_path / "copy", "two"), 9, lora_name="copy")))
    assert copy.fact == two.fact, "numbers, names and places say nothing"


def test_what_is_loaded_anew_in_every_step_is_what_the_files_hold(
    names: AdapterNames, board: Board, tmp_path: Path
) -> None:
    folder = write(tmp_path / "adapter", "one")
    board.write(Published(loaded={"1": "loaded"}))
    one = settled(asked(names, lora(folder, load_inplace=True)))
    assert one.use == AdapterUse(1, adapter_identity(folder))
    one.plan()
    assert not one.changed(board.read())


def test_nobody_waits_longer_than_the_deadline(
    board: Board, clock: Clock, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    board.write(Published())
    go_on = threading.Event()

    def slow(path: str) -> str:
        go_on.wait(30)
        return path

    names = AdapterNames(config(), board, deadline_s=5, resolve=slow, clock=clock)
    one, two = (asked(names, lora(write(tmp_path / "adapter", "one"))) for _ in range(2))
    assert not one.settle()
    clock.now = 5.1
    assert one.settle()
    assert two.settle()
    assert one.use is two.use is None
    go_on.set()
    names.close()
    assert len([line for line in caplog.messages if "aren't cached" in line]) == 1


@pytest.mark.parametrize("published", [None, Published(loaded={"1": ""})])
def test_what_nobody_knows_is_not_cached(
    names: AdapterNames, board: Board, tmp_path: Path, published: Published | None
) -> None:
    if published is not None:
        board.write(published)
    one = asked(names, lora(write(tmp_path / "adapter", "one")))
    assert one.settle()
    assert (one.use, one.fact) == (None, "")


def test_an_adapter_without_files_is_not_cached(
    names: AdapterNames, board: Board, tmp_path: Path
) -> None:
    board.write(Published())
    assert settled(asked(names, lora(tmp_path / "gone"))).use is None


def test_what_vllm_has_of_another_content_is_left_alone(
    names: AdapterNames, board: Board, tmp_path: Path
) -> None:
    folder = write(tmp_path / "adapter", "one")
    board.write(Published(loaded={"1": "one"}))
    first = settled(asked(names, lora(folder)))
    assert first.holds(64)
    # As the scheduler saw it:
    board.write(Published(loaded={"1": "two"}))
    second = settled(asked(names, lora(folder)))
    assert second.holds(0)
    assert not second.holds(64)
    # And for good, whatever is loaded later:
    board.write(Published(loaded={"1": "one"}))
    assert not settled(asked(names, lora(folder))).holds(64)
    # As the worker saw it:
    other = write(tmp_path / "other", "one")
    board.write(Published(loaded={"2": "one"}, replaced=[["sql", str(other)]]))
    assert not settled(asked(names, lora(other, 2))).holds(64)


def test_requests_that_are_not_cached_leave_something_in_vllms_cache_too(
    names: AdapterNames, board: Board, tmp_path: Path
) -> None:
    folder = write(tmp_path / "adapter", "one")
    board.write(Published(loaded={"1": "one"}))
    request: Any = SimpleNamespace(lora_request=lora(folder), mm_features=[])
    skipped = names.of(request, cacheable=False)
    assert skipped is not None
    assert skipped.settle()
    assert skipped.use is None
    assert not settled(asked(names, lora(folder))).holds(64)


def test_images_that_another_tower_saw(board: Board, clock: Clock, tmp_path: Path) -> None:
    folder = write(tmp_path / "adapter", "one")
    board.write(Published(loaded={"1": "one"}, replaced=[["sql", str(folder)]]))
    for tower in (False, True):
        options = config(enable_tower_connector_lora=tower)
        names = AdapterNames(options, board, deadline_s=5, resolve=str, clock=clock)
        assert settled(asked(names, lora(folder))).holds(0)
        assert settled(asked(names, lora(folder), media=True)).holds(0) is not tower
        names.close()


def test_what_the_engine_does_otherwise_is_in_the_name() -> None:
    plain = lora(Path("/adapter"))
    assert adapter_facts(config(), plain) == {}
    assert adapter_facts(config(lora_dtype="torch.bfloat16"), plain) == {}
    for options in (
        {"lora_dtype": "float16"},
        {"target_modules": ["q_proj"]},
        {"enable_tower_connector_lora": True},
        {"enable_moe_shared_loras": True},
    ):
        assert len(adapter_facts(config(**options), plain)) == 1
    mixed = config(enable_mixed_moe_lora_format=True)
    assert adapter_facts(mixed, plain) == {}
    fused = lora(Path("/adapter"), is_3d_lora_weight=True)
    assert adapter_facts(mixed, fused) == {"fused_experts": True}
