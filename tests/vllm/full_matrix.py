"""All block sizes, chunk sizes, ways of loading, ranks: what `make test` has no time for.

    PYTHON full_matrix.py MODEL

Runs in the engine environment, some half hour on two cores. Prints a line a case: prompts whose
greedy tokens differ from those of an engine without connector, hit tokens, and the least that the
prefixes allow. Ends with 0 only if nothing differs and no prompt has fewer hits than it could.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from prompts import expected_hits, overlapping
from test_equality import MATRIX, MODES, VERBATIM, WAVE, case, differences, engine

PROMPTS = 200


def main() -> int:
    model = Path(sys.argv[1])
    prompts = overlapping(PROMPTS, vocabulary=1000)
    bad = 0
    for ranks in (1, 2):
        binding = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"} if ranks == 2 else {}
        more = {"tensor_parallel_size": ranks}
        cases = [case(f"none-{b}", engine(model, b, **more), prompts, binding) for b in (32, 128)]
        for block, chunk, mode in MATRIX:
            environ = {**binding, "LMCACHE_CHUNK_SIZE": str(chunk), **MODES[mode]}
            arguments = engine(model, block, kv_transfer_config=VERBATIM, **more)
            cases.append(case(f"{block}-{chunk}-{mode}", arguments, prompts, environ))
        results = {result["name"]: result for result in run(cases)}
        for block, chunk, mode in MATRIX:
            actual = results[f"{block}-{chunk}-{mode}"]
            floor = expected_hits(prompts, WAVE, chunk)
            differ = len(differences(actual, results[f"none-{block}"]))
            below = sum(hit < least for hit, least in zip(actual["cached"], floor, strict=True))
            bad += differ + below
            print(
                f"TP {ranks}  block {block:3d}  chunk {chunk:3d}  {mode:9s}  "
                f"{differ} of {len(prompts)} differ, {sum(actual['cached'])} hit tokens "
                f"(at least {sum(floor)}), {below} prompts below",
                flush=True,
            )
    return 1 if bad else 0


def run(cases: list[dict]) -> list[dict]:  # type: ignore[type-arg]
    """Run the cases in a process of their own; its output is shown."""
    with tempfile.TemporaryDirectory() as folder:
        given, results = Path(folder) / "cases.json", Path(folder) / "results.json"
        given.write_text(json.dumps(cases))
        program = Path(__file__).with_name("run_engine.py")
        subprocess.run(
            [sys.executable, str(program), str(given), str(results)],
            stdout=sys.stderr,
            check=True,
        )
        answers: list[dict] = json.loads(results.read_text())  # type: ignore[type-arg]
        return answers


if __name__ == "__main__":
    sys.exit(main())
