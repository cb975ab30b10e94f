"""``lmcache codec``: ``calibrate`` makes a profile of a model, ``eval`` measures codecs on it."""

from __future__ import annotations

import argparse
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from lmcache_core import ConfigError, Plugins
from lmcache_kernels.codec.profiles import FOLDER_VARIABLE, profile_folder

if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace, _SubParsersAction

    from lmcache_kernels.codec_eval.models import Model
    from lmcache_kernels.codec_eval.progress import Progress
    from lmcache_kernels.codec_eval.schemes import Scheme

_NEEDED = ("torch", "transformers", "tqdm")
_CALIBRATE = """\
examples:
  lmcache codec calibrate --model ~/models/Llama-3.1-8B --text wiki.txt --text code.txt
  lmcache codec calibrate --model ~/models/Qwen2.5-0.5B --kind t2 --out /etc/lmcache/profiles
  lmcache codec calibrate --model ~/models/Llama-3.1-70B --tensor-parallel 8 --text wiki.txt

Reads the first half of each text; `lmcache codec eval` reads the second. Without --text, the
documentation and code of Python's standard library are read. Computes in float32: a model takes
4 bytes of memory a parameter.
"""
_EVAL = """\
examples:
  lmcache codec eval --model ~/models/Qwen2.5-0.5B --serde lossless --serde cachegen
  lmcache codec eval --model ~/models/Qwen2.5-0.5B --serde cachegen --profile FILE.kvprofile
  lmcache codec eval --model ~/models/Qwen2.5-0.5B --serde cachegen:step=small \\
      --generate 256 --needle --text manual.txt --json result.json --plot result.png

Columns: ratio to the cache's own type; bits a value; KL divergence of the next token's
distribution, in nats; how often the likeliest token is the same; change of perplexity; greedy:
tokens that a greedy continuation has in common with the true one; needles: facts found in a text.
References are other schemes, computed here with exact bit counts, not serdes.
"""


def add(subcommands: _SubParsersAction[ArgumentParser]) -> None:
    """Add the subcommand ``codec``."""
    parser = subcommands.add_parser("codec", help="calibrate and measure codecs on a model")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_calibrate(commands)
    _add_eval(commands)


def _add_calibrate(commands: _SubParsersAction[ArgumentParser]) -> None:
    parser = commands.add_parser(
        "calibrate",
        help="make a profile of a model, with which `cachegen` makes its chunks smaller",
        epilog=_CALIBRATE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_common(parser)
    add = parser.add_argument
    add(
        "--out",
        type=Path,
        metavar="DIR",
        help=f"where it is written (default: where cachegen looks for it: ${FOLDER_VARIABLE}, or "
        "lmcache/profiles in the user's cache)",
    )
    add("--tokens", type=_count, default=16384, metavar="N", help="to read (default: 16384)")
    add(
        "--kind",
        choices=("t2", "t3", "t4"),
        default="t4",
        help="t2: steps and means; t3: principal components, too, smaller and slower to use; t4: "
        "layers' gains, too (default: t4)",
    )
    add(
        "--tensor-parallel",
        type=_count,
        default=1,
        metavar="N",
        help="most ranks that will use it; a profile holds all ranks' heads (default: 1)",
    )
    parser.set_defaults(run=calibrate)


def _add_eval(commands: _SubParsersAction[ArgumentParser]) -> None:
    parser = commands.add_parser(
        "eval",
        help="measure what codecs do to a model",
        epilog=_EVAL,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_common(parser)
    add = parser.add_argument
    add(
        "--serde",
        action="append",
        default=[],
        metavar="NAME[:OPTION=VALUE,…]",
        help="an installed serde, or a chain of them; may be given again (default: all that need "
        "no keys)",
    )
    add(
        "--profile",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="measure those serdes that can use a profile with this one, too; may be given again",
    )
    add("--no-references", action="store_true", help="leave the schemes of others out")
    add("--contexts", type=_count, default=4, metavar="N", help="prompts (default: 4)")
    add("--context-tokens", type=_count, default=1024, metavar="N", help="of each (default: 1024)")
    add(
        "--scored",
        type=_count,
        default=192,
        metavar="N",
        help="tokens behind each prompt that are looked at (default: 192)",
    )
    add("--generate", type=_count, default=0, metavar="N", help="compare N tokens of greedy text")
    add("--needle", action="store_true", help="hide facts in the prompts and ask for them")
    add("--json", type=Path, metavar="FILE", help="write the results there, too")
    add("--plot", type=Path, metavar="FILE", help="draw ratio by KL divergence: .png, .svg, .pdf")
    parser.set_defaults(run=evaluate)


def _add_common(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", required=True, metavar="DIR", help="a folder in transformers' format")
    add(
        "--text",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="plain text in UTF-8; may be given again",
    )
    add("--threads", type=_count, metavar="N", help="for the model (default: torch's)")
    add("--quiet", action="store_true", help="no progress")


def calibrate(args: Namespace) -> int:
    """Write a profile and say where, and what it is for."""
    model, progress = _started(args)
    from lmcache_kernels.codec_eval import texts
    from lmcache_kernels.codec_eval.calibration import CalibrationOptions
    from lmcache_kernels.codec_eval.calibration import calibrate as calibrated

    length = min(1024, args.tokens)
    pieces = texts.windows(
        texts.read(args.text), "calibration", args.tokens // length, length, model.tokens
    )
    options = CalibrationOptions(kind=args.kind, ranks=args.tensor_parallel)
    profile = calibrated(model, pieces, options, progress)
    folder = profile_folder(args.out, os.environ)
    try:
        path = profile.save(folder)
    except OSError as error:
        raise ConfigError(f"--out {folder}: {error.strerror}; name a folder") from None
    print(path)
    group = model.group
    print(
        f"{profile.kind} profile of {model.name}: {len(group.layers)} layers x {group.heads} KV "
        f"heads x {group.head_size}, {path.stat().st_size / 1e6:.1f} MB, for the serde cachegen. "
        f"Measure it: lmcache codec eval --model {args.model} --serde cachegen --profile {path}",
        file=sys.stderr,
    )
    return 0


def evaluate(args: Namespace) -> int:
    """Print the table."""
    plugins = Plugins()
    words = args.serde or _keyless(plugins)
    for name in words:  # before minutes go by
        for part in name.partition(":")[0].split("+"):
            plugins.serde(part.strip())
    model, progress = _started(args)
    from lmcache_kernels.codec_eval import evaluation, report, texts

    schemes = _schemes(args, words, model, plugins)
    extent = evaluation.Extent(
        args.contexts, args.context_tokens, args.scored, args.generate, args.needle
    )
    facts: dict[str, object] = {
        "contexts": extent.contexts,
        "tokens each": extent.context_tokens,
        "scored tokens": extent.scored,
        **({"greedy tokens": extent.generate} if extent.generate else {}),
    }
    trials = evaluation.prepared(model, texts.read(args.text), extent, progress)
    found = evaluation.measured(model, trials, schemes, facts, progress)
    print(report.shown(found))
    if args.json:
        report.write_json(found, args.json)
    if args.plot:
        report.plot(found, args.plot)
    return 0


def _schemes(args: Namespace, words: list[str], model: Model, plugins: Plugins) -> list[Scheme]:
    from lmcache_kernels.codec_eval.references import references
    from lmcache_kernels.codec_eval.schemes import serde_scheme, takes_profile

    found: list[Scheme] = []
    for name in words:
        found.append(serde_scheme(name, model, plugins))
        if takes_profile(name, plugins):
            found += [serde_scheme(name, model, plugins, profile=path) for path in args.profile]
    return found if args.no_references else [*found, *references()]


def _keyless(plugins: Plugins) -> list[str]:
    """All serdes but those that encrypt, which change nothing."""
    return [serde.name for serde in plugins.serdes() if serde.name != "aesgcm"]


def _started(args: Namespace) -> tuple[Model, Progress]:
    for name in _NEEDED:
        if find_spec(name) is None:
            raise ConfigError(f"`lmcache codec` needs {name}: pip install lmcache-kernels[eval]")
    from lmcache_kernels.codec_eval import models, progress

    quiet = args.quiet or not sys.stderr.isatty()
    model = models.load(args.model, args.threads, quiet=quiet)
    return model, progress.silent if quiet else progress.bars


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be at least 1")
    return number
