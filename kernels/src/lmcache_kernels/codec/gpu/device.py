"""What decoding and encoding have in common on the host: tables, angles, profiles, on a device.

Knows tensors. Knows nothing about streams.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from lmcache_kernels.codec.gpu import tables

ELEMENTS = (torch.int16, torch.int16, torch.int32, torch.int8)
"""By element type: the integers that elements are moved as."""

EXACT: dict[str, Any] = {"enable_fp_fusion": False}
"""How kernels are launched: float operations are rounded one by one."""


@dataclass(frozen=True)
class DeviceProfile:
    """What calibration found out about a model: see `lmcache_kernels.codec.profile.Profile`."""

    id: int
    steps: torch.Tensor
    """float32 [layers x heads x head size]"""
    means: torch.Tensor
    """int16 of the same shape: bfloat16's bits"""

    @classmethod
    def of(cls, id: int, steps: bytes, means: bytes, device: torch.device) -> DeviceProfile:
        """Raises ValueError where steps and means aren't of as many channels."""
        if id == 0 or len(steps) != 2 * len(means) or not means:
            raise ValueError(
                f"profile {id}: {len(steps)} bytes of steps and {len(means)} of means aren't one"
            )
        return cls(
            id,
            torch.frombuffer(bytearray(steps), dtype=torch.float32).to(device),
            torch.frombuffer(bytearray(means), dtype=torch.int16).to(device),
        )

    def check(self, channels: int, planes: int) -> None:
        """Raises ValueError where it isn't a profile of such a chunk."""
        if self.means.numel() != channels or planes != 2:
            raise ValueError(
                f"a profile of {self.means.numel()} channels isn't one of a chunk of {channels}"
            )


class Device:
    """A device's copies of the format's tables. Made on first use, and kept."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def tensor(self, values: Any, dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=self.device)

    def room(self, count: int, dtype: torch.dtype) -> torch.Tensor:
        """Memory that isn't cleared: a launch writes it before another reads it."""
        return torch.empty(max(count, 1), dtype=dtype, device=self.device)

    @cached_property
    def slots(self) -> torch.Tensor:
        return self.tensor(tables.decoding(), torch.int32)

    @cached_property
    def codes(self) -> torch.Tensor:
        return self.tensor(tables.encoding(), torch.int32)

    @cached_property
    def radii(self) -> torch.Tensor:
        return self.tensor(tables.radii(), torch.int32)

    @cached_property
    def thresholds(self) -> torch.Tensor:
        return self.tensor([*tables.THRESHOLDS, 2**31 - 1], torch.int32)

    @cached_property
    def costs(self) -> torch.Tensor:
        return self.tensor(tables.costs(), torch.int32)

    def angles(self, turns: tuple[float, ...], tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines of every token's angles, float32 [tokens, pairs].

        By repeated multiplication in float64, each operation of its own: as the format says.
        """
        pairs = len(turns) // 2
        one = torch.tensor(turns, dtype=torch.float64).view(pairs, 2)
        c1, s1 = one[:, 0], one[:, 1]
        cosines = torch.empty((tokens, pairs), dtype=torch.float64)
        sines = torch.empty((tokens, pairs), dtype=torch.float64)
        c, s = torch.ones_like(c1), torch.zeros_like(s1)
        for t in range(tokens):
            cosines[t], sines[t] = c, s
            c, s = c * c1 - s * s1, s * c1 + c * s1
        return self._angle(cosines), self._angle(sines)

    def _angle(self, wide: torch.Tensor) -> torch.Tensor:
        # A kernel is always given a pointer to something.
        flat = wide.to(torch.float32).reshape(-1)
        return (flat if flat.numel() else torch.zeros(1)).to(self.device)
