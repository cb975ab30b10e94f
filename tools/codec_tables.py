"""Makes the codecs' frequency tables: kernels/csrc/codec/tables.inc.

    python3 tools/codec_tables.py --check    is the committed file what this makes?
    python3 tools/codec_tables.py            write it

The file is part of the format: a stream names tables by number, so a published set never changes.
This program says where the numbers come from. It isn't run by builds, because `exp` and `erf`
differ in the last place between mathematical libraries.

Tables 0-31 are for quantised values: symbol q + 64 for q = -63 ... 63, symbol 0 for what doesn't
fit. Table k is a generalised normal distribution (shape 1.4) of deviation 0.12 * 2^(0.26 k)
steps. Tables 32-95 are for exponents: symbol d for an exponent d below a channel's reference,
symbol 15 for what doesn't fit. They are the exponents of normal distributions of eight ratios of
mean to deviation, in eight positions of the reference.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

SLOTS = 1024
"""Frequencies of a table add up to this: probabilities of 10 bits."""

VALUE_TABLES, VALUE_SYMBOLS, ESCAPE = 32, 128, 0
EXPONENT_TABLES, EXPONENT_SYMBOLS, EXPONENT_ESCAPE = 64, 16, 15
SHAPE = 1.4
TARGET = Path(__file__).parent.parent / "kernels/csrc/codec/tables.inc"


def integers(probabilities: Sequence[float], escape: int) -> list[int]:
    """Frequencies of the sum `SLOTS`. What rounds to nothing is left to the escape."""
    total = sum(probabilities)
    wanted = [p / total * SLOTS for p in probabilities]
    found = [int(w + 0.5) for w in wanted]
    tail = sum(w for w, f in zip(wanted, found, strict=True) if not f)
    found[escape] = max(1, int(wanted[escape] + 1.5 * tail + 0.5))
    peak = max((f, i) for i, f in enumerate(found) if i != escape)[1]
    while (missing := SLOTS - sum(found)) != 0:
        # Take from, or give to, whatever is off most for its size.
        found[peak] += 1 if missing > 0 else -1
        peak = max((f, i) for i, f in enumerate(found) if i != escape)[1]
    return found


def value_mass(deviation: float) -> dict[int, float]:
    """Probabilities of -400 ... 400 steps."""
    width = deviation * math.sqrt(math.gamma(1 / SHAPE) / math.gamma(3 / SHAPE))
    mass = {}
    for q in range(-400, 401):
        points = (q - 0.5 + (i + 0.5) / 16 for i in range(16))
        mass[q] = sum(math.exp(-((abs(x) / width) ** SHAPE)) for x in points)
    total = sum(mass.values())
    return {q: p / total for q, p in mass.items()}


def value_table(deviation: float) -> list[int]:
    mass = [0.0] * VALUE_SYMBOLS
    for q, p in value_mass(deviation).items():
        mass[q + 64 if abs(q) <= 63 else ESCAPE] += p
    table = integers(mass, ESCAPE)
    # Symmetric and without holes, so that one radius says what a table can code.
    radius = min(next((r for r in range(1, 64) if not table[64 + s * r]), 64) for s in (1, -1)) - 1
    for q in range(1, 64):
        f = min(table[64 + q], table[64 - q]) if q <= radius else 0
        table[ESCAPE] += table[64 + q] + table[64 - q] - 2 * f
        table[64 + q] = table[64 - q] = f
    return table


def exponent_table(ratio: float, position: float) -> list[int]:
    """Exponents of N(ratio, 1) if the reference is at 2^position."""

    def cdf(x: float) -> float:
        return 0.5 * (1 + math.erf((x - ratio) / math.sqrt(2)))

    mass = []
    for d in range(EXPONENT_SYMBOLS - 1):
        low, high = 2.0 ** (position - d), 2.0 ** (position - d + 1)
        if d == 0:
            high = math.inf
        mass.append((cdf(high) - cdf(low)) + (cdf(-low) - cdf(-high)))
    mass.append(max(1e-4, 1 - sum(mass)))
    # Nothing of these is impossible: what a table calls rare costs 10 bits, an escape 20.
    return integers([p + 0.6 / SLOTS for p in mass], EXPONENT_ESCAPE)


def thresholds(tables: list[list[int]]) -> list[int]:
    """Up to which mean magnitude, in 4096ths, table k is cheaper than k + 1 for its own family."""

    def cost(table: list[int], source: dict[int, float]) -> float:
        escape = math.log2(SLOTS / table[ESCAPE]) + 16
        bits = [math.log2(SLOTS / f) if f else escape for f in table]
        return sum(p * (bits[q + 64] if abs(q) <= 63 else escape) for q, p in source.items())

    def magnitude(source: dict[int, float]) -> float:
        return sum(p * min(abs(q), 127) for q, p in source.items())

    found = []
    for k in range(VALUE_TABLES - 1):
        low, high = 0.12 * 2 ** (0.26 * (k - 1)), 0.12 * 2 ** (0.26 * (k + 2))
        for _ in range(40):
            middle = math.sqrt(low * high)
            source = value_mass(middle)
            if cost(tables[k], source) <= cost(tables[k + 1], source):
                low = middle
            else:
                high = middle
        found.append(round(4096 * magnitude(value_mass(math.sqrt(low * high)))))
    # Rounding makes neighbours of the narrowest tables cross over.
    for k in range(1, len(found)):
        found[k] = max(found[k], found[k - 1] + 1)
    return found


def rows(table: Sequence[int]) -> str:
    lines = [", ".join(map(str, table[i : i + 16])) + "," for i in range(0, len(table), 16)]
    return "{" + "\n ".join(lines).rstrip(",") + "},"


def text() -> str:
    values = [value_table(0.12 * 2 ** (0.26 * k)) for k in range(VALUE_TABLES)]
    ratios = (0.0, 0.7, 1.3, 2.0, 3.0, 5.0, 10.0, 30.0)
    exponents = []
    for ratio in ratios:
        # The largest of a few hundred is some deviations from the mean.
        top = math.log2(ratio + (2.8 if ratio < 8 else 1.5))
        exponents += [exponent_table(ratio, top - 1 + (i + 0.5) * (1.6 / 8)) for i in range(8)]
    assert all(sum(t) == SLOTS and max(t) < SLOTS for t in values + exponents)
    body = [
        "// Made by tools/codec_tables.py. Part of the format: never changed, only added to.",
        f"static const uint16_t kValueFrequencies[{VALUE_TABLES}][{VALUE_SYMBOLS}] = {{",
        *map(rows, values),
        "};",
        f"static const uint16_t kExponentFrequencies[{EXPONENT_TABLES}][{EXPONENT_SYMBOLS}] = {{",
        *map(rows, exponents),
        "};",
        "// Not part of the format: which table an encoder takes, by 4096 x mean magnitude.",
        f"static const uint32_t kValueThresholds[{VALUE_TABLES - 1}] = " + "{",
        ", ".join(map(str, thresholds(values))),
        "};",
    ]
    return "\n".join(body) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true")
    if parser.parse_args().check:
        sys.exit(0 if TARGET.read_text() == text() else f"{TARGET} differs")
    TARGET.write_text(text())


if __name__ == "__main__":
    main()
