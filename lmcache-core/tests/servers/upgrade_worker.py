"""An instance in a rolling upgrade: stores prompts or loads them, as a frame version and a serde.

    python upgrade_worker.py VERSION SERDE store|load PROMPTS ASSIGNMENT ...

Prints, as JSON, how many chunks were loaded, how many of them were wrong, and what was counted.
"""

from __future__ import annotations

import json
import random
import sys

from lmcache_core.chunks import frame

CHUNKS = 8


def main() -> None:
    version, serde, action, prompts, *assignments = sys.argv[1:]
    # Before anything that takes its value is imported.
    frame.VERSION = int(version)
    from lmcache_core import Cache, DType, KVLayout, Plugins, full_attention, load_config

    group = full_attention(layers=2, heads=1, head_size=8, dtype=DType.BF16)
    plugins = Plugins()
    assignments += [
        "chunk_size=16",
        "max_local_cpu_size=0.05",
        "local_cpu=false",
        f"backends.shared.serde={serde}",
        "store_queue_chunks=4096",
        "blocking_timeout_secs=60",
    ]
    config = load_config(plugins, environ={}, assignments=assignments)
    tokens = CHUNKS * 16
    hits = wrong = 0
    layout = KVLayout(16, (group,))
    with Cache.open(model="m", layout=layout, config=config, plugins=plugins) as cache:
        for prompt in range(int(prompts)):
            names = list(range(prompt * 1000, prompt * 1000 + tokens))
            kv = random.Random(prompt).randbytes(group.chunk_bytes(tokens))
            if action == "store":
                cache.store(names, kv)
                cache.flush()
                continue
            into = bytearray(len(kv))
            found = cache.load(names, into)
            hits += found // 16
            width, part = len(kv) // 4, len(kv) // 4 * found // tokens
            rows = [slice(row * width, row * width + part) for row in range(4)]
            wrong += any(into[row] != kv[row] for row in rows)
        counted = {
            f"{name}{dict(labels)}": n for (name, labels), n in cache.counters.snapshot().items()
        }
    print(json.dumps({"hits": hits, "wrong": wrong, "counted": counted}))


if __name__ == "__main__":
    main()
