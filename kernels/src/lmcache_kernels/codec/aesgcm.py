"""The serde that encrypts: AES-GCM (NIST SP 800-38D), from the package ``cryptography``.

    offset  bytes  field
    0       4      b"KVA1"
    4       4      the key's id, little-endian
    8       12     nonce, random
    20             ciphertext, then a tag of 16 bytes

Associated data, which must be the same when decoding: the format, the namespace's fingerprint
(model, layout, heads, layers, tenant), the chunk's key, and its shape. A value that was moved to
another key or another tenant's place isn't accepted.

Keys are lines ``ID BASE64`` or ``ID HEXADECIMAL`` of 16, 24 or 32 bytes, in a file or in the
variable ``LMCACHE_AESGCM_KEYS`` (where a comma ends a line, too). The last one is used: append a
new one to rotate. Where values lie depends on the key, so that instances with different keys never
meet, during a rotation or by mistake: values of another key are misses, and nobody deletes them.

Random nonces are safe for 2^32 chunks of one key.
"""

from __future__ import annotations

import base64
import hmac
import os
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lmcache_core import ConfigError, LayerGroup, Serde, SerdeFacts
from lmcache_kernels.codec.config import AesGcmConfig

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

KEYS_VARIABLE = "LMCACHE_AESGCM_KEYS"
FILE_VARIABLE = "LMCACHE_AESGCM_KEY_FILE"
WIRE_ID = 14
MAGIC = b"KVA1"
_HEAD = struct.Struct("<4sI12s")
_TAG_BYTES = 16
_SIZES = (16, 24, 32)
_ID = re.compile("[0-9]{1,10}")


def read_keys(config: AesGcmConfig, environ: Mapping[str, str]) -> dict[int, bytes]:
    """Keys by id, in the order of their lines.

    Raises:
        ConfigError: there are none, or a line isn't an id and a key. Never shows a key.
    """
    path = config.key_file or (Path(environ[FILE_VARIABLE]) if FILE_VARIABLE in environ else None)
    if path is not None:
        try:
            lines, origin = path.read_text("ascii").splitlines(), str(path)
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"aesgcm: keys can't be read from {path}: {error}") from None
    else:
        lines, origin = (
            environ.get(KEYS_VARIABLE, "").replace(",", "\n").splitlines(),
            KEYS_VARIABLE,
        )
    keys: dict[int, bytes] = {}
    for number, line in enumerate(lines, 1):
        words = line.split("#")[0].split()
        if not words:
            continue
        where = f"aesgcm: line {number} of {origin}"
        if len(words) != 2 or not _ID.fullmatch(words[0]) or int(words[0]) >= 2**32:
            raise ConfigError(f"{where} isn't an id below 2^32 and a key")
        if int(words[0]) in keys:
            raise ConfigError(f"{where} uses the id {words[0]} again: give each key its own")
        keys[int(words[0])] = _key(words[1], where)
    if not keys:
        raise ConfigError(
            f"aesgcm needs keys: write 'ID BASE64' into a file and name it in {FILE_VARIABLE}, "
            f"or set {KEYS_VARIABLE}. One is made by: openssl rand -base64 32"
        )
    return keys


def _key(text: str, where: str) -> bytes:
    if len(text) in (2 * size for size in _SIZES):
        try:
            return bytes.fromhex(text)
        except ValueError:
            pass  # base64 of 24 bytes has the length of 16 bytes in hexadecimal
    try:
        key = base64.b64decode(text, validate=True)
    except ValueError:  # also of what isn't ASCII
        raise ConfigError(f"{where}: the key is neither base64 nor hexadecimal") from None
    if len(key) not in _SIZES:
        raise ConfigError(f"{where}: a key has 16, 24 or 32 bytes, not {len(key)}")
    return key


@dataclass(frozen=True)
class NamedCipher:
    """A key that was read: what it does, its id, and what tells it from another of that id."""

    cipher: AESGCM
    number: int
    check: str
    """A keyed digest: says that two keys are the same, and nothing about them."""


class AesGcmSerde(Serde):
    """Encrypts a chunk, or whatever the serde before it in a chain wrote."""

    def __init__(
        self, named: NamedCipher, facts: SerdeFacts | None = None, key: bytes = b""
    ) -> None:
        self._named, self._facts, self._key = named, facts or SerdeFacts(), key

    @property
    def wire_id(self) -> int:
        return WIRE_ID

    def identity(self, group: LayerGroup) -> str:  # noqa: ARG002  the same for all
        return f"{WIRE_ID}:{self._named.number}:{self._named.check}"

    def bound(self, facts: SerdeFacts) -> Serde:
        return AesGcmSerde(self._named, facts, self._key)

    def for_chunk(self, key: bytes, start: int | None) -> Serde:  # noqa: ARG002  it has a key
        return AesGcmSerde(self._named, self._facts, key)

    def max_encoded_bytes(self, group: LayerGroup, tokens: int) -> int:
        return _HEAD.size + group.chunk_bytes(tokens) + _TAG_BYTES

    def encode(self, chunk: memoryview, into: memoryview, group: LayerGroup, tokens: int) -> int:
        nonce = os.urandom(12)
        head = _HEAD.pack(MAGIC, self._named.number, nonce)
        sealed = self._named.cipher.encrypt(nonce, chunk, self._context(group, tokens))
        into[: _HEAD.size] = head
        into[_HEAD.size : _HEAD.size + len(sealed)] = sealed
        return _HEAD.size + len(sealed)

    def decode(self, encoded: memoryview, into: memoryview, group: LayerGroup, tokens: int) -> None:
        from cryptography.exceptions import InvalidTag

        if encoded.nbytes != self.max_encoded_bytes(group, tokens):
            raise ValueError(f"{encoded.nbytes} bytes aren't an encrypted chunk of {into.nbytes}")
        magic, number, nonce = _HEAD.unpack_from(encoded)
        if magic != MAGIC:
            raise ValueError(f"no encrypted chunk starts with {magic!r}")
        if number != self._named.number:
            raise ValueError(f"encrypted with key {number}, not {self._named.number}")
        sealed = encoded[_HEAD.size :]
        try:
            opened = self._named.cipher.decrypt(nonce, sealed, self._context(group, tokens))
        except InvalidTag:
            raise ValueError(f"not what key {number} encrypted for this place") from None
        into[:] = opened

    def _context(self, group: LayerGroup, tokens: int) -> bytes:
        """What a value belongs to. Lengths go first, so that no two places have the same."""
        shape = (len(group.layers), group.planes, group.heads, group.head_size, tokens)
        parts = [MAGIC, self._facts.fingerprint.encode(), self._key, group.dtype.value.encode()]
        sized = b"".join(struct.pack("<I", len(part)) + part for part in parts)
        return sized + struct.pack("<5Q", *shape)


def create(config: AesGcmConfig) -> Serde:
    """The serde, with its keys.

    Raises:
        ConfigError: ``cryptography`` isn't installed, or there are no keys.
    """
    try:
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM
    except ImportError:
        raise ConfigError(
            "serde aesgcm needs cryptography: pip install lmcache-kernels[aesgcm]"
        ) from None
    number, key = list(read_keys(config, os.environ).items())[-1]
    check = hmac.new(key, b"lmcache key check", "sha256").hexdigest()[:16]
    return AesGcmSerde(NamedCipher(AESGCM(key), number, check))
