"""What was seen: of one place, and of all of them added up."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, fields


@dataclass
class Findings:
    """Numbers, and what mustn't be, in words. Plain data, which goes from process to process."""

    faults: Counter[str] = field(default_factory=Counter)
    """By their kind."""
    places: Counter[str] = field(default_factory=Counter)
    """How many faults each place saw."""
    wrong: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    """Calls that raised."""
    late: list[str] = field(default_factory=list)
    """Calls past their deadline and a tenth of it, where other processes don't explain it."""
    past: Counter[str] = field(default_factory=Counter)
    """All of those, by their name, whoever was to blame."""
    calls: dict[str, Counter[int]] = field(default_factory=dict)
    """How long they took: see `canary.quantile`."""
    longest_s: dict[str, float] = field(default_factory=dict)
    lost_s: float = 0.0
    """What other processes cost the canaries."""
    rounds: int = 0
    operations: int = 0
    checked_bytes: int = 0
    asked_chunks: int = 0
    hit_chunks: int = 0
    recovered_s: list[float] = field(default_factory=list)
    memory_mib: dict[str, list[float]] = field(default_factory=dict)
    """Of each place's process, after each round."""

    @property
    def problems(self) -> list[str]:
        """Everything that mustn't be."""
        kinds = {
            "WRONG": self.wrong,
            "RAISED": self.failed,
            "LEFT": self.left,
            "LATE": self.late,
        }
        return [f"{kind}: {text}" for kind, texts in kinds.items() for text in texts]

    def add(self, other: Findings) -> None:
        """What another place has seen besides."""
        for name in (one.name for one in fields(self)):
            ours, theirs = getattr(self, name), getattr(other, name)
            if name == "calls":
                for call, buckets in other.calls.items():
                    self.calls.setdefault(call, Counter()).update(buckets)
            elif name == "longest_s":
                for call, seconds in other.longest_s.items():
                    self.longest_s[call] = max(seconds, self.longest_s.get(call, 0.0))
            elif isinstance(ours, dict):
                ours.update(theirs)  # a counter adds
            elif isinstance(ours, list):
                ours += theirs
            else:
                setattr(self, name, ours + theirs)
