"""All block sizes, chunk sizes, ways of loading, ranks: what `make test` has no time for.

    PYTHON full_matrix.py MODEL

Runs in the engine environment, some half hour on two cores. Prints a line a case: prompts whose
greedy tokens differ from those of an engine without connector, hit tokens, and the least that the
prefixes allow. Ends with 0 only if nothing differs and no prompt has fewer hits than it could.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from engine_host import EngineHost, arguments
from prompts import expected_hits, overlapping
from test_equality import MATRIX, MODES, VERBATIM, WAVE, Case, Result, case, differences, results

PROMPTS = 200


def main() -> int:
    model = Path(sys.argv[1])
    prompts = overlapping(PROMPTS, vocabulary=1000)
    bad = 0
    for ranks in (1, 2):
        binding = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"} if ranks == 2 else {}
        more = {"tensor_parallel_size": ranks}
        cases = [
            case(f"none-{b}", arguments(model, block_size=b, **more), prompts, binding)
            for b in (32, 128)
        ]
        for block, chunk, mode in MATRIX:
            environ = {**binding, "LMCACHE_CHUNK_SIZE": str(chunk), **MODES[mode]}
            engine = arguments(model, block_size=block, kv_transfer_config=VERBATIM, **more)
            cases.append(case(f"{block}-{chunk}-{mode}", engine, prompts, environ))
        found = run(cases)
        for block, chunk, mode in MATRIX:
            actual = found[f"{block}-{chunk}-{mode}"]
            floor = expected_hits(prompts, WAVE, chunk)
            differ = len(differences(actual, found[f"none-{block}"]))
            below = sum(hit < least for hit, least in zip(actual["cached"], floor, strict=True))
            bad += differ + below
            print(
                f"TP {ranks}  block {block:3d}  chunk {chunk:3d}  {mode:9s}  "
                f"{differ} of {len(prompts)} differ, {sum(actual['cached'])} hit tokens "
                f"(at least {sum(floor)}), {below} prompts below",
                flush=True,
            )
    return 1 if bad else 0


def run(cases: list[Case]) -> dict[str, Result]:
    """By name; says on standard error how it goes on."""
    found = {}
    with tempfile.TemporaryDirectory() as folder, EngineHost(Path(folder)) as host:
        for result in results(host, cases):
            found[result["name"]] = result
            print(result["name"], file=sys.stderr, flush=True)
    return found


if __name__ == "__main__":
    sys.exit(main())
