"""Turns token ids into chunk digests.

A digest names a whole prefix, not just the chunk's own tokens:

    d[i] = BLAKE2b-128(d[i-1] || extra[i] || tokens of chunk i as little-endian u32)

so that equal digests mean equal prefixes, in every process and on every
machine, whatever PYTHONHASHSEED is. One hash call a chunk and no per-token
Python. BLAKE2b (RFC 7693) because it is a cryptographic hash that is in the
standard library and faster than SHA-256 without hardware help: a tenant can't
construct a prefix that collides with another tenant's. Hashing chunks apart
from each other and chaining the results was measured, and isn't worth it:
docs/decisions/0018-names.md.

Knows nothing about what is stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import blake2b
from typing import TYPE_CHECKING

from lmcache_core.chunks.keys import DIGEST_BYTES, ChunkKey
from lmcache_core.chunks.tokens import ID_BYTES, Plain, Tokens, plain, token_bytes

if TYPE_CHECKING:
    from lmcache_core.chunks.chunk_index import ChunkIndex


def request_root(namespace_root: bytes, *facts: str) -> bytes:
    """Where one request's chain starts: the namespace and what sets the request apart.

    ``facts`` are labelled strings such as ``salt=…``, ``lora=…``. No facts: the namespace root
    itself, so that plain requests of any engine share. Any text will do, half of a surrogate pair
    too: users write salts and tags.
    """
    if not facts:
        return namespace_root
    state = blake2b(namespace_root, digest_size=DIGEST_BYTES, person=b"lmcache-root")
    for fact in facts:
        encoded = fact.encode(errors="surrogatepass")
        state.update(len(encoded).to_bytes(4, "little"))
        state.update(encoded)
    return state.digest()


class PrefixHasher:
    """The digest chain of one token sequence; grows without hashing anything twice.

    ``extras`` maps a chunk's index to bytes that are part of that chunk's identity without being
    tokens: the content hashes of the images that it contains. ``index`` is where `find` looks, and
    digests are computed by it: natively, if it is a native one.
    """

    __slots__ = ("_extras", "_index", "_parent", "_root", "chunk_tokens", "digests")

    def __init__(
        self,
        root: bytes,
        chunk_tokens: int,
        extras: Mapping[int, bytes] | None = None,
        index: ChunkIndex | None = None,
    ) -> None:
        self.chunk_tokens = chunk_tokens
        self.digests: list[ChunkKey] = []
        """Of the leading chunks: their keys, in the first layer group."""
        self._root = self._parent = root
        self._extras = extras or {}
        self._index = index

    @property
    def tokens(self) -> int:
        """How many leading tokens the digests so far cover."""
        return len(self.digests) * self.chunk_tokens

    def extend(self, tokens: Tokens) -> list[ChunkKey]:
        """Digest the full chunks of ``tokens`` that aren't digested yet; return all digests.

        ``tokens`` is the whole sequence, and may have grown since the last call.
        """
        done, size = len(self.digests), self.chunk_tokens * ID_BYTES
        fresh = self._undigested(plain(tokens))
        if self._index is not None and len(fresh):
            self._append(
                self._index.digests(self._parent, fresh, self.chunk_tokens, self._extras, done)
            )
            return self.digests
        packed, parent, extras = memoryview(token_bytes(fresh)), self._parent, self._extras
        for number in range(len(packed) // size):
            state = blake2b(parent, digest_size=DIGEST_BYTES)
            if (extra := extras.get(done + number)) is not None:
                state.update(extra)
            state.update(packed[number * size : (number + 1) * size])
            parent = state.digest()
            self.digests.append(ChunkKey(parent))
        self._parent = parent
        return self.digests

    def find(self, tokens: Tokens) -> list[int]:
        """The index's slots of the leading chunks that are ready there.

        Digests no further than the first that isn't, which is asked for by itself: most prompts
        miss at once or hit for long. ``tokens`` as in `extend`.
        """
        if self._index is None:
            raise ValueError("this hasher has no index to look into")
        ids = plain(tokens)
        slots = self._index.ready_slots(self.digests)
        for chunks in (1, None):
            if len(slots) < len(self.digests):
                break
            fresh = self._undigested(ids, chunks)
            if not len(fresh):
                break
            digests, more = self._index.match(
                self._parent, fresh, self.chunk_tokens, self._extras, len(self.digests)
            )
            self._append(digests)
            slots += more
        return slots

    def _undigested(self, tokens: Plain, chunks: int | None = None) -> Plain:
        """The full chunks after those digested, or some of them."""
        first = self.tokens
        if isinstance(tokens, (bytes, bytearray, memoryview)):
            tokens = memoryview(tokens)
            count, unit = len(tokens) // ID_BYTES, ID_BYTES
        else:
            count, unit = len(tokens), 1
        last = count - count % self.chunk_tokens
        if chunks is not None:
            last = min(last, first + chunks * self.chunk_tokens)
        if last <= first:
            return b""
        return tokens if (first, last) == (0, count) else tokens[first * unit : last * unit]

    def _append(self, digests: bytes) -> None:
        new = [
            ChunkKey(digests[i : i + DIGEST_BYTES]) for i in range(0, len(digests), DIGEST_BYTES)
        ]
        self.digests += new
        if new:
            self._parent = new[-1]

    def fork(self, chunks: int) -> PrefixHasher:
        """A hasher that stands after the first ``chunks`` chunks, which must be digested here."""
        hasher = PrefixHasher(self._root, self.chunk_tokens, self._extras, self._index)
        hasher.digests = self.digests[:chunks]
        if chunks:
            hasher._parent = self.digests[chunks - 1]
        return hasher

    def tail(self, tokens: Tokens) -> bytes | None:
        """Digest of the unfull last chunk of ``tokens``, or ``None`` where it is full or absent.

        Personalised with the token count, so that it can never equal a full chunk's digest.
        Call `extend` first.
        """
        ids = plain(tokens)
        unit = ID_BYTES if isinstance(ids, (bytes, bytearray, memoryview)) else 1
        packed = token_bytes(ids[self.tokens * unit :])
        if not packed or len(packed) >= self.chunk_tokens * ID_BYTES:
            return None
        count = len(packed) // ID_BYTES
        state = blake2b(
            self._parent,
            digest_size=DIGEST_BYTES,
            person=b"tail" + count.to_bytes(4, "little"),
        )
        if (extra := self._extras.get(len(self.digests))) is not None:
            state.update(extra)
        state.update(packed)
        return state.digest()
