"""Results as a table, as JSON and as a plot.

Knows numbers and their names. Knows nothing about how they came to be.
"""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from lmcache_core import ConfigError, text_table
from lmcache_kernels.codec_eval.models import INSTALL
from lmcache_kernels.codec_eval.scoring import Score

_HEAD = ("scheme", "", "ratio", "bits", "KL", "top-1", "perplexity", "greedy", "needles")
LOWEST_KL = 1e-5
"""In plots, whose axis is logarithmic, this stands for none."""


@dataclass(frozen=True)
class Row:
    """A scheme's results. ``exact``: every bit came back. ``needles``: found, or ``None``."""

    scheme: str
    reference: bool
    ratio: float
    bits: float
    """Per value, with all side information."""
    exact: bool
    score: Score
    needles: int | None


@dataclass(frozen=True)
class Report:
    """All rows of a model, and what they were measured with."""

    model: str
    facts: Mapping[str, object]
    """Such as the number of contexts and of tokens in each."""
    baseline: Score
    needles: int | None
    """How many there are."""
    needles_found: int | None
    """With the true cache."""
    rows: Sequence[Row]


def shown(report: Report) -> str:
    """The table, with what was measured above it."""
    facts = ", ".join(f"{value} {name}" for name, value in report.facts.items())
    lines = [f"{report.model}: {facts}"]
    lines.append(f"perplexity {report.baseline.perplexity:.2f} with the true cache")
    if report.needles is not None:
        lines[-1] += f", which finds {report.needles_found} of {report.needles} needles"
    return "\n".join([*lines, "", text_table(_HEAD, [_cells(row, report) for row in report.rows])])


def _cells(row: Row, report: Report) -> Sequence[str]:
    score = row.score
    change = 100 * (score.perplexity / report.baseline.perplexity - 1)
    return (
        row.scheme,
        "reference" if row.reference else "",
        f"{row.ratio:.2f}",
        f"{row.bits:.2f}",
        "exact" if row.exact else f"{score.kl:.5f}",
        f"{score.top1:.3f}",
        f"{change:+.2f} %",
        "" if math.isnan(score.greedy_same) else f"{score.greedy_same:.0f}",
        "" if row.needles is None else f"{row.needles}",
    )


def write_json(report: Report, path: Path) -> None:
    """Everything as JSON, with the versions that it was made with.

    Raises:
        ConfigError: the file can't be written.
    """
    import torch
    import transformers

    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    content = {**asdict(report), "versions": versions, "machine": platform.machine()}
    text = json.dumps(_without_nan(content), indent=1) + "\n"
    try:
        path.write_text(text)
    except OSError as error:
        raise ConfigError(f"--json {path}: {error.strerror}") from None


def _without_nan(value: object) -> object:
    if isinstance(value, Mapping):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def plot(report: Report, path: Path) -> None:
    """Ratio by KL divergence: to the upper left is better. The format is the file name's.

    Raises:
        ConfigError: matplotlib isn't installed, or the file can't be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError(f"--plot needs matplotlib: {INSTALL}") from None
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    # Labels above and below in turn: neighbours are often at the same height.
    for number, row in enumerate(sorted(report.rows, key=lambda row: row.score.kl)):
        x = max(row.score.kl, LOWEST_KL)
        colour, marker = ("tab:grey", "x") if row.reference else ("tab:blue", "o")
        axes.plot(x, row.ratio, marker, color=colour)
        axes.annotate(
            row.scheme,
            (x, row.ratio),
            xytext=(4, -11 if number % 2 else 5),
            textcoords="offset points",
            fontsize=7,
        )
    axes.set_xscale("log")
    axes.margins(x=0.12)
    axes.set_xlabel("KL divergence of the next token, nats (less is better)")
    axes.set_ylabel("times smaller than it was")
    axes.set_title(f"{report.model}: KV cache codecs (grey: references)")
    axes.grid(alpha=0.3)
    try:
        figure.savefig(path, dpi=110)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--plot {path}: {error}") from None
