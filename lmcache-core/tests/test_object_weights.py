"""Weights in object storage are named by what their store says of each object."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from lmcache_core.chunks.identity import weights_identity
from lmcache_core.chunks.object_weights import listed
from lmcache_core.errors import UnnamedError

Objects = dict[str, dict[str, Any]]


def _install(monkeypatch: pytest.MonkeyPatch, **modules: Any) -> None:
    for name, content in modules.items():
        path = name.replace("__", ".")
        module = ModuleType(path)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, path, module)


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The calls of boto3 that are made, over a dictionary; two objects a page."""
    state = SimpleNamespace(objects={}, error=None, client=None)

    class Paginator:
        def paginate(self, *, Bucket: str, Prefix: str, Delimiter: str) -> Any:
            if state.error is not None:
                raise state.error
            found = [
                {"Key": key, **facts}
                for key, facts in sorted(state.objects.items())
                if key.startswith(Prefix) and Delimiter not in key[len(Prefix) :]
            ]
            yield from ({"Contents": found[i : i + 2]} for i in range(0, len(found), 2))
            yield {}

    def client(service: str, **options: Any) -> Any:
        state.client = (service, options)
        return SimpleNamespace(get_paginator=lambda _: Paginator())

    _install(
        monkeypatch,
        boto3={"client": client},
        botocore={"UNSIGNED": "unsigned"},
        botocore__config={"Config": lambda **options: options},
    )
    return state


def _weights(**more: str) -> Objects:
    etags = {"model-1.safetensors": "one", "model-2.safetensors": "two", **more}
    return {f"llama/{name}": {"Size": 9, "ETag": f'"{etag}"'} for name, etag in etags.items()}


def test_every_weights_object_counts(s3: SimpleNamespace) -> None:
    s3.objects = {**_weights(), "llama/config.json": {"Size": 1, "ETag": '"c"'}}
    assert listed("s3://bucket/llama/") == listed("s3://bucket/llama")
    assert listed("s3://bucket/llama") == [
        "model-1.safetensors 9 etag:one",
        "model-2.safetensors 9 etag:two",
    ]
    before = weights_identity("s3://bucket/llama")
    s3.objects["llama/model-2.safetensors"]["ETag"] = '"other"'
    after = weights_identity("s3://bucket/llama")
    s3.objects["llama/model-2.safetensors"] = {"Size": 10, "ETag": '"two"'}
    longer = weights_identity("s3://bucket/llama")
    s3.objects = _weights(**{"model-3.safetensors": "three"})
    assert len({before, after, longer, weights_identity("s3://bucket/llama")}) == 4


def test_what_others_keep_beside_it_does_not_count(s3: SimpleNamespace) -> None:
    s3.objects = _weights()
    before = weights_identity("s3://bucket/llama")
    s3.objects["llama/deeper/model.safetensors"] = {"Size": 1, "ETag": '"x"'}
    s3.objects["llama2/model.safetensors"] = {"Size": 1, "ETag": '"x"'}
    assert weights_identity("s3://bucket/llama") == before


def test_the_configuration_that_came_with_it_counts(s3: SimpleNamespace, tmp_path: Path) -> None:
    s3.objects = _weights()
    (tmp_path / "config.json").write_text("{}")
    before = weights_identity("s3://bucket/llama", config=tmp_path)
    (tmp_path / "config.json").write_text('{"rope_theta": 1}')
    assert weights_identity("s3://bucket/llama", config=tmp_path) != before


def test_the_streamers_endpoint(s3: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    s3.objects = _weights()
    for name in ("RUNAI_STREAMER_S3_ENDPOINT", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)
    listed("s3://bucket/llama")
    assert s3.client[1]["endpoint_url"] is None  # boto3 looks at AWS_ENDPOINT_URL
    monkeypatch.setenv("RUNAI_STREAMER_S3_ENDPOINT", "http://store:9000")
    monkeypatch.setenv("RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING", "0")
    monkeypatch.setenv("RUNAI_STREAMER_S3_UNSIGNED", "1")
    listed("s3://bucket/llama")
    options = s3.client[1]
    assert options["endpoint_url"] == "http://store:9000"
    assert options["config"]["s3"] == {"addressing_style": "path"}
    assert options["config"]["signature_version"] == "unsigned"
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://other:9000")
    with pytest.raises(UnnamedError, match=r"http://store:9000.*http://other:9000"):
        listed("s3://bucket/llama")


@pytest.mark.parametrize(
    ("objects", "error", "says"),
    [
        ({}, None, "has no weights"),
        ({"llama/config.json": {"Size": 1, "ETag": '"c"'}}, None, "has no weights"),
        ({"llama/m.safetensors": {"Size": 1}}, None, "doesn't say which llama/m"),
        ({}, PermissionError("denied"), "can't be listed: denied"),
        ({}, SystemExit("a client's"), "can't be listed"),
    ],
)
def test_what_has_no_name(
    s3: SimpleNamespace, objects: Objects, error: BaseException | None, says: str
) -> None:
    s3.objects, s3.error = objects, error
    with pytest.raises(UnnamedError, match=says):
        listed("s3://bucket/llama")


def test_a_client_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "boto3", None)
    with pytest.raises(UnnamedError, match=r"can't be listed.*boto3"):
        listed("s3://bucket/llama")


def _google(monkeypatch: pytest.MonkeyPatch, blobs: list[Any]) -> list[Any]:
    made: list[Any] = []

    class Client:
        def __init__(self, credentials: Any) -> None:
            made.append(credentials)

        def list_blobs(self, bucket: str, *, prefix: str, delimiter: str) -> list[Any]:
            assert (bucket, delimiter) == ("bucket", "/")
            return [blob for blob in blobs if blob.name.startswith(prefix)]

    auth = {
        "default": lambda: ("default", "project"),
        "load_credentials_from_file": lambda file: (f"file {file}", "project"),
    }
    _install(
        monkeypatch,
        google={},
        google__auth=auth,
        google__auth__credentials={"AnonymousCredentials": lambda: "nobody"},
        google__cloud={},
        google__cloud__storage={"Client": Client},
    )
    return made


def test_google(monkeypatch: pytest.MonkeyPatch) -> None:
    one = SimpleNamespace(name="llama/a.safetensors", size=3, md5_hash="m==", generation=17)
    composed = SimpleNamespace(name="llama/b.safetensors", size=4, md5_hash=None, generation=18)
    made = _google(monkeypatch, [composed, one])
    monkeypatch.delenv("RUNAI_STREAMER_GCS_CREDENTIAL_FILE", raising=False)
    monkeypatch.delenv("RUNAI_STREAMER_GCS_USE_ANONYMOUS_CREDENTIALS", raising=False)
    assert listed("gs://bucket/llama") == [
        "a.safetensors 3 md5:m==",
        "b.safetensors 4 generation:18",
    ]
    monkeypatch.setenv("RUNAI_STREAMER_GCS_CREDENTIAL_FILE", "key.json")
    listed("gs://bucket/llama")
    monkeypatch.setenv("RUNAI_STREAMER_GCS_USE_ANONYMOUS_CREDENTIALS", "True")
    listed("gs://bucket/llama")
    assert made == ["default", "file key.json", "nobody"]
    composed.generation = None
    with pytest.raises(UnnamedError, match="doesn't say which"):
        listed("gs://bucket/llama")


def test_azure(monkeypatch: pytest.MonkeyPatch) -> None:
    blobs = [
        SimpleNamespace(name="llama/a.safetensors", size=3, etag="0x1"),
        SimpleNamespace(name="llama/deeper/b.safetensors", size=3, etag="0x2"),
    ]

    class Service:
        def __init__(self, url: str, credential: Any) -> None:
            self.url, self.credential = url, credential
            self.account_name = url.removeprefix("https://").partition(".")[0]

        @classmethod
        def from_connection_string(cls, text: str) -> Service:
            return cls("https://local.x", text)

        def get_container_client(self, container: str) -> Any:
            assert container == "models"
            return SimpleNamespace(
                list_blobs=lambda name_starts_with: [
                    blob for blob in blobs if blob.name.startswith(name_starts_with)
                ]
            )

    _install(
        monkeypatch,
        azure={},
        azure__storage={},
        azure__storage__blob={"BlobServiceClient": Service},
        azure__identity={"DefaultAzureCredential": lambda: "managed"},
    )
    for name in ("CONNECTION_STRING", "SAS_TOKEN", "ACCOUNT_KEY"):
        monkeypatch.delenv(f"AZURE_STORAGE_{name}", raising=False)
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "mine")
    assert listed("az://models/llama") == ["a.safetensors 3 etag:mine/0x1"]
    mine = weights_identity("az://models/llama")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "theirs")
    assert weights_identity("az://models/llama") != mine, "an ETag counts within an account"
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", "UseDevelopmentStorage=true")
    assert listed("az://models/llama") == ["a.safetensors 3 etag:local/0x1"]
    blobs[0].etag = None
    with pytest.raises(UnnamedError, match="doesn't say which"):
        listed("az://models/llama")
