"""Published schemes for comparison, computed in torch with all bits accounted for.

None of them is a serde: nothing is packed, and speed isn't what they are for. A *reference* takes
keys or values of one layer, tokens x heads x head size in float32, and answers what would come
back, and how many bits would be stored. Sources are named with each.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lmcache_kernels.codec_eval.schemes import CHUNK_TOKENS, Coded

Plane = Callable[[Tensor, int, int], "tuple[Tensor, float]"]
"""(values, layer, layers) -> (values as decoded, bits)."""
_E4M3_MAX = 448.0


@dataclass(frozen=True)
class Reference:
    """A scheme made of what it does with a layer's keys, and with its values."""

    name: str
    keys: Plane
    values: Plane
    reference: bool = True

    def code(self, cache: Tensor) -> Coded:
        decoded, bits = torch.empty_like(cache), 0.0
        for number, layer in enumerate(cache):
            for plane, (coder, x) in enumerate(zip((self.keys, self.values), layer, strict=True)):
                y, more = coder(x.float(), number, len(cache))
                decoded[number, plane] = y.to(cache.dtype)
                bits += more
        return Coded(decoded, bits)


def references() -> list[Reference]:
    """All of them."""
    four = turbo(4)
    return [
        Reference("int8 token+head", int8, int8),
        Reference("fp8 cast", fp8, fp8),
        Reference("KIVI 4/4", kivi_keys(4), kivi_values(4)),
        Reference("KIVI 2/2", kivi_keys(2), kivi_values(2)),
        Reference("TurboQuant k8v4", fp8, four),
        Reference("TurboQuant 4/4", four, four),
        Reference("CacheGen as shipped", shipped_cachegen(10), shipped_cachegen(2)),
        Reference("CacheGen, paper", paper_cachegen, paper_cachegen),
    ]


# -- casts and plain integers ------------------------------------------------------------------


def int8(x: Tensor, layer: int, layers: int) -> tuple[Tensor, float]:  # noqa: ARG001
    """Symmetric integers, with a 16-bit scale for each token and head."""
    scale = (x.abs().amax(-1, keepdim=True) / 127).half().float().clamp_min(1e-7)
    return (x / scale).round().clamp(-127, 127) * scale, 8.0 * x.numel() + 16.0 * scale.numel()


def fp8(x: Tensor, layer: int, layers: int) -> tuple[Tensor, float]:  # noqa: ARG001
    """E4M3 without a scale."""
    return x.clamp(-_E4M3_MAX, _E4M3_MAX).to(torch.float8_e4m3fn).float(), 8.0 * x.numel()


def _asymmetric(groups: Tensor, bits: int) -> tuple[Tensor, float]:
    """Integers between the least and the largest along the last axis: 16 bits each for them."""
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale = ((high - low) / (2**bits - 1)).half().float().clamp_min(1e-7)
    low = low.half().float()
    decoded = ((groups - low) / scale).round().clamp(0, 2**bits - 1) * scale + low
    return decoded, float(bits * groups.numel() + 32 * low.numel())


# -- KIVI (arXiv 2402.02750), groups of 32; without its window of tokens that aren't quantised,
# -- which a stored chunk has no use for


def kivi_keys(bits: int, size: int = 32) -> Plane:
    """Each channel in groups of ``size`` tokens."""

    def code(x: Tensor, layer: int, layers: int) -> tuple[Tensor, float]:  # noqa: ARG001
        whole = len(x) // size * size
        groups = x[:whole].unflatten(0, (-1, size)).movedim(1, -1)
        y, stored = _asymmetric(groups, bits)
        decoded = x.clone()  # what doesn't fill a group stays as it is
        decoded[:whole] = y.movedim(-1, 1).flatten(0, 1)
        return decoded, stored + 16.0 * x[whole:].numel()

    return code


def kivi_values(bits: int, size: int = 32) -> Plane:
    """Each token in groups of ``size`` channels."""

    def code(x: Tensor, layer: int, layers: int) -> tuple[Tensor, float]:  # noqa: ARG001
        y, stored = _asymmetric(x.flatten().unflatten(0, (-1, size)), bits)
        return y.view_as(x), stored

    return code


# -- TurboQuant (arXiv 2504.19874): a random rotation, then the best scalar quantiser for what that
# -- makes of any vector


def turbo(bits: int) -> Plane:
    """Norms in 16 bits, ``bits`` for each element of the rotated direction."""
    codebook = _lloyd_max(2**bits)

    def code(x: Tensor, layer: int, layers: int) -> tuple[Tensor, float]:  # noqa: ARG001
        size = x.shape[-1]
        rotation = _rotation(size)
        norm = x.norm(dim=-1, keepdim=True).clamp_min(1e-9)
        rotated = x / norm @ rotation.T * math.sqrt(size)
        symbols = torch.bucketize(rotated, (codebook[1:] + codebook[:-1]) / 2)
        y = codebook[symbols]
        y = y / y.norm(dim=-1, keepdim=True)  # its variant that keeps norms
        return y @ rotation * norm.half().float(), float(bits * x.numel() + 16 * norm.numel())

    return code


def _rotation(size: int) -> Tensor:
    """An orthogonal matrix, the same every time."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(size, size, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(noise).Q.float()


def _lloyd_max(levels: int) -> Tensor:
    """The levels that represent a normal variable best (Lloyd 1957, Max 1960)."""
    grid = torch.linspace(-5, 5, 20001, dtype=torch.float64)
    weight = torch.exp(-grid * grid / 2)
    codebook = torch.linspace(-2.5, 2.5, levels, dtype=torch.float64)
    for _ in range(100):
        nearest = torch.bucketize(grid, (codebook[1:] + codebook[:-1]) / 2)
        mass = torch.zeros(levels, dtype=torch.float64).index_add_(0, nearest, weight)
        codebook = torch.zeros_like(mass).index_add_(0, nearest, weight * grid) / mass
    return codebook.float()


# -- CacheGen (arXiv 2310.07240), as LMCache 0.5.6 ships it and as its paper describes it


def shipped_cachegen(fine_layers: int) -> Plane:
    """32 bins in the first ``fine_layers`` layers, 16 in the others; a scale for each token.

    Symbols are coded arithmetically, each channel of a chunk with frequencies of its own, which are
    stored: 33 x 16 bits. Lengths are those of an ideal coder, in bytes, and 32 bits for each
    stream's offset.
    """

    def code(x: Tensor, layer: int, layers: int) -> tuple[Tensor, float]:  # noqa: ARG001
        most = (32 if layer < fine_layers else 16) // 2 - 1
        flat = x.flatten(1)
        scale = flat.abs().amax(1, keepdim=True).bfloat16().float().clamp_min(1e-9)
        symbols = (flat / scale * most).round().clamp(-most, most)
        bits = 16.0 * len(flat)
        for chunk in symbols.split(CHUNK_TOKENS):
            streams = (_entropy_bits(chunk + most, 2 * most + 1) / 8).ceil() * 8 + 8
            bits += float(streams.sum()) + chunk.shape[1] * (33 * 16 + 32)
        return (symbols / most * scale).view_as(x), bits

    return code


def paper_cachegen(x: Tensor, layer: int, layers: int) -> tuple[Tensor, float]:
    """Differences from an 8-bit anchor, every tenth token, in bins that widen with depth.

    Bins are .15, .3 and .45 of the differences' rms in the first, second and last third of layers.
    That rms and each channel's frequencies are taken from the context itself and not counted: they
    would come from a profile, and fit a little worse.
    """
    flat = x.flatten(1)
    anchors = flat[::10]
    scale = (anchors.abs().amax(1, keepdim=True) / 127).half().float().clamp_min(1e-9)
    base = ((anchors / scale).round() * scale).repeat_interleave(10, 0)[: len(flat)]
    other = torch.arange(len(flat)) % 10 != 0
    difference = (flat - base)[other]
    width = (0.15, 0.3, 0.45)[layer * 3 // layers] * difference.pow(2).mean().sqrt()
    symbols = (difference / width).round()
    decoded = base.clone()
    decoded[other] += symbols * width
    shifted = symbols - symbols.amin()
    coded = float(_entropy_bits(shifted, int(shifted.max()) + 1).sum())
    return decoded.view_as(x), coded + 8.0 * anchors.numel() + 16.0 * len(anchors)


def _entropy_bits(symbols: Tensor, alphabet: int) -> Tensor:
    """Bits of each column of ``symbols`` (0 to alphabet - 1), coded with its own frequencies."""
    counts = torch.zeros(alphabet, symbols.shape[1])
    counts.scatter_add_(0, symbols.long(), torch.ones_like(symbols))
    share = counts / len(symbols)
    return -(counts * share.clamp_min(1e-12).log2()).sum(0)
