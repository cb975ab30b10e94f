"""Memory that a caller hands over as KV: whether it is what the layout says.

A buffer of the right size in another order, of another type or that can't be written to would be
stored and served as if it were right. So its elements, their order, its shape and whether it may be
written to are compared before a byte moves, and what differs is named beside what must be.

Elements may be those of the layout's dtype, bytes, or integers of the same size, which is how
numpy and torch carry types that they don't have. Knows nothing about blocks or chunks.
"""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING, Any

from lmcache_core.chunks.layout import DType, LayerGroup

if TYPE_CHECKING:
    from typing_extensions import Buffer

_FLOATS = {"e": DType.F16, "f": DType.F32}
_INTEGERS = {"b": 1, "B": 1, "c": 1, "h": 2, "H": 2, "i": 4, "I": 4, "l": 4, "L": 4}
_WORDS = {"?": "bool", "e": "float16", "f": "float32", "d": "float64", "O": "objects"}
_TENSORS = {
    "bfloat16": DType.BF16,
    "float16": DType.F16,
    "float32": DType.F32,
    "float8_e4m3fn": DType.F8_E4M3,
    "float8_e5m2": DType.F8_E5M2,
}
_TENSOR_INTEGERS = {"uint8": 1, "int8": 1, "int16": 2, "uint16": 2, "int32": 4, "uint32": 4}


def kv_memory(buffer: Buffer, group: LayerGroup, tokens: int, *, writable: bool) -> memoryview:
    """The bytes of a buffer of ``layers x planes x tokens x heads x head_size`` elements.

    ``buffer`` has Python's buffer protocol or is a torch tensor in host memory; the view keeps it
    alive. With one dimension, only its size and elements are compared; with more, the shape must
    be the layout's, dimensions of one aside.

    Raises:
        TypeError: this is no memory.
        ValueError: it is read-only, of another type, order, shape or size.
    """
    if is_torch(buffer):
        view, shape, word = _tensor(buffer, group.dtype)
    else:
        view = _view(buffer)
        shape, word = tuple(view.shape or ()), _elements(view, group.dtype)
    expected = group.chunk_bytes(tokens)
    if view.nbytes != expected or not view.c_contiguous:
        raise ValueError(
            f"KV of {tokens} tokens must be a C-contiguous buffer of {expected} bytes; "
            f"this one has {view.nbytes}" + ("" if view.c_contiguous else " and isn't contiguous")
        )
    if word is not None:
        raise ValueError(
            f"KV of {group.dtype.value} is given as that, as bytes or as integers of "
            f"{group.dtype.itemsize * 8} bits; this buffer holds {word}"
        )
    if len(shape) > 1 and tokens:
        _check_shape(shape, expected // math.prod(shape), group, tokens)
    if writable and view.readonly:
        raise ValueError(
            f"KV can't be loaded into a {type(buffer).__name__} that is read-only; give a "
            "bytearray, or an array that may be written to"
        )
    # Python casts no view that has a zero in its shape.
    return view.cast("B") if view.nbytes else memoryview(bytearray())


def is_torch(given: object) -> bool:
    """Whether this is one of torch's own types, without importing torch."""
    return type(given).__module__.partition(".")[0] == "torch"


def carries(tensor_dtype: object, dtype: DType) -> bool:
    """Whether torch's ``tensor_dtype`` is ``dtype``, or bits of the same size."""
    name = str(tensor_dtype).removeprefix("torch.")
    return _TENSORS.get(name) is dtype or _TENSOR_INTEGERS.get(name) == dtype.itemsize


def _view(buffer: Buffer) -> memoryview:
    try:
        return memoryview(buffer)
    # numpy says so in either way where a type is none of Python's, such as ml_dtypes' bfloat16.
    except (TypeError, ValueError, BufferError) as error:
        raise TypeError(
            f"KV is a buffer, a torch tensor in host memory or a Paged; a {type(buffer).__name__} "
            f"isn't readable as one ({error}): of an array of another library's type, give "
            "array.view('uint16') or the like"
        ) from error


def _elements(view: memoryview, dtype: DType) -> str | None:
    """What a view holds, if that isn't ``dtype``."""
    if view.format == "B" or _FLOATS.get(view.format) is dtype:
        return None
    letter = view.format.lstrip("@=<>!")
    swapped = view.itemsize > 1 and (
        view.format[0] in ">!" if sys.byteorder == "little" else view.format[0] == "<"
    )
    if not swapped:
        if _FLOATS.get(letter) is dtype:
            return None
        if _INTEGERS.get(letter) is not None and view.itemsize in (1, dtype.itemsize):
            return None
    word = _WORDS.get(letter, f"format {view.format!r}")
    if letter in "bBhHiIlLqQ":
        word = f"{'u' if letter.isupper() else ''}int{view.itemsize * 8}"
    return f"{word} in another byte order" if swapped else word


def _tensor(tensor: Any, dtype: DType) -> tuple[memoryview, tuple[int, ...], str | None]:
    """A torch tensor's memory as bytes, its shape, and what it holds if that isn't ``dtype``."""
    import torch  # somebody has: it is where the tensor comes from

    if tensor.device.type != "cpu":
        raise ValueError(
            f"KV must lie in host memory; this tensor lies on {tensor.device}: give a Paged of an "
            "engine there, or tensor.cpu()"
        )
    shape = tuple(tensor.shape)
    known = carries(tensor.dtype, dtype) or tensor.dtype in (torch.uint8, torch.int8)
    word = None if known else str(tensor.dtype)
    if not tensor.is_contiguous():
        raise ValueError(
            f"KV must be C-contiguous; this tensor of shape {shape} isn't: give its contiguous()"
        )
    return memoryview(tensor.detach().view(-1).view(torch.uint8).numpy()), shape, word


def _check_shape(shape: tuple[int, ...], itemsize: int, group: LayerGroup, tokens: int) -> None:
    head = group.head_size
    if itemsize == 1:  # given as bytes, a head is as many times longer as an element has bytes
        head *= group.dtype.itemsize
    expected = (len(group.layers), group.planes, tokens, group.heads, head)
    if shape == expected or [n for n in shape if n != 1] == [n for n in expected if n != 1]:
        return
    raise ValueError(
        f"KV of {tokens} tokens has the shape {expected}: layers, planes, tokens, heads, head "
        f"size; this buffer has {shape}: transpose it, or give one dimension if that is its order"
    )
