"""Compiles every Triton kernel of this package for NVIDIA GPUs, down to machine code; needs no GPU.

    python kernels/tests/compile_kernels.py [CAPABILITY ...]      80 and 90, if none is given

Makes the same calls as on a GPU, but in place of each launch compiles the kernel for the launch's
arguments, with the compiler and the assembler that are in triton's wheel. Prints one JSON object
for each: kernel, capability, the bytes of its machine code, and its float32 instructions. That a
kernel compiles doesn't show that it is right on hardware, nor fast.
"""

from __future__ import annotations

import json
import re
import struct
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
import triton
from paged_memory import Paged
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lmcache_core.chunks.layout import DType
from lmcache_core.contracts.connector import BlockSpan
from lmcache_kernels import _native, triton_kernels
from lmcache_kernels.codec.gpu import (
    decode_kernels,
    encode_kernels,
    survey_kernels,
    value_kernels,
    write_kernels,
)
from lmcache_kernels.codec.gpu.decoder import GpuDecoder
from lmcache_kernels.codec.gpu.encoder import GpuEncoder
from lmcache_kernels.codec.gpu.work import EncoderOptions

CODEC = (decode_kernels, encode_kernels, survey_kernels, value_kernels, write_kernels)
_POINTERS = {
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.float32: "*fp32",
}
_OPTIONS = ("num_warps", "enable_fp_fusion")
_FLOATS = re.compile(r"\b(?:fma|mul|add|sub|div|sqrt)\.[a-z.]*f32\b")


def public(module: ModuleType) -> list[str]:
    """What a module launches: `_move`, or what has no underscore. Compiled or interpreted."""
    return [
        name
        for name, value in vars(module).items()
        if isinstance(value, triton.runtime.KernelInterface)
        and value.fn.__module__ == module.__name__
        and (name == "_move" or not name.startswith("_"))
    ]


class Compiled:
    """Stands where a kernel stood. Each different launch is compiled once."""

    def __init__(self, kernel: Any, capabilities: list[int], show: Callable[[Any], None]) -> None:
        self._kernel, self._capabilities, self._show = kernel, capabilities, show
        self._seen: set[str] = set()

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self._launch

    def _launch(self, *arguments: Any, **named: Any) -> None:
        options = {name: named.pop(name) for name in _OPTIONS if name in named}
        bound = dict(zip(self._kernel.arg_names, arguments, strict=False)) | named
        signature, constants = {}, {}
        for place, parameter in enumerate(self._kernel.params):
            value = bound[parameter.name]
            if parameter.is_constexpr:
                signature[parameter.name] = "constexpr"
                constants[(place,)] = value
            elif isinstance(value, torch.Tensor):
                signature[parameter.name] = _POINTERS[value.dtype]
            else:
                signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
        key = f"{signature} {constants}"
        if key not in self._seen:
            self._seen.add(key)
            for capability in self._capabilities:
                self._compile(capability, ASTSource(self._kernel, signature, constants), options)

    def _compile(self, capability: int, source: Any, options: dict[str, Any]) -> None:
        target = GPUTarget("cuda", capability, 32)
        made = triton.compile(source, target=target, options=options)
        self._show(
            {
                "kernel": self._kernel.__name__,
                "capability": capability,
                "bytes": len(made.asm["cubin"]),
                "floats": sorted(set(_FLOATS.findall(made.asm["ptx"]))),
            }
        )


def launch_everything() -> None:
    """All paths of the package's kernels, in bfloat16."""
    paged, span = Paged("nhd", DType.BF16), BlockSpan([0, 1], 0, 8, 8)
    chunk = memoryview(bytearray(paged.group.chunk_bytes(8)))
    move = triton_kernels.TritonKernels()
    move.gather(paged.tensors, paged.layout, [span], [chunk], range(2))
    move.scatter([chunk], paged.tensors, paged.layout, [span], range(2))
    shape, turns = (0, 1, 2, 2, 32, 9), struct.pack("<2d", 1, 0)
    device, native = torch.device("cpu"), _native.Codec(1)
    elements = torch.randn(2 * 9 * 64).to(torch.bfloat16)
    elements[7] = float("nan")
    content = elements.view(torch.uint8)
    for kind in (1, 2, 3, 4):
        GpuEncoder(device).encode(shape, EncoderOptions(kind, turns=turns), content)
        into = bytearray(_native.codec_max_encoded(shape, 1))
        plain = bytes(content.tolist())
        size = native.encode(kind, shape, plain, into, (0.3, 0.3), turns, False, 1, None)
        stream, to = bytes(into[:size]), torch.empty_like(content)
        GpuDecoder(device).decode(kind, shape, stream, to)
    # A chunk of zeros is shorter than its states: raw.
    tiny, one = (0, 1, 1, 1, 1, 1), bytearray(_native.codec_max_encoded((0, 1, 1, 1, 1, 1), 0))
    size = native.encode(1, tiny, bytes(2), one, (1, 1), b"", False, 0, None)
    GpuDecoder(device).decode(1, tiny, bytes(one[:size]), torch.empty(2, dtype=torch.uint8))


def main(capabilities: list[int]) -> None:
    for module in (triton_kernels, *CODEC):
        for name in public(module):
            kernel = Compiled(
                getattr(module, name), capabilities, lambda one: print(json.dumps(one))
            )
            setattr(module, name, kernel)
    launch_everything()


if __name__ == "__main__":
    main([int(each) for each in sys.argv[1:]] or [80, 90])
