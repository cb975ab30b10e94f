"""Sees every address that a kernel reads or writes in Triton's interpreter.

Knows the interpreter's builder, which has one method for each kind of access. An access outside of
the tensors that the kernel was launched with is an error, although it might have gone unnoticed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import triton.language as tl
from triton.runtime import interpreter


class _Ranges:
    """Addresses of the running launch's tensors."""

    def __init__(self) -> None:
        self.starts = self.ends = np.zeros(0, "u8")

    def allow(self, arguments: list[Any]) -> None:
        tensors = [each for each in arguments if hasattr(each, "data_ptr")]
        sizes = {t.data_ptr(): 0 for t in tensors}
        for t in tensors:
            sizes[t.data_ptr()] = max(sizes[t.data_ptr()], t.numel() * t.element_size())
        self.starts = np.array(sorted(sizes), "u8")
        self.ends = self.starts + np.array([sizes[int(s)] for s in self.starts], "u8")

    def check(self, pointers: Any, mask: Any) -> None:
        at, masked = pointers.data, np.True_ if mask is None else mask.data
        at = np.asarray(at)[np.broadcast_to(masked, np.shape(at)).astype(bool)]
        if not at.size:
            return
        size = np.uint64(max(pointers.get_element_ty().primitive_bitwidth // 8, 1))
        place = np.searchsorted(self.starts, at, "right") - 1
        inside = (place >= 0) & (at + size <= self.ends[place])
        if not inside.all():
            raise AssertionError(f"{(~inside).sum()} accesses lie in none of the kernel's tensors")


@contextmanager
def watched_memory() -> Iterator[None]:
    """Every access is checked as long as this lasts."""
    ranges, builder = _Ranges(), interpreter.InterpreterBuilder
    start = interpreter.GridExecutor._init_args_hst
    load, store = builder.create_masked_load, builder.create_masked_store
    atomic, patch_language = builder.create_atomic_rmw, interpreter._patch_lang

    def starts(self: Any, arguments: Any, named: Any) -> Any:
        found = start(self, arguments, named)
        ranges.allow([*found[0], *found[1].values()])
        return found

    def loads(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        ranges.check(pointers, mask)
        return load(self, pointers, mask, *rest)

    def stores(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        ranges.check(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def atomics(self: Any, operation: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        ranges.check(pointers, mask)
        return atomic(self, operation, pointers, value, mask, *rest)

    def patches(function: Any) -> Any:
        # Each call of a function in a kernel patches the language again: a third of the time.
        mine = [each for each in (tl, tl.core) if each in function.__globals__.values()]
        if any(tl.core.is_builtin(each.load) for each in mine):
            return patch_language(function)
        return interpreter._LangPatchScope()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", patches)
        patch.setattr(interpreter.GridExecutor, "_init_args_hst", starts)
        patch.setattr(builder, "create_masked_load", loads)
        patch.setattr(builder, "create_masked_store", stores)
        patch.setattr(builder, "create_atomic_rmw", atomics)
        yield
