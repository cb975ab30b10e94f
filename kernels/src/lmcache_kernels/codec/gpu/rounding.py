"""How an encoder's values become integers: the kernels' launches, in order.

Knows which kernel reads what of which. Knows nothing about coding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton  # type: ignore[import-untyped,import-not-found,unused-ignore]

from lmcache_kernels.codec.gpu import stream as streams
from lmcache_kernels.codec.gpu import survey_kernels, value_kernels
from lmcache_kernels.codec.gpu.device import EXACT
from lmcache_kernels.codec.gpu.work import TILE, WIDTH, Work

_SAMPLE = survey_kernels.SAMPLE.value
_Angles = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Rounded:
    """What a stream says of its values, but for symbols and tables, which are in `Work`."""

    means: torch.Tensor
    steps: torch.Tensor
    centres: torch.Tensor


def round_values(work: Work) -> Rounded:
    """Leave integers and the choice of tables in ``work``."""
    rounded = Rounded(
        work.room("channel", torch.int16),
        work.room("head", torch.float32),
        work.room("head", torch.int8),
    )
    angles = work.device.angles(work.header.turns, work.shape.tokens)
    numbers = work.room("numbers", torch.float32)
    key_rms = _survey(work, angles)
    _read(work, angles, numbers)
    _steps(work, numbers, key_rms, rounded)
    _levels(work, numbers, rounded)
    _integers(work, numbers, rounded)
    return rounded


def _survey(work: Work, angles: _Angles) -> torch.Tensor:
    """Each layer's rms of keys; whether the first token is stored raw is in ``work.first``."""
    shape, header, wish = work.shape, work.header, work.options.first_raw
    sample = min(_SAMPLE, shape.tokens)
    room = work.device.room
    spreads = room(shape.layers * shape.row, torch.float32)
    key_rms = room(shape.layers, torch.float32)
    drained = work.zeros(shape.layers)
    if shape.planes == 2:
        survey_kernels.survey_keys[(shape.layers, triton.cdiv(shape.row, WIDTH))](
            *(work.chunk, *angles, spreads, shape.tokens, shape.row, shape.head_size),
            *(header.pairs, int(header.interleaved), sample),
            DTYPE=shape.dtype,
            WIDTH=WIDTH,
            **EXACT,
        )
    survey_kernels.survey_layers[(shape.layers,)](
        *(work.chunk, spreads, key_rms, drained, shape.tokens, shape.row, shape.planes, sample),
        DTYPE=shape.dtype,
        **EXACT,
    )
    if shape.tokens > 1:
        work.first += 2 * drained.sum() >= shape.layers if wish < 0 else wish
    return key_rms


def _read(work: Work, angles: _Angles, numbers: torch.Tensor) -> None:
    shape, header = work.shape, work.header
    survey_kernels.read_numbers[work.grid()](
        *(work.chunk, work.sections, *angles, numbers, work.patches, shape.tokens, shape.row),
        *(shape.head_size, header.pairs, int(header.interleaved)),
        DTYPE=shape.dtype,
        TILE=TILE,
        WIDTH=WIDTH,
        **EXACT,
    )


def _steps(work: Work, numbers: torch.Tensor, key_rms: torch.Tensor, to: Rounded) -> None:
    """Means of channels and steps of heads."""
    shape, profile = work.shape, work.profile
    spreads = work.room("channel", torch.float32)
    known = to.means if profile is None else profile.means
    value_kernels.find_means[(work.count, work.passes)](
        *(numbers, work.sections, work.first, known, to.means, spreads, work.bad, shape.tokens),
        KNOWN_MEANS=profile is not None,
        num_warps=1,
        **EXACT,
    )
    value_kernels.find_steps[(work.count,)](
        *(work.sections, spreads, key_rms, to.steps, work.bad, *work.options.steps),
        shape.head_size,
        KNOWN_STEPS=profile is not None,
        MOST_HEADS=triton.next_power_of_2(work.heads),
        **EXACT,
    )


def _levels(work: Work, numbers: torch.Tensor, to: Rounded) -> None:
    """The step of each token and head: levels, in front of the sections' symbols."""
    shape, sections, first = work.shape, work.sections, work.first
    energies = work.room("token_head", torch.float32)
    value_kernels.find_energies[work.heads_grid()](
        *(numbers, sections, first, energies, shape.tokens, shape.head_size), TILE=TILE, **EXACT
    )
    value_kernels.find_centres[(work.count,)](
        *(sections, first, energies, to.centres, work.bad, shape.tokens),
        MOST_HEADS=triton.next_power_of_2(work.heads),
        **EXACT,
    )
    places = triton.cdiv(shape.tokens * work.heads, streams.LANES) * streams.LANES
    value_kernels.find_levels[(work.count, triton.cdiv(places, WIDTH))](
        *(sections, first, energies, to.centres, work.symbols, shape.tokens), TILE=WIDTH, **EXACT
    )


def _integers(work: Work, numbers: torch.Tensor, rounded: Rounded) -> None:
    shape, sections, first, profile = work.shape, work.sections, work.first, work.profile
    known = rounded.steps if profile is None else profile.steps
    value_kernels.quantise[work.grid()](
        *(numbers, sections, first, rounded.means, rounded.steps, known, rounded.centres),
        *(work.symbols, work.bad, shape.tokens, shape.head_size, work.options.steps[0]),
        KNOWN_STEPS=profile is not None,
        TILE=TILE,
        WIDTH=WIDTH,
        **EXACT,
    )
    value_kernels.choose_tables[(work.count, work.passes + 1)](
        *(sections, first, work.symbols, work.device.thresholds, work.tables, work.step_tables),
        shape.tokens,
        TILE=TILE,
        num_warps=1,
        **EXACT,
    )
