"""Which chunk lies in which slot, and what a prompt's chunks are called, in native code.

``ChunkIndex(chunks)``
    A table of 16-byte keys with room for ``chunks`` of them, 26.7 bytes each, allocated at once.
    ``insert(key, slot, state=0)`` answers whether the key is new, and raises `ValueError` when
    the index is full. ``find``, ``state`` and ``erase`` answer a slot or state, or -1 where there
    is no such key. ``ready_prefix(keys, ready=0)`` counts the leading keys that have state
    ``ready``; ``ready_slots`` answers their slots. ``keys`` is a list of keys, or one ``bytes``.
    ``match(parent, tokens, chunk_tokens, extras, start)`` digests and looks up in one go: it
    answers the digests up to and including that of the first miss, and how many are hits.

``prefix_digests(parent, tokens, chunk_tokens, extras=None, start=0)``
    The digests of the full chunks of ``tokens``, one after the other, exactly those of
    `lmcache_core.hashing.PrefixHasher`. ``parent`` is the digest before the first of them, or the
    root; ``start`` is that chunk's index, which ``extras`` counts from.

Keys of other layer groups than the first are longer than 16 bytes: take an index for each group.
"""

from __future__ import annotations

from lmcache_kernels._native import ChunkIndex, prefix_digests

__all__ = ["ChunkIndex", "prefix_digests"]
