"""What is published installs side by side, and works without this repository.

Every package is built as it would be published, and installed into a fresh environment.
"""

from __future__ import annotations

import email
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections import defaultdict
from dataclasses import dataclass
from email.message import Message
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
FOLDERS = {
    re.findall(r'^name = "(.+)"$', path.read_text(), re.MULTILINE)[0]: path.parent
    for path in sorted(ROOT.glob("*/pyproject.toml"))
}
"""By the name of the distribution."""
KINDS = {
    "backend": "storage backend acme",
    "serde": "serde acme",
    "policy": "cache policy acme",
    "connector": "engine connector acme",
    "channel": "transfer channel acme",
    "cli": "",
}
"""What `lmcache new-plugin` starts, and what `lmcache plugins --load` says that it provides."""


@dataclass(frozen=True)
class Built:
    """One distribution's archives."""

    name: str
    sdist: Path
    wheel: Path

    def files(self) -> list[str]:
        """What the wheel puts into site-packages, without its metadata."""
        names = zipfile.ZipFile(self.wheel).namelist()
        return [name for name in names if ".dist-info/" not in name]

    def metadata(self) -> Message:
        with zipfile.ZipFile(self.wheel) as wheel:
            (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
            return email.message_from_bytes(wheel.read(name))


def run(*command: str | Path) -> str:
    """The command's output; a failure shows all of it."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build(name: str, folder: Path, into: Path) -> Built:
    """The sdist, and the wheel made from it: what isn't in the first isn't in the second."""
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", into, folder)
    stem = name.replace("-", "_")
    (sdist,) = into.glob(f"{stem}-*.tar.gz")
    (wheel,) = into.glob(f"{stem}-*.whl")
    return Built(name, sdist, wheel)


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Built]:
    into = tmp_path_factory.mktemp("dist")
    return {name: build(name, folder, into) for name, folder in FOLDERS.items()}


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """A new environment that sees what this one has installed, but for packages under development.

    So what ours depend on isn't downloaded again.
    """
    venv.create(tmp_path / "venv", with_pip=False, symlinks=True)
    python = tmp_path / "venv" / "bin" / "python"
    seen = tmp_path / "seen"
    seen.mkdir()
    for folder in map(Path, site_packages(sys.executable)):
        for entry in folder.iterdir():
            # An editable install is metadata and a .pth file.
            if entry.suffix != ".pth" and not is_editable(entry):
                (seen / entry.name).symlink_to(entry)
    (Path(site_packages(python)[0]) / "seen.pth").write_text(f"{seen}\n")
    return python


def site_packages(python: str | Path) -> list[str]:
    """Those that are there: Debian's Python names more."""
    named = run(python, "-c", "import site; print(*site.getsitepackages(), sep='\\n')").split()
    return [folder for folder in named if Path(folder).is_dir()]


def is_editable(dist_info: Path) -> bool:
    origin = dist_info / "direct_url.json"
    return origin.exists() and '"editable"' in origin.read_text()


def install(python: Path, *wheels: Path) -> None:
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "-q")
    run(*pip, "--no-deps", "--no-index", "--ignore-installed", *wheels)


def test_there_is_something_to_publish() -> None:
    assert {"lmcache-core", "lmcache-connector-vllm", "lmcache-backend-redis"} <= FOLDERS.keys()


def test_nobody_owns_the_lmcache_package(built: dict[str, Built]) -> None:
    """It is a namespace that several distributions put modules into; an __init__ would end that."""
    owners = [b.name for b in built.values() if "lmcache/__init__.py" in b.files()]
    assert owners == []


def test_no_file_comes_from_two_distributions(built: dict[str, Built]) -> None:
    owners = defaultdict(list)
    for one in built.values():
        for name in one.files():
            owners[name].append(one.name)
    assert {name: who for name, who in owners.items() if len(who) > 1} == {}


def test_import_packages_are_named_after_their_distribution(built: dict[str, Built]) -> None:
    for one in built.values():
        top = {name.split("/")[0] for name in one.files()}
        assert top - {"lmcache"} == {one.name.replace("-", "_")}, one.name
        assert f"{one.name.replace('-', '_')}/py.typed" in one.files()


def test_no_tests_and_no_rubbish_are_published(built: dict[str, Built]) -> None:
    for one in built.values():
        strange = [n for n in one.files() if not n.endswith((".py", ".pyi", "py.typed", ".so"))]
        strange = [n for n in strange if not n.startswith("lmcache_core/templates/")]
        assert strange == [], one.name
        assert not [name for name in one.files() if "/tests/" in name]


def test_metadata_is_what_a_registry_shows(built: dict[str, Built]) -> None:
    for one in built.values():
        metadata = one.metadata()
        assert metadata["Name"] == one.name
        assert metadata["License-Expression"] == "Apache-2.0"
        assert metadata["License-File"] == "LICENSE", f"{one.name} needs a copy of LICENSE"
        assert metadata["Summary"]
        assert len(metadata.get_payload()) > 200, f"{one.name} needs a README"
        assert metadata["Requires-Python"] == ">=3.10"


def test_licences_are_the_same_text(built: dict[str, Built]) -> None:
    expected = (ROOT / "LICENSE").read_bytes()
    for one in built.values():
        with tarfile.open(one.sdist) as sdist:
            (member,) = (
                m for m in sdist.getmembers() if m.name.count("/") == 1 and "LICENSE" in m.name
            )
            file = sdist.extractfile(member)
            assert file is not None
            assert file.read() == expected, one.name


def test_one_version_for_all_and_each_accepts_the_others(built: dict[str, Built]) -> None:
    versions = {one.name: one.metadata()["Version"] for one in built.values()}
    assert len(set(versions.values())) == 1, versions
    version = versions["lmcache-core"]
    source = (ROOT / "lmcache-core/src/lmcache_core/__init__.py").read_text()
    assert re.findall(r'^__version__ = "(.*)"$', source, re.MULTILINE) == [version]
    for one in built.values():
        requirements = map(Requirement, one.metadata().get_all("Requires-Dist") or [])
        ours = [r for r in requirements if r.name in versions]
        assert all(r.specifier.contains(version) for r in ours), one.name
        if one.name != "lmcache-core":
            assert "lmcache-core" in {r.name for r in ours}, one.name


def test_core_alone(built: dict[str, Built], python: Path) -> None:
    install(python, built["lmcache-core"].wheel)
    heavy = "'torch', 'numpy', 'redis', 'nixl', 'vllm', 'sglang'"
    seen = run(
        python,
        "-c",
        "import sys, lmcache_core; print(lmcache_core.__file__);"
        f"print([m for m in ({heavy}) if m in sys.modules])",
    ).splitlines()
    assert seen[0].startswith(str(python.parents[1]))
    assert seen[1] == "[]"


def test_everything_together(built: dict[str, Built], python: Path) -> None:
    install(python, *(one.wheel for one in built.values()))
    command = python.parent / "lmcache"
    version = built["lmcache-core"].metadata()["Version"]
    assert version in run(command, "version")
    plugins = run(command, "plugins", "--load")
    for name in built:
        assert name in plugins
    assert "failed" not in plugins
    # The namespace holds modules of several distributions.
    script = "import lmcache.utils, importlib.util as u; assert u.find_spec('lmcache.integration')"
    run(python, "-c", script)


def test_redis_is_understood_once_its_package_is_installed(
    built: dict[str, Built], python: Path
) -> None:
    """Nothing but ``pip install lmcache-core lmcache-backend-redis``."""
    install(python, built["lmcache-core"].wheel, built["lmcache-backend-redis"].wheel)
    command = python.parent / "lmcache"
    plugins = run(command, "plugins", "--load")
    assert re.search(r"redis +lmcache-backend-redis +\S+ +ok +storage backend redis", plugins)
    shown = run(command, "config", "--set", "remote_url=redis://:s3cret@localhost:6379")
    assert re.search(r"backends\.remote\.url\W+redis://localhost:6379", shown)
    assert "s3cret" not in shown


def test_the_mooncake_package_makes_its_addresses_understood(
    built: dict[str, Built], python: Path
) -> None:
    """Two wheels are all it takes, and the configuration alone imports no client."""
    install(python, built["lmcache-core"].wheel, built["lmcache-backend-mooncake"].wheel)
    script = (
        "import sys; from lmcache_core.config import load_config;"
        "from lmcache_core.plugins.manager import Plugins;"
        "found = load_config(environ={'LMCACHE_REMOTE_URL': 'mooncakestore://localhost:1/'},"
        " plugins=Plugins());"
        "section, = found.backends; print(section.type, section.options.master_server_address);"
        "print([m for m in sys.modules if m.split('.')[0] in ('mooncake', 'torch', 'numpy')])"
    )
    assert run(python, "-c", script).splitlines() == ["mooncake localhost:1", "[]"]


def test_nixl_is_asked_for_once_its_package_is_installed(
    built: dict[str, Built], python: Path, tmp_path: Path
) -> None:
    """NIXL itself isn't a requirement: making the backend says how to install it."""
    (tmp_path / "seen" / "nixl").unlink()
    install(python, built["lmcache-core"].wheel, built["lmcache-backend-nixl"].wheel)
    plugins = run(python.parent / "lmcache", "plugins", "--load")
    assert re.search(r"nixl +lmcache-backend-nixl +\S+ +ok +storage backend nixl", plugins)
    code = """
from lmcache_backend_nixl.plugin import lmcache_storage_backends
(backend,) = lmcache_storage_backends()
try:
    backend.create(backend.config(backend="POSIX", path="/nowhere"))
except Exception as error:
    print(error)
"""
    assert "pip install --no-deps nixl nixl-cu12" in run(python, "-c", code)


@pytest.fixture(scope="session")
def started(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A new package of each kind, by kind."""
    into = tmp_path_factory.mktemp("started")
    tool = ROOT / "tools" / "new_package.py"
    for kind in KINDS:
        run(sys.executable, tool, "acme", "--kind", kind, "--to", into)
    return {kind: into / f"lmcache-{kind}-acme" for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_package_passes_its_kit(
    kind: str, started: dict[str, Path], tmp_path: Path, python: Path
) -> None:
    package, wheels = started[kind], tmp_path / "dist"
    left = [p for p in package.rglob("*.*") if "$" in p.read_text().replace("\n$ ", "")]
    assert left == [], "something wasn't filled in"
    acme = build(f"lmcache-{kind}-acme", package, wheels)
    core = build("lmcache-core", FOLDERS["lmcache-core"], wheels)
    install(python, acme.wheel, core.wheel)
    plugins = run(python.parent / "lmcache", "plugins", "--load")
    assert re.search(rf"acme +lmcache-{kind}-acme +\S+ +ok *{KINDS[kind]}", plugins)
    output = run(python, "-m", "pytest", "-q", "-p", "no:cacheprovider", package / "tests")
    assert re.search(r"\b[1-9]\d* passed", output)
    assert "failed" not in output
    ruff = (sys.executable, "-m", "ruff", "check", "--isolated", "--line-length", "100")
    run(*ruff, "--select", "E,F,W,B,UP", package)


def test_a_new_package_is_typed(started: dict[str, Path]) -> None:
    sources = [package / "src" for package in started.values()]
    run(
        sys.executable, "-m", "mypy", "--strict", "--config-file", ROOT / "pyproject.toml", *sources
    )


def test_a_package_is_never_written_over(started: dict[str, Path]) -> None:
    folder = started["backend"].parent
    tool = ROOT / "tools" / "new_package.py"
    again = subprocess.run(
        [sys.executable, str(tool), "acme", "--to", str(folder)], capture_output=True, check=False
    )
    assert again.returncode == 1
