"""Core's folders are its layers: imports point one way, and only so far."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

import lmcache_core

SOURCES = Path(lmcache_core.__file__).parent
ROOT = Path(__file__).parents[2]

LAYERS = (
    ("errors", "redaction", "templates"),
    ("logging", "metrics"),
    ("aio",),
    ("chunks",),
    ("contracts",),
    ("memory",),
    ("plugins",),
    ("config",),
    ("isolation",),
    ("tiers",),
    ("cache",),
    ("cli", "builtin", "transfer_tcp", "testing", "dialect"),
)
"""From the bottom. What is in one line knows nothing of the others there."""
FLOORS = {room: floor for floor, rooms in enumerate(LAYERS) for room in rooms}
BESIDE = {("builtin", "transfer_tcp"), ("cli", "builtin")}
"""In the top line: what one of them is made of, or shows, is another."""
ONLY_FOR_ANNOTATIONS = {
    ("contracts", "config"),  # a hook that answers dialects
    ("plugins", "config"),
}

Import = tuple[str, str, bool]
"""From which room to which, and whether that is for annotations only."""


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def modules() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(SOURCES.rglob("*.py")):
        parts = path.relative_to(SOURCES.parent).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        yield name, ast.parse(path.read_text(encoding="utf-8"))


def imported(tree: ast.Module) -> Iterator[tuple[str, bool]]:
    """Full names of what is imported, and whether only for annotations."""
    silent = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, id(node) in silent
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                yield f"{node.module}.{alias.name}", id(node) in silent


def arrows() -> set[Import]:
    found = set()
    for module, tree in modules():
        here = room_of(module)
        for name, silent in imported(tree):
            if here and name.startswith("lmcache_core.") and room_of(name) != here:
                found.add((here, room_of(name), silent))
    return found


def test_every_room_has_its_floor() -> None:
    rooms = {room_of(name) for name, _ in modules()} - {""}
    assert rooms == set(FLOORS)


def test_imports_point_down() -> None:
    wrong = [
        arrow
        for arrow in sorted(arrows())
        if arrow[1] in FLOORS
        and FLOORS[arrow[1]] >= FLOORS[arrow[0]]
        and arrow[:2] not in BESIDE
        and not (arrow[2] and arrow[:2] in ONLY_FOR_ANNOTATIONS)
    ]
    assert wrong == []


def test_the_dialect_is_imported_by_nobody() -> None:
    assert [one for one in arrows() if one[1] == "dialect"] == []


def test_core_imports_no_plugin() -> None:
    found = [
        (module, name)
        for module, tree in modules()
        for name, _ in imported(tree)
        if name.startswith(("lmcache_backend", "lmcache_connector", "lmcache_kernels"))
    ]
    assert found == []


@pytest.mark.parametrize("package", sorted(path.parent.name for path in ROOT.glob("*/src")))
def test_a_package_has_no_two_public_classes_of_one_name(package: str) -> None:
    names = Counter(
        node.name
        for path in (ROOT / package / "src").rglob("*.py")
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    )
    assert [name for name, count in names.items() if count > 1] == []


def test_modules_make_no_circle() -> None:
    """Also inside a folder; what is for annotations only doesn't count."""
    names = dict(modules())
    needs: dict[str, set[str]] = {}
    for module, tree in names.items():
        found = (name for name, silent in imported(tree) if not silent)
        needs[module] = {
            target
            for name in found
            for target in (name, name.rpartition(".")[0])
            if target in names and target != module
        } - {"lmcache_core"}
    while ends := {module for module, others in needs.items() if not others & needs.keys()}:
        for module in ends:
            del needs[module]
    assert needs == {}


# -- what plugins import --------------------------------------------------------------------


def plugin_files() -> list[Path]:
    folders = [*ROOT.glob("lmcache-[!c]*/src"), *ROOT.glob("lmcache-connector-*/src")]
    folders += [ROOT / "kernels" / "src", ROOT / "examples"]
    return sorted(path for folder in folders for path in folder.rglob("*.py"))


def test_there_are_plugins() -> None:
    found = {path.relative_to(ROOT).parts[0] for path in plugin_files()}
    assert {"lmcache-backend-lm", "lmcache-connector-vllm", "kernels", "examples"} <= found


@pytest.mark.parametrize("path", plugin_files(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_plugins_use_public_names(path: Path) -> None:
    wrong = [
        name
        for name, _ in imported(ast.parse(path.read_text(encoding="utf-8")))
        if name.startswith("lmcache_core.")
        and not name.startswith("lmcache_core.testing")
        and name.removeprefix("lmcache_core.") not in lmcache_core.__all__
    ]
    assert wrong == []


def test_public_names_are_told_once() -> None:
    modules = lmcache_core._MODULES
    assert sorted(lmcache_core.__all__) == sorted(modules)
    assert len(modules) == sum(map(len, lmcache_core._ROLES.values()))
    declared = {
        name.rpartition(".")[2]: name.rpartition(".")[0].removeprefix("lmcache_core.")
        for name, silent in imported(ast.parse((SOURCES / "__init__.py").read_text()))
        if silent
    }
    assert declared == modules
