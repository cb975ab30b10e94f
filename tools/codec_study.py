"""Measures codecs on two real models: the tables and the plot of docs/codecs.md.

    PYTHON tools/codec_study.py OUT [smollm2|qwen …]

PYTHON has lmcache-kernels[eval], gguf and accelerate. Models and texts are prepared on first use
(see `models` and `texts`). Writes into the folder OUT a profile of each kind, and MODEL.json,
MODEL.png and MODEL.md. About an hour on one core; nothing but the speed depends on the machine.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import models
import texts
from prepared import say

SERDES = (
    "raw",
    "lossless",
    "int8",
    "fp8",
    "cachegen:step=fine",
    "cachegen",
    "cachegen:step=small",
    "cachegen:step=1.0",
)
EXTENT = ("--contexts", "4", "--context-tokens", "1024", "--scored", "192")
EXTRAS = ("--generate", "256", "--needle")
_HEAD = "| scheme | ratio | bits | KL | top-1 | perplexity | greedy | needles |"


def study(name: str, out: Path, python: str) -> None:
    """Calibrate and measure the model ``name``."""
    folder = models.MODELS[name]()
    common = ["--model", str(folder), "--threads", "1"]
    for text in sorted(texts.texts().glob("*.txt")):
        common += ["--text", str(text)]
    profiles: list[str] = []
    for kind in ("t2", "t4"):
        where = ("--kind", kind, "--out", str(out / name))
        profiles += ["--profile", _codec(python, "calibrate", *common, *where).strip()]
    serdes = [word for serde in SERDES for word in ("--serde", serde)]
    files = ("--json", str(out / f"{name}.json"), "--plot", str(out / f"{name}.png"))
    print(_codec(python, "eval", *common, *serdes, *profiles, *EXTENT, *EXTRAS, *files))
    found = json.loads((out / f"{name}.json").read_text())
    (out / f"{name}.md").write_text(markdown(found))


def markdown(report: dict[str, Any]) -> str:
    """A report's rows as a table of Markdown."""
    baseline = report["baseline"]["perplexity"]
    lines = [_HEAD, "| --- |" + " --- |" * 7]
    for row in report["rows"]:
        score = row["score"]
        cells = (
            f"*{row['scheme']}*" if row["reference"] else f"`{row['scheme']}`",
            f"{row['ratio']:.2f}",
            f"{row['bits']:.2f}",
            "exact" if row["exact"] else f"{score['kl']:.5f}",
            f"{score['top1']:.3f}",
            f"{100 * (score['perplexity'] / baseline - 1):+.2f} %",
            f"{score['greedy_same']:.0f}",
            f"{row['needles']} of {report['needles']}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _codec(python: str, *arguments: str) -> str:
    """What `lmcache codec` printed; its progress goes to the terminal."""
    command = "import sys; from lmcache_core.cli import main; sys.exit(main())"
    done = subprocess.run(
        [python, "-c", command, "codec", *arguments], stdout=subprocess.PIPE, text=True, check=True
    )
    return done.stdout


def main(words: Sequence[str]) -> int:
    """Study the models that are named; both if none is."""
    parser = argparse.ArgumentParser(description="Measure codecs on real models.")
    parser.add_argument("out", type=Path)
    parser.add_argument("models", nargs="*", default=["smollm2", "qwen"])
    arguments = parser.parse_args(words)
    for name in arguments.models:
        if name not in models.MODELS:
            parser.error(f"no model {name!r}; there are {', '.join(models.MODELS)}")
    for name in arguments.models:
        (arguments.out / name).mkdir(parents=True, exist_ok=True)
        try:
            study(name, arguments.out, sys.executable)
        except subprocess.CalledProcessError as error:
            say(f"error: lmcache codec answered with {error.returncode}")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
