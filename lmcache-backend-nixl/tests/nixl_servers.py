"""A local S3 server, for the tests."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.request import Request, urlopen

import boto3

from lmcache_core.testing.ports import free_port


@dataclass(frozen=True)
class S3:
    """A running server with the bucket ``kv-cache``."""

    port: int
    process: subprocess.Popen[bytes]

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def params(self, **changed: str) -> dict[str, str]:
        """What NIXL's OBJ plugin needs to reach it."""
        return {
            "access_key": "key",
            "secret_key": "secret",
            "bucket": "kv-cache",
            "region": "us-east-1",
            "endpoint_override": self.endpoint,
            "scheme": "http",
            "use_virtual_addressing": "false",
            "req_checksum": "required",
            **changed,
        }

    def empty(self) -> None:
        """Forget every object."""
        self._ask("POST", "/moto-api/reset")
        self._ask("PUT", "/kv-cache")

    def delete(self, name: str) -> None:
        """Remove an object behind everybody's back."""
        client = boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            region_name="us-east-1",
            aws_access_key_id="key",
            aws_secret_access_key="secret",
        )
        client.delete_object(Bucket="kv-cache", Key=name)
        client.close()

    def _ask(self, method: str, path: str) -> None:
        with urlopen(Request(self.endpoint + path, method=method), timeout=10):
            pass


@contextmanager
def s3_server() -> Iterator[S3]:
    """Start one on a free port."""
    command = shutil.which("moto_server", path=os.path.dirname(sys.executable))
    if command is None:
        raise FileNotFoundError("there is no moto_server; pip install 'moto[server]'")
    port = free_port()
    process = subprocess.Popen(
        [command, "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    server = S3(port, process)
    try:
        for _ in range(300):
            try:
                server.empty()
                break
            except OSError:
                time.sleep(0.1)
        else:
            raise TimeoutError(f"{Path(command).name} didn't answer")
        yield server
    finally:
        process.kill()
        process.wait()
