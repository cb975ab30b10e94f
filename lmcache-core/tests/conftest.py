"""Throw-away distributions: real ``.dist-info`` folders and modules on ``sys.path``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import uuid4

import pytest

MakeDistribution = Callable[..., str]

DESCRIPTORS = """
from pydantic import BaseModel, ConfigDict, SecretStr
from lmcache_core.contracts.hookspecs import hookimpl
from lmcache_core.contracts.serde import SerdeDescriptor
from lmcache_core.contracts.storage import StorageBackendDescriptor

class Options(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    host: str = "localhost"
    port: int = 1
    password: SecretStr = SecretStr("")

def from_url(url):
    host, colon, port = url.partition("://")[2].rpartition("@")[2].partition(":")
    if not host:
        raise ValueError("there is no host in it")
    return {"host": host, **({"port": port} if colon else {})}

def backend(name, config=Options, **more):
    return StorageBackendDescriptor(
        name=name, summary="a toy", config=config, create=lambda options: None, **more
    )
"""
"""What most throw-away plugins start with."""


@pytest.fixture
def distribution(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeDistribution]:
    """Installs a distribution with one plugin and answers the name of the plugin's module.

    ``code`` is the module's text after `DESCRIPTORS`; ``plain`` leaves those out.
    """
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))
    modules: list[str] = []

    def make(
        name: str,
        code: str,
        *,
        version: str = "1.0",
        plugin: str | None = None,
        requires: tuple[str, ...] = (),
        entry_points: str | None = None,
        plain: bool = False,
    ) -> str:
        module = f"throwaway_{uuid4().hex}"
        modules.append(module)
        (site / f"{module}.py").write_text(("" if plain else DESCRIPTORS) + code)
        info = site / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
        lines += [f"Requires-Dist: {text}" for text in requires]
        (info / "METADATA").write_text("\n".join(lines) + "\n")
        plugin = plugin or name.rpartition("-")[2]
        text = entry_points or f"[lmcache.plugins]\n{plugin} = {module}\n"
        (info / "entry_points.txt").write_text(text)
        return module

    yield make
    for module in modules:
        sys.modules.pop(module, None)
