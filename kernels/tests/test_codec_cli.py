"""`lmcache codec`, as a user types it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_models import save

from lmcache_core.cli import main
from lmcache_kernels.codec_eval import cli

SMALL = ["--contexts", "2", "--context-tokens", "300", "--scored", "20", "--quiet"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save("llama", tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n".join(f"line {n} of a text" for n in range(1000)))
    return path


def test_eval_prints_a_table_and_writes_json_and_a_plot(
    folder: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = ["--json", str(tmp_path / "a.json"), "--plot", str(tmp_path / "a.png")]
    serdes = ["--serde", "lossless", "--serde", "cachegen:step=fine"]
    more = ["--generate", "4", "--needle", *files]
    status = main(
        ["codec", "eval", "--model", str(folder), "--text", str(text), *serdes, *SMALL, *more]
    )
    assert status == 0
    out = capsys.readouterr().out
    assert out.startswith("tiny: 2 contexts, 300 tokens each, 20 scored tokens, 4 greedy tokens\n")
    rows = {line.split("  ")[0]: line for line in out.splitlines()[3:]}
    assert "exact" in rows["lossless"]
    assert "reference" in rows["KIVI 4/4"]
    found = json.loads((tmp_path / "a.json").read_text())
    assert [row["scheme"] for row in found["rows"]] == list(rows)[1:]
    assert found["rows"][0]["exact"]
    assert found["rows"][0]["score"]["kl"] == 0
    assert found["needles"] == 10
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_calibrate_prints_the_profile_that_eval_measures(
    folder: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--model", str(folder), "--text", str(text), "--quiet"]
    assert main(["codec", "calibrate", *common, "--tokens", "600", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr()
    path = said.out.strip()
    assert path.startswith(str(tmp_path))
    assert path.endswith(".kvprofile")
    assert "T4 profile of tiny: 3 layers x 2 KV heads x 16" in said.err
    chosen = ["--serde", "lossless", "--serde", "cachegen", "--profile", path, "--no-references"]
    assert main(["codec", "eval", *common, *chosen, *SMALL]) == 0
    rows = [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()[4:]]
    assert rows == ["lossless", "cachegen", "cachegen T4"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "/nowhere"], "--model /nowhere: no folder with a config.json"),
        (["--model", "/nowhere", "--serde", "lossless+zip"], "serde 'zip'; installed: "),
        (["--text", "/nowhere.txt"], "--text /nowhere.txt"),
        (["--scored", "50000"], "'text.txt' is too short"),
    ],
)
def test_mistakes_are_explained(
    folder: Path,
    text: Path,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    defaults = ["--model", str(folder)] if "--model" not in arguments else []
    if "--text" not in arguments:
        defaults += ["--text", str(text)]
    assert main(["codec", "eval", *defaults, *SMALL, *arguments]) == 1
    assert message in capsys.readouterr().err


def test_a_missing_library_is_named_with_the_command_that_installs_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "find_spec", lambda name: None if name == "transformers" else 1)
    assert main(["codec", "eval", "--model", str(folder)]) == 1
    assert "needs transformers: pip install lmcache-kernels[eval]" in capsys.readouterr().err


def test_the_command_itself_needs_none_of_them(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["codec", "eval", "--help"])
    assert stopped.value.code == 0
    assert "examples:" in capsys.readouterr().out
