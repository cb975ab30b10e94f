"""Options that say how large a chunk is, where no model says it: what a token takes.

Knows shapes. Knows nothing about what chunks are made for.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from lmcache_core.chunks.layout import DType, KVLayout, full_attention

LAYERS, HEADS, HEAD_SIZE, DTYPE = 32, 8, 128, DType.BF16
"""Of Llama-3.1-8B."""
_OPTIONS = ("layers", "heads", "head_size", "dtype")


def add_options(parser: ArgumentParser, what: str) -> None:
    """Add the options to ``parser``; ``what`` is what the chunk is for."""
    add = parser.add_argument_group(
        f"the chunk of {what}",
        "No model is configured here: what isn't said is as in Llama-3.1-8B.",
    ).add_argument
    add("--layers", type=int, metavar="N", help=f"(default: {LAYERS})")
    add("--heads", type=int, metavar="N", help=f"KV heads (default: {HEADS})")
    add("--head-size", type=int, metavar="N", help=f"(default: {HEAD_SIZE})")
    add(
        "--dtype",
        type=str.upper,
        choices=[one.value for one in DType],
        help=f"element type of the KV cache (default: {DTYPE.value})",
    )


def first_given(args: Namespace) -> str | None:
    """The first of the options that was given, as it is written; ``None``: there is none."""
    given = (name for name in _OPTIONS if getattr(args, name) is not None)
    return next((f"--{name.replace('_', '-')}" for name in given), None)


def layout_of(args: Namespace, tokens_per_chunk: int) -> KVLayout:
    """The layout that the options describe.

    Raises:
        LayoutError: a number isn't positive.
    """
    group = full_attention(
        layers=LAYERS if args.layers is None else args.layers,
        heads=HEADS if args.heads is None else args.heads,
        head_size=HEAD_SIZE if args.head_size is None else args.head_size,
        dtype=DTYPE if args.dtype is None else DType(args.dtype),
    )
    return KVLayout(tokens_per_chunk, (group,))
