"""What `fuzz` feeds with what users put into requests, as an engine hands it on."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from fuzzing import Target
from fuzzing_files import damage, odd

from lmcache_connector_vllm import identity
from lmcache_core.chunks.hashing import request_root

_PARAMS = {"lmcache.tag.user": "x", "lmcache.tag.n": 1, "lmcache.skip_save": True, "other": {}}


class KVParams(Target):
    """``kv_transfer_params``, salts and names of images in requests to vLLM; nothing is raised."""

    name = "kv-params"
    documented = ()

    def samples(self) -> list[bytes]:
        return [
            json.dumps(_PARAMS).encode(),
            b'{"lmcache.tag.a": "\\ud800", "lmcache.skip_save": [[1]]}',
            b'"lmcache.tag.user"',
            b'[{"lmcache.tag.a": 1}, null]',
        ]

    def parse(self, data: bytes, chance: random.Random) -> None:
        text = data.decode("latin-1")
        if chance.random() < 0.5:
            try:
                params = json.loads(data)
            except (ValueError, RecursionError):  # the engine's own parser has refused it
                return
        else:
            params = damage(dict(_PARAMS), chance, text)
        if chance.random() < 0.001:
            params = {"lmcache.tag.a": _deep(chance.choice((400, 900, 5000))), **_PARAMS}
        self._request(params, odd(chance, text) if chance.random() < 0.3 else None, text)

    def _request(self, params: Any, salt: Any, text: str) -> None:
        marks = identity.marks(params)
        where = SimpleNamespace(offset=3, length=7)
        request: Any = SimpleNamespace(
            cache_salt=salt if isinstance(salt, str) else None,
            mm_features=[SimpleNamespace(identifier=text[:20], mm_position=where)],
        )
        identity.media(request, 4)
        if marks is None:
            return
        one = identity.root(bytes(16), request, marks.tags)
        facts = [f"tag:{name}={said}" for name, said in sorted(marks.tags.items())]
        if request.cache_salt:
            facts.insert(0, f"salt={request.cache_salt}")
        if one != request_root(bytes(16), *facts):
            raise AssertionError("tags don't make the root that they should")


def _deep(depth: int) -> Any:
    made: Any = 1
    for _ in range(depth):
        made = [made]
    return made


TARGETS: dict[str, Callable[[], Target]] = {target.name: target for target in (KVParams,)}
