"""Names weights that an engine streams from object storage, by what the store says of them.

Each object by its name, its length and the strongest of what its store keeps: an MD5 of the
content, else an ETag or a generation, which is another one after every write. With the same
client libraries, credentials and endpoints as the streamer (runai-model-streamer) has; they are
imported when an address is named, not before.

Knows stores' lists of objects. Reads no object, and knows nothing about models.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from lmcache_core.aio.guard import attempted
from lmcache_core.errors import UnnamedError

_SUFFIX = ".safetensors"
"""What the streamer loads."""

Listed = tuple[str, int, str]
"""An object's name, its length and what says which content it has."""


def is_address(model: str) -> bool:
    """Whether ``model`` is an address of objects rather than of files."""
    return "://" in model


def listed(address: str) -> list[str]:
    """A line for each weights object at ``address``: name, length, version; sorted.

    Raises:
        UnnamedError: the store can't be asked, has no weights there, or doesn't say which they are.
    """
    scheme, _, rest = address.partition("://")
    store = {"s3": _s3, "gs": _gcs, "az": _azure}.get(scheme.lower())
    if store is None:
        raise UnnamedError(f"{address}: only s3://, gs:// and az:// can be named")
    bucket, _, prefix = rest.partition("/")
    prefix = f"{prefix.rstrip('/')}/" if prefix.rstrip("/") else ""
    answer = attempted(lambda: list(store(bucket, prefix)))
    if answer.error is not None or answer.value is None:
        raise UnnamedError(f"{address} can't be listed: {answer.error}") from answer.error
    lines = []
    for name, size, version in answer.value:
        if name.endswith(_SUFFIX):
            if not version:
                raise UnnamedError(f"{address}: the store doesn't say which {name} it has")
            lines.append(f"{name.removeprefix(prefix)} {size} {version}")
    if not lines:
        raise UnnamedError(f"{address} has no weights (*{_SUFFIX})")
    return sorted(lines)


def _s3(bucket: str, prefix: str) -> Iterator[Listed]:
    import boto3
    from botocore import UNSIGNED
    from botocore.config import Config

    options: dict[str, Any] = {"connect_timeout": 10, "read_timeout": 30}
    if os.environ.get("RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING", "1") == "0":
        options["s3"] = {"addressing_style": "path"}
    if os.environ.get("RUNAI_STREAMER_S3_UNSIGNED", "0") == "1":
        options["signature_version"] = UNSIGNED
    # Without either, AWS itself. vLLM sets the first to the second.
    endpoint = os.environ.get("RUNAI_STREAMER_S3_ENDPOINT") or None
    other = os.environ.get("AWS_ENDPOINT_URL")
    if endpoint and other and endpoint != other:
        raise UnnamedError(
            f"RUNAI_STREAMER_S3_ENDPOINT={endpoint}, but AWS_ENDPOINT_URL={other}: which one the "
            "weights come from isn't known"
        )
    client = boto3.client("s3", endpoint_url=endpoint, config=Config(**options))
    pages = client.get_paginator("list_objects_v2")
    for page in pages.paginate(Bucket=bucket, Prefix=prefix, Delimiter="/"):
        for found in page.get("Contents", ()):
            etag = str(found.get("ETag") or "").strip('"')
            yield found["Key"], found["Size"], f"etag:{etag}" if etag else ""


def _gcs(bucket: str, prefix: str) -> Iterator[Listed]:
    from google.auth import default, load_credentials_from_file
    from google.auth.credentials import AnonymousCredentials
    from google.cloud.storage import Client

    anonymous = os.environ.get("RUNAI_STREAMER_GCS_USE_ANONYMOUS_CREDENTIALS", "")
    if anonymous.lower() in ("true", "1"):
        credentials = AnonymousCredentials()
    elif file := os.environ.get("RUNAI_STREAMER_GCS_CREDENTIAL_FILE"):
        credentials, _ = load_credentials_from_file(file)
    else:
        credentials, _ = default()
    for blob in Client(credentials=credentials).list_blobs(bucket, prefix=prefix, delimiter="/"):
        # Composed objects have no MD5; a generation is another one after every write.
        version = f"md5:{blob.md5_hash}" if blob.md5_hash else f"generation:{blob.generation}"
        yield blob.name, blob.size, version if blob.md5_hash or blob.generation else ""


def _azure(container: str, prefix: str) -> Iterator[Listed]:
    from azure.storage.blob import BlobServiceClient

    environ = os.environ
    account = environ.get("AZURE_STORAGE_ACCOUNT_NAME", "")
    if connection := environ.get("AZURE_STORAGE_CONNECTION_STRING"):
        service = BlobServiceClient.from_connection_string(connection)
    else:
        token = environ.get("AZURE_STORAGE_SAS_TOKEN", "").lstrip("?")
        credential: Any = token or environ.get("AZURE_STORAGE_ACCOUNT_KEY")
        if not credential:
            from azure.identity import DefaultAzureCredential

            credential = DefaultAzureCredential()
        suffix = environ.get("AZURE_STORAGE_ENDPOINT_SUFFIX", "blob.core.windows.net")
        service = BlobServiceClient(f"https://{account}.{suffix}", credential=credential)
    # An MD5 here is what whoever uploaded claimed; an ETag is the service's, but counts for one
    # account only, and an address doesn't say which.
    for blob in service.get_container_client(container).list_blobs(name_starts_with=prefix):
        if "/" not in blob.name.removeprefix(prefix):
            version = f"etag:{service.account_name}/{blob.etag}" if blob.etag else ""
            yield blob.name, blob.size, version
