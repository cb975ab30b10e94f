"""Fetches vLLM's own tests, and what they would otherwise ask a model hub for.

They aren't in vLLM's wheel, so they come out of its source distribution, unchanged, kept for all
clones (see `prepared`). Standard library only.
"""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path

from prepared import PreparationError, cache_root, prepare, run_step, say

VLLM = "0.32.0"
# What vLLM's build asks for merely to name its source distribution, and pip insists on asking.
BUILD_REQUIREMENTS = (
    "setuptools>=77.0.3,<81.0.0",
    "setuptools-scm>=8.0",
    "setuptools-rust>=1.9.0",
    "packaging>=24.2",
    "wheel",
)
FOLDER = "tests/v1/kv_connector"
UNIT = ("unit/test_lmcache_integration.py", "unit/test_lmcache_connector.py")
EDGE_CASES = "nixl_integration/test_edge_cases.py"
PROXY = "nixl_integration/toy_proxy_server.py"
FILES = (*UNIT, "unit/conftest.py", EDGE_CASES, PROXY)

# vLLM's default model, which a test asks the hub for. Only its shape is read.
STAND_IN = "Qwen/Qwen3-0.6B"
STAND_IN_CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
}


def sources(python: Path) -> Path:
    """The folder of vLLM's connector tests, downloaded unless it is there.

    ``python`` has torch, which vLLM's build imports.

    Raises:
        PreparationError: a step of the download failed.
    """
    root = prepare(cache_root() / f"vllm-sdist-{VLLM}", lambda at: _fetch(at, python))
    return root / FOLDER


def _fetch(directory: Path, python: Path) -> None:
    say(f"vLLM's tests: {directory} (45 MB; once for all clones)")
    log = directory / "build.log"
    build = directory / "build"
    pip = [str(python), "-m", "pip", "--disable-pip-version-check"]
    run_step(
        "[1/2] what its build asks for",
        [*pip, "install", "-q", "--target", build, *BUILD_REQUIREMENTS],
        log,
    )
    # pip runs the build to learn the name and version. That needs torch, so it happens beside the
    # engine's; with no target device nothing is compiled.
    variables = [f"PYTHONPATH={build}", "VLLM_TARGET_DEVICE=empty"]
    download = ["download", "-q", "--no-binary", ":all:", "--no-deps", "--no-build-isolation"]
    run_step(
        "[2/2] its source distribution",
        [
            *("env", *variables, f"VLLM_VERSION_OVERRIDE={VLLM}"),
            *(*pip, *download, "-d", directory, f"vllm=={VLLM}"),
        ],
        log,
    )
    shutil.rmtree(build)
    (archive,) = directory.glob("vllm-*.tar.gz")
    # Only these: with `vllm/` beside them the tests would import that instead of what is installed,
    # and tests/conftest.py imports half of the field's libraries.
    with tarfile.open(archive) as tar:
        for name in FILES:
            member = tar.extractfile(f"vllm-{VLLM}/{FOLDER}/{name}")
            if member is None:
                raise PreparationError(f"{archive}: no file {FOLDER}/{name}")
            target = directory / FOLDER / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(member.read())
    (directory / FOLDER / "pytest.ini").write_text("[pytest]\n")
    archive.unlink()


def hub_stand_in(home: Path) -> Path:
    """A Hugging Face cache that knows one model's configuration. Returns ``HF_HOME``."""
    revision = "0" * 40
    model = home / "hub" / f"models--{STAND_IN.replace('/', '--')}"
    snapshot = model / "snapshots" / revision
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps(STAND_IN_CONFIG))
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(revision)
    return home
