"""Whatever holds ids gives the same bytes as a list of them; whatever else is refused, by name."""

from __future__ import annotations

import array
import ctypes
import mmap
import subprocess
import sys
from collections import UserList
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcache_core.chunks.chunk_index import ChunkIndex, DictIndex
from lmcache_core.chunks.hashing import PrefixHasher
from lmcache_core.chunks.keys import ChunkKey
from lmcache_core.chunks.tokens import count, plain, token_bytes
from lmcache_core.plugins.manager import Plugins

IDS = [5, 0, 127, 1, 99, 3]
PACKED = b"".join(i.to_bytes(4, "little") for i in IDS)
ROOT = b"\x11" * 16
DTYPES = [f"{order}{kind}{size}" for order in "<>" for kind in "iu" for size in (1, 2, 4, 8)]


def tensor(dtype: str, data: Any = IDS) -> Any:
    torch = pytest.importorskip("torch")
    return torch.tensor(data, dtype=getattr(torch, dtype))


def a_file() -> mmap.mmap:
    mapped = mmap.mmap(-1, len(PACKED))
    mapped[:] = PACKED
    return mapped


class Exporter:
    """What pandas and JAX are: no buffer, but a way to an array."""

    def __init__(self, data: Any) -> None:
        self.data = np.array(data)

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        return self.data


GOOD = {
    "list": lambda: IDS,
    "tuple": lambda: tuple(IDS),
    "sequence": lambda: UserList(IDS),
    "list of numpy's": lambda: list(np.array(IDS)),
    "bytes": lambda: PACKED,
    "bytearray": lambda: bytearray(PACKED),
    "memoryview": lambda: memoryview(PACKED),
    "every other byte": lambda: memoryview(bytes(b for p in PACKED for b in (p, 9)))[::2],
    "mmap": a_file,
    "view of int64": lambda: memoryview(np.array(IDS)),
    "ctypes": lambda: (ctypes.c_uint16 * len(IDS))(*IDS),
    "read-only": lambda: np.frombuffer(PACKED, "<u4"),
    "__array__": lambda: Exporter(IDS),
    **{f"array {code}": lambda code=code: array.array(code, IDS) for code in "bBhHiIlLqQ"},
    **{dtype: lambda dtype=dtype: np.array(IDS, dtype) for dtype in DTYPES},
    **{f"{d} strided": lambda d=d: np.repeat(np.array(IDS, d), 3)[::3] for d in DTYPES},
    **{f"{d} reversed": lambda d=d: np.array(IDS[::-1], d)[::-1] for d in DTYPES},
    **{
        f"torch {d}": lambda d=d: tensor(d)
        for d in ("uint8", "int8", "int16", "int32", "int64", "uint32")
    },
    "torch strided": lambda: tensor("int64", [i for t in IDS for i in (t, -1)])[::2],
}

BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "a batch": (
        lambda: np.array([IDS]),
        ValueError,
        r"numpy.ndarray have the shape \(1, 6\).*tokens\[0\]",
    ),
    "rows": (lambda: np.array([IDS, IDS]), ValueError, r"shape \(2, 6\).*one sequence at a time"),
    "a number's array": (lambda: np.array(3), ValueError, r"shape \(\)"),
    "a batched tensor": (
        lambda: tensor("int64", [IDS]),
        ValueError,
        r"torch.Tensor have the shape \(1, 6\)",
    ),
    "a batch in lists": (lambda: [IDS], ValueError, "sequence of lists.*give one of them"),
    "a list of arrays": (lambda: [np.array(IDS)] * 2, TypeError, "of type ndarray"),
    "floats": (lambda: np.array(IDS, "f4"), TypeError, "numpy.ndarray hold float32.*convert"),
    "doubles": (lambda: array.array("d", IDS), TypeError, "array.array hold float64"),
    "a float tensor": (lambda: tensor("float32"), TypeError, "torch.Tensor hold float32"),
    "a bf16 tensor": (lambda: tensor("bfloat16"), TypeError, "torch.Tensor can't be read"),
    "a list of floats": (lambda: [1.5, 2.0], TypeError, "1.5 of type float"),
    "a float within": (lambda: [1, 2.5, 3], TypeError, "2.5 of type float"),
    "a mask": (lambda: np.array(IDS) > 2, TypeError, "hold bool"),
    "a mask tensor": (lambda: tensor("bool"), TypeError, "hold bool"),
    "a mask list": (lambda: [True, False], TypeError, "True is a truth value.*not a mask"),
    "objects": (lambda: np.array(IDS, object), TypeError, "hold object"),
    "dates": (lambda: np.array(IDS, "M8[s]"), TypeError, "can't be read"),
    "texts": (lambda: np.array(["a"]), TypeError, "numpy.ndarray hold format"),
    "pairs": (lambda: np.zeros(3, "i4,i4"), TypeError, "hold format"),
    "text": (lambda: "abc", TypeError, "'abc' is text"),
    "a list of text": (lambda: ["a", "b"], TypeError, "'a' of type str"),
    "a number": (lambda: 7, TypeError, "type int aren't a sequence"),
    "nothing": (lambda: None, TypeError, "NoneType aren't a sequence"),
    "a set": (lambda: {1, 2}, TypeError, "set aren't a sequence"),
    "an iterator": (lambda: iter(IDS), TypeError, "aren't a sequence"),
    "odd bytes": (lambda: b"12345", ValueError, "5 bytes aren't a whole number"),
    "an odd view": (lambda: memoryview(b"123456"), ValueError, "6 bytes aren't"),
    "a table of bytes": (
        lambda: memoryview(PACKED).cast("B", [6, 4]),
        ValueError,
        r"shape \(6, 4\)",
    ),
    "padding": (lambda: [1, -1, 2], OverflowError, "-1, and token ids.*padding"),
    "too great": (lambda: [1, 2**32, 2], OverflowError, "4294967296"),
    "far too great": (lambda: [1, 2**80], OverflowError, str(2**80)),
    **{
        f"padding in {dtype}": (
            lambda d=dtype: np.array([7, -100, 7], d),
            OverflowError,
            "-100, and",
        )
        for dtype in DTYPES
        if "i" in dtype
    },
    **{
        f"too great in {dtype}": (
            lambda d=dtype: np.array([7, 2**32, 7], d),
            OverflowError,
            "4294967296, and",
        )
        for dtype in ("<i8", ">i8", "<u8", ">u8")
    },
}


@pytest.mark.parametrize("name", GOOD)
def test_every_container_gives_the_same_bytes(name: str) -> None:
    tokens = GOOD[name]()
    assert token_bytes(tokens) == PACKED
    assert count(plain(tokens)) == len(IDS)
    hasher = PrefixHasher(ROOT, 2)
    assert hasher.extend(tokens) == PrefixHasher(ROOT, 2).extend(IDS)
    assert PrefixHasher(ROOT, 8).tail(tokens) == PrefixHasher(ROOT, 8).tail(IDS)


@pytest.mark.parametrize("name", BAD)
def test_what_holds_no_ids_is_one_sentence(name: str) -> None:
    make, kind, message = BAD[name]
    with pytest.raises(kind, match=message) as raised:
        token_bytes(make())
    said = str(raised.value)
    assert said.startswith("tokens")
    assert "\n" not in said


@pytest.mark.parametrize("name", BAD)
def test_hashers_and_indexes_refuse_it_too(name: str) -> None:
    make, kind, _ = BAD[name]
    for index in indexes():
        with pytest.raises(kind):
            PrefixHasher(ROOT, 1, index=index).extend(make())
        with pytest.raises(kind):
            PrefixHasher(ROOT, 8).tail(make())
        with pytest.raises(kind):
            index.digests(ROOT, make(), 1)
        hasher = PrefixHasher(ROOT, 1, index=index)
        try:
            found = hasher.find(make())
        except kind:
            continue
        # Ids after the first that misses aren't looked at.
        assert found == []
        assert len(hasher.digests) == 1


@pytest.mark.parametrize("name", GOOD)
def test_indexes_read_every_container(name: str) -> None:
    for index in indexes():
        digests = PrefixHasher(ROOT, 2).extend(IDS)
        for slot, digest in enumerate(digests[:2]):
            index.insert(ChunkKey(digest), slot, slot - 1, 3)
        assert index.digests(ROOT, GOOD[name](), 2) == b"".join(digests)
        assert index.match(ROOT, GOOD[name](), 2) == (b"".join(digests), [0, 1])
        assert PrefixHasher(ROOT, 2, index=index).find(GOOD[name]()) == [0, 1]


def indexes() -> list[ChunkIndex]:
    """Python's own, and the native one where it is installed."""
    return [DictIndex(4), Plugins().chunk_index(4)]


@given(st.data(), st.sampled_from(DTYPES))
@settings(max_examples=200, deadline=None)
def test_any_array_is_its_list(data: st.DataObject, dtype: str) -> None:
    bounds = np.iinfo(dtype)
    values = data.draw(st.lists(st.integers(int(bounds.min), int(bounds.max)), max_size=40))
    tokens = np.array(values, dtype)
    if all(0 <= value < 2**32 for value in values):
        assert token_bytes(tokens) == token_bytes(values)
    else:
        with pytest.raises(OverflowError):
            token_bytes(tokens)


def test_nothing_is_imported_for_it() -> None:
    code = (
        "import sys, array; from lmcache_core.chunks.tokens import token_bytes;"
        "token_bytes(array.array('q', [1])); token_bytes([1]);"
        "print([m for m in ('numpy', 'torch') if m in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"
