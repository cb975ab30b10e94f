"""The container file and the unit below ``deploy/`` say what ``lmcache_server`` understands."""

from __future__ import annotations

import configparser
import json
import re
import shlex
import signal
from argparse import ArgumentParser
from pathlib import Path

import pytest

from lmcache_backend_lm import command

DEPLOY = Path(__file__).parents[2] / "deploy" / "lmcache-server"


def parsed(options: list[str]) -> dict[str, object]:
    """The options as the server takes them; ends the test where it doesn't."""
    parser = ArgumentParser()
    command._add_options(parser)
    args = parser.parse_args(options)
    command._refuse_what_has_no_effect(args, Path(args.storage))
    return vars(args)


def joined(file: str) -> str:
    """With lines that go on in one."""
    text = (DEPLOY / file).read_text()
    return re.sub(r"\\\n\s*", " ", "".join(re.split(r"(?m)^#.*\n", text)))


def unit() -> configparser.ConfigParser:
    found = configparser.ConfigParser(interpolation=None, strict=True)
    found.optionxform = str  # type: ignore[assignment,method-assign]
    found.read_string(joined("lmcache-server.service"))
    return found


def test_the_unit_starts_a_server_that_there_is() -> None:
    service = unit()["Service"]
    program, *options = shlex.split(service["ExecStart"])
    args = parsed(options)
    assert Path(program).name == "lmcache_server"
    assert args["storage"] == f"/var/cache/{service['CacheDirectory']}"
    assert str(args["unix"]).startswith(f"/run/{service['RuntimeDirectory']}/")
    assert args["token_file"]
    assert args["tls_cert"]


def test_the_unit_reloads_by_the_signal_that_the_server_understands() -> None:
    assert unit()["Service"]["ExecReload"] == "/bin/kill -HUP $MAINPID"
    assert signal.SIGHUP.name == "SIGHUP"


def test_the_container_starts_a_server_that_there_is() -> None:
    text = joined("Containerfile")
    entry, given = (re.search(rf"(?m)^{name} (\[.*\])$", text) for name in ("ENTRYPOINT", "CMD"))
    assert entry
    assert given
    assert json.loads(entry[1]) == ["lmcache_server"]
    args = parsed(json.loads(given[1]))
    ports = re.search(r"(?m)^EXPOSE (.*)$", text)
    folder = re.search(r"(?m)^VOLUME (.*)$", text)
    assert ports
    assert folder
    assert ports[1].split() == [str(args["port"]), str(args["metrics_port"])]
    assert folder[1] == args["storage"]
    assert f":{args['metrics_port']}/health" in text


@pytest.mark.parametrize("package", ["lmcache-core", "lmcache-backend-lm"])
def test_the_container_has_the_packages(package: str) -> None:
    assert f"COPY {package} /src/{package}" in joined("Containerfile")
    assert (DEPLOY.parents[1] / package / "pyproject.toml").is_file()
