"""What callers may give as token ids, and the two forms that the rest of core reads.

Ids come as lists, as arrays of any integer type, as tensors, or packed already. `plain` makes one
of two things of them: bytes of little-endian 32-bit ids, or a sequence of Python's integers, which
stays as it is, because whoever digests it may stop early. Whatever else is given is refused by one
sentence that says what it was and what to give instead: ids that are misread name another prompt.

Arrays are read through the buffer protocol, which numpy's, ctypes' and array's have; through
``__array__`` where an object has only that (pandas, JAX); torch's tensors by their own ``numpy()``,
after one copy to the host where they lie elsewhere. So nothing is imported here, and no Python
runs for each token. Not DLPack: Python's own library can't read what it hands over.

Knows nothing about digests, nor about prompts.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable, Sequence
from mmap import mmap
from operator import index
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, runtime_checkable

if TYPE_CHECKING:
    from typing_extensions import Buffer

ID_BYTES = 4
"""Bytes of one packed id."""
_END = 1 << 8 * ID_BYTES
_U32 = "I" if array("I").itemsize == ID_BYTES else "L"
_SIGNED = {1: "b", 2: "h", 4: "i", 8: "q"}
_WORDS = {"?": "bool", "e": "float16", "f": "float32", "d": "float64", "O": "object", "c": "char"}
_IDS = f"token ids are integers from 0 to {_END - 1}"


@runtime_checkable
class ArrayLike(Protocol):
    """Whatever can make a numpy array of itself."""

    def __array__(self) -> Any: ...


Tokens: TypeAlias = "Sequence[int] | Buffer | ArrayLike"
"""Ids in one dimension: a sequence, an array or a tensor of any integer type. ``bytes``,
``bytearray``, a mapped file and a memoryview of format ``B`` are packed ids; the elements of all
others, of numpy's ``uint8`` arrays too, are ids."""

Plain: TypeAlias = "bytes | bytearray | memoryview | Sequence[int]"
"""What `plain` answers."""


def plain(tokens: Tokens) -> Plain:
    """``tokens`` as packed little-endian 32-bit ids or as a sequence of integers.

    Of a sequence only both ends are looked at; `token_bytes`, and whatever digests, see the rest.

    Raises:
        TypeError: these aren't integers, or nothing that holds several.
        ValueError: they have more than one dimension, or a byte string isn't a whole number of ids.
        OverflowError: an id is negative or doesn't fit into 32 bits.
    """
    if isinstance(tokens, (list, tuple)):
        # Most calls, so without a call of its own.
        if not tokens or type(tokens[0]) is type(tokens[-1]) is int:
            return tokens
        return _checked_ends(tokens)
    if isinstance(tokens, (bytes, bytearray)):
        return _checked_bytes(tokens)
    if isinstance(tokens, range):
        return _checked_ends(tokens)
    if isinstance(tokens, mmap):
        return _checked_bytes(memoryview(tokens))
    if isinstance(tokens, str):
        raise TypeError(f"tokens: {tokens[:20]!r} is text, and {_IDS}: give the tokenizer's ids")
    view = _view(tokens)
    if view is None:
        if isinstance(tokens, Sequence):
            return _checked_ends(tokens)
        raise TypeError(
            f"tokens of type {_kind(tokens)} aren't a sequence or an array: give a list of ids"
        )
    if view.ndim != 1:
        shape = tuple(view.shape or ())
        rows = "tokens[0]" if shape[:1] == (1,) else "one sequence at a time"
        raise ValueError(
            f"tokens of type {_kind(tokens)} have the shape {shape}, and ids have one dimension: "
            f"give {rows}"
        )
    if isinstance(tokens, memoryview) and view.format == "B":
        return _checked_bytes(view if view.c_contiguous else view.tobytes())
    return _packed(view, tokens)


def count(tokens: Plain) -> int:
    """How many ids there are."""
    if isinstance(tokens, (bytes, bytearray, memoryview)):
        return len(tokens) // ID_BYTES
    return len(tokens)


def token_bytes(tokens: Tokens) -> bytes:
    """``tokens`` as little-endian 32-bit integers. Raises as `plain` does."""
    ids = plain(tokens)
    if isinstance(ids, (bytes, bytearray, memoryview)):
        return bytes(ids)
    try:
        words = array(_U32, ids)
    except (TypeError, OverflowError):
        raise _mistake(ids) from None
    if sys.byteorder == "big":
        words.byteswap()
    return words.tobytes()


def _checked_ends(ids: Sequence[int]) -> Sequence[int]:
    # A batch, a mask and text show at once, however short they are.
    if len(ids) and not type(ids[0]) is type(ids[-1]) is int:
        for end in (ids[0], ids[-1]):
            if (error := _wrong(end)) is not None:
                raise error
    return ids


def _checked_bytes(packed: bytes | bytearray | memoryview) -> bytes | bytearray | memoryview:
    if len(packed) % ID_BYTES:
        raise ValueError(
            f"tokens: {len(packed)} bytes aren't a whole number of 32-bit token ids; "
            "give a list or an array where each element is an id"
        )
    return packed


def _view(tokens: Tokens) -> memoryview | None:
    """The memory of an array; ``None`` for what is no array."""
    given: Any = tokens
    try:
        if type(given).__module__.partition(".")[0] == "torch":
            given = given.detach().cpu().numpy()
        try:
            return memoryview(given)
        except TypeError:
            if not isinstance(given, ArrayLike):
                return None
            return memoryview(given.__array__())
    # Each library says in its own way that a type is none of Python's.
    except (TypeError, ValueError, BufferError, RuntimeError, AttributeError) as error:
        raise TypeError(
            f"tokens of type {_kind(tokens)} can't be read ({error}), and {_IDS}: "
            "give a list of them"
        ) from error


def _packed(view: memoryview, tokens: Tokens) -> bytes:
    """The elements of an integer array, whatever their size, sign, order and distance."""
    order, letter = (
        ("@", view.format) if len(view.format) == 1 else (view.format[0], view.format[1:])
    )
    size = view.itemsize
    if order not in "@=<>!" or letter not in "bBhHiIlLqQnN" or size not in _SIGNED:
        word = _WORDS.get(letter, f"format {view.format!r}")
        raise TypeError(
            f"tokens of type {_kind(tokens)} hold {word}, and {_IDS}: convert them yourself"
        )
    signed, raw = letter.islower() or letter == "n", view.tobytes()
    if size > 1 and (order in ">!" or (order in "@=" and sys.byteorder == "big")):
        words = array(_SIGNED[size], raw)
        words.byteswap()
        raw = words.tobytes()
    if size == 8:
        # array's own slices: those of a memoryview take several times as long.
        halves = array(_U32, raw)
        low, high = halves[::2].tobytes(), halves[1::2].tobytes()
        fits = high == bytes(len(high))
    else:
        low = raw
        # The highest byte of each says whether it is negative.
        fits = not signed or raw[size - 1 :: size].isascii()
    if not fits:
        code = _SIGNED[size] if signed else _SIGNED[size].upper()
        words = array(code, raw)
        if sys.byteorder == "big":
            words.byteswap()
        raise _mistake(words)
    if size >= ID_BYTES:
        return low
    code = _SIGNED[size].upper()
    wide = array(code, bytes(len(view) * ID_BYTES))
    wide[:: ID_BYTES // size] = array(code, low)
    return wide.tobytes()


def _mistake(ids: Iterable[object]) -> Exception:
    """The error of the first of ``ids`` that is none."""
    found = (error for item in ids if (error := _wrong(item)) is not None)
    return next(found, None) or TypeError(f"tokens changed while they were read, and {_IDS}")


def _wrong(item: object) -> Exception | None:
    if isinstance(item, bool):
        return TypeError(f"tokens: {item} is a truth value, and {_IDS}: give the ids, not a mask")
    if isinstance(item, (list, tuple)):
        return ValueError(
            f"tokens: a sequence of {type(item).__name__}s, and ids have one dimension: "
            "give one of them"
        )
    try:
        number = index(item)  # type: ignore[arg-type]
    except TypeError:
        return TypeError(f"tokens: {_short(item)} of type {type(item).__name__}, and {_IDS}")
    if 0 <= number < _END:
        return None
    return OverflowError(f"tokens: {number}, and {_IDS}: leave padding and placeholders out")


def _short(item: object) -> str:
    text = repr(item)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _kind(tokens: object) -> str:
    kind = type(tokens)
    prefix = "" if kind.__module__ == "builtins" else f"{kind.__module__}."
    return prefix + kind.__qualname__
