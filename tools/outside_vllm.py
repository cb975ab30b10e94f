"""Runs vLLM's own tests of KV connectors against ours.

    python3 tools/outside_vllm.py                       everything, a few minutes
    python3 tools/outside_vllm.py --only unit           what needs no server
    python3 tools/outside_vllm.py --connector example   vLLM's own connector: are the checks well?

vLLM's tests, unchanged (see `vllm_sources`):

- ``unit/test_lmcache_integration.py``: vLLM still has what LMCache reads from it;
- ``unit/test_lmcache_connector.py``: vLLM's ``LMCacheConnectorV1`` wrapper around LMCache's class;
- ``nixl_integration/test_edge_cases.py``: a black box. Two real servers, one prefills and one
  decodes, behind vLLM's toy proxy; what comes through the proxy must equal what a server answers
  when asked directly.

The last one would pass without any cache. So one more check, ours, comes after it on the same
servers: the decode server must take tokens that only the prefill server has computed. The servers
share nothing but a folder.

Knows how to get the tests and what they need to have running; knows nothing of how a connector
works. Standard library only; the servers and tests run in the environment of `engine_env`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prepared import REPOSITORY, PreparationError, say
from vllm_sources import EDGE_CASES, PROXY, UNIT, VLLM, hub_stand_in, sources

READY_TIMEOUT_S = 600.0
PUBLISH_TIMEOUT_S = 60.0
REQUEST_TIMEOUT_S = 120.0
BLOCK_TOKENS = 32
CHUNK_TOKENS = 8
HITS = "vllm:external_prefix_cache_hits_total"

# Common English words: the tokenizer of a small model turns them into a known order of magnitude.
SHARED_PROMPT = " ".join(f"{n} bottles of beer on the wall and" for n in range(40, 0, -1))


class CheckError(Exception):
    """A check's answer is no. The message says what was seen."""


@dataclass(frozen=True)
class Connector:
    """How to give both servers one connector and one shared folder."""

    transfer: Callable[[Path], dict[str, Any]]
    environ: Callable[[Path], dict[str, str]]


def _lmcache_environ(folder: Path) -> dict[str, str]:
    return {
        "LMCACHE_CHUNK_SIZE": str(CHUNK_TOKENS),
        "LMCACHE_LOCAL_DISK": f"file://{folder}/",
        "LMCACHE_MAX_LOCAL_DISK_SIZE": "1",
        "LMCACHE_MAX_LOCAL_CPU_SIZE": "0.25",
    }


CONNECTORS = {
    "lmcache": Connector(
        lambda _: {"kv_connector": "LMCacheConnectorV1", "kv_role": "kv_both"}, _lmcache_environ
    ),
    "lmcache-by-path": Connector(
        lambda _: {
            "kv_connector": "LMCacheConnector",
            "kv_connector_module_path": "lmcache_connector_vllm.connector",
            "kv_role": "kv_both",
        },
        _lmcache_environ,
    ),
    "example": Connector(
        lambda folder: {
            "kv_connector": "ExampleConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"shared_storage_path": str(folder)},
        },
        lambda _: {},
    ),
}


# -- what is needed ----------------------------------------------------------------------------


def environment(**extra: str) -> dict[str, str]:
    """Our own variables would change what is tested; a proxy would swallow loopback requests."""
    kept = {k: v for k, v in os.environ.items() if not k.upper().startswith(("LMCACHE_", "VLLM_"))}
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        kept.pop(name, None)
        kept.pop(name.upper(), None)
    return {
        **kept,
        "NO_PROXY": "*",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        **extra,
    }


# -- processes ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Process:
    """A server that was started, and where it writes."""

    name: str
    popen: subprocess.Popen[bytes]
    port: int
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def tail(self, lines: int = 30) -> str:
        text = "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])
        return f"{text}\n(all of it: {self.log})"


@contextlib.contextmanager
def started(
    name: str, command: Sequence[str], port: int, logs: Path, env: Mapping[str, str]
) -> Iterator[Process]:
    """Start a server in a process group of its own; on the way out, end the whole group."""
    log = logs / f"{name}.log"
    with log.open("wb") as output:
        popen = subprocess.Popen(
            list(command),
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=dict(env),
            cwd=logs,
            start_new_session=True,
        )
    try:
        yield Process(name, popen, port, log)
    finally:
        _end(popen)


def _end(popen: subprocess.Popen[bytes]) -> None:
    # vLLM's engine is a child of the server: a server that is gone may have left it behind, so the
    # group is signalled again after its leader has ended.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(popen.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        popen.wait(30)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(popen.pid, signal.SIGKILL)
    popen.wait()


def wait_ready(servers: Sequence[tuple[Process, str]]) -> None:
    """Wait until every server answers its path.

    Raises:
        CheckError: one has ended, or took too long.
    """
    began = time.monotonic()
    said = began
    waiting = list(servers)
    while waiting:
        for server, path in list(waiting):
            if server.popen.poll() is not None:
                code = server.popen.returncode
                raise CheckError(f"{server.name} ended at start, code {code}:\n{server.tail()}")
            with contextlib.suppress(OSError):
                get(server.url + path, timeout_s=5)
                waiting.remove((server, path))
                say(f"  {server.name} ready after {time.monotonic() - began:.0f} s")
        if waiting and time.monotonic() - began > READY_TIMEOUT_S:
            server = waiting[0][0]
            raise CheckError(f"{server.name}: not ready in {READY_TIMEOUT_S} s:\n{server.tail()}")
        if waiting and time.monotonic() - said > 20:
            said = time.monotonic()
            names = ", ".join(server.name for server, _ in waiting)
            say(f"    … waiting for {names}, {said - began:.0f} s")
        time.sleep(0.5)


def free_ports(count: int) -> list[int]:
    """Ports that are free now. All are held open until all are known, so that they differ."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def get(url: str, body: Any = None, timeout_s: float = REQUEST_TIMEOUT_S) -> bytes:
    """GET, or POST of JSON where there is a body."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with _opener.open(request, timeout=timeout_s) as response:
        content: bytes = response.read()
    return content


# -- the checks --------------------------------------------------------------------------------


def run_pytest(python: Path, tests: Path, names: Sequence[str], env: Mapping[str, str]) -> None:
    """Run vLLM's tests as they are.

    Raises:
        CheckError: not all passed. A skipped test has checked nothing, so it counts as failed.
    """
    report = Path(env["TMPDIR"]) / "report.xml"
    report.unlink(missing_ok=True)
    options = ["-q", "-rs", "-p", "no:cacheprovider", "-c", "pytest.ini", f"--junitxml={report}"]
    command = [str(python), "-m", "pytest", *options, *names]
    done = subprocess.run(command, cwd=tests, env=dict(env), check=False)
    if done.returncode:
        raise CheckError(f"{', '.join(names)}: pytest answered {done.returncode}")
    if "<skipped" in report.read_text():
        raise CheckError(f"{', '.join(names)}: some tests were skipped")


def check_shared_tier(prefill: Process, decode: Process, model: str, folder: Path) -> str:
    """The decode server must load what only the prefill server has computed, and say the same."""
    body = {"model": model, "prompt": SHARED_PROMPT, "max_tokens": 16, "temperature": 0}
    before = _files(folder)
    expected = _complete(prefill, body)
    _wait_published(folder, before)
    hits = _metric(decode, HITS)
    actual = _complete(decode, body)
    loaded = _metric(decode, HITS) - hits
    if actual["text"] != expected["text"]:
        raise CheckError(f"prefill: {expected['text']!r}\ndecode:  {actual['text']!r}")
    # All whole blocks, except that an engine computes at least the last token itself.
    least = (expected["tokens"] - 1) // BLOCK_TOKENS * BLOCK_TOKENS
    if loaded < least:
        raise CheckError(
            f"decode loaded {loaded:.0f} of {expected['tokens']} prompt tokens, expected >= {least}"
        )
    return f"decode loaded {loaded:.0f} of {expected['tokens']} tokens, text equal"


def _complete(server: Process, body: Mapping[str, Any]) -> dict[str, Any]:
    answer = json.loads(get(f"{server.url}/v1/completions", body))
    return {"text": answer["choices"][0]["text"], "tokens": answer["usage"]["prompt_tokens"]}


def _metric(server: Process, name: str) -> float:
    lines = get(f"{server.url}/metrics").decode().splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))


def _files(folder: Path) -> set[str]:
    return {os.path.join(at, name) for at, _, names in os.walk(folder) for name in names}


def _wait_published(folder: Path, before: set[str]) -> None:
    """Stores run behind the answer and nothing outside says when they are done: poll for quiet."""
    deadline = time.monotonic() + PUBLISH_TIMEOUT_S
    last, since = before, time.monotonic()
    while time.monotonic() < deadline:
        now = _files(folder)
        if now != last:
            last, since = now, time.monotonic()
        elif now != before and time.monotonic() - since > 1.0:
            return
        time.sleep(0.1)
    raise CheckError(f"the prefill server stored nothing in {folder} in {PUBLISH_TIMEOUT_S} s")


def serve(
    arguments: argparse.Namespace, role: str, cpu: int, port: int, folder: Path
) -> tuple[list[str], dict[str, str]]:
    """The command and the environment of one server."""
    connector = CONNECTORS[arguments.connector]
    transfer = connector.transfer(folder) | {"engine_id": role}
    command = [
        *(str(arguments.python), "-m", "vllm.entrypoints.cli.main", "serve", str(arguments.model)),
        *("--served-model-name", "model", "--host", "127.0.0.1", "--port", str(port)),
        *("--enforce-eager", "--max-model-len", "2048", "--block-size", str(BLOCK_TOKENS)),
        *("--max-num-seqs", "8", "--kv-transfer-config", json.dumps(transfer)),
    ]
    # One core each: results are compared across the servers, and the order in which numbers are
    # added up depends on the number of threads.
    variables = environment(
        VLLM_CPU_KVCACHE_SPACE="1",
        VLLM_CPU_OMP_THREADS_BIND=str(cpu),
        **connector.environ(folder),
    )
    return command, variables


def edge_cases(arguments: argparse.Namespace, tests: Path, work: Path) -> str:
    """Start two servers and the proxy; run the black-box test, then check the shared tier."""
    folder = work / "shared"
    folder.mkdir()
    ports = free_ports(3)
    cpus = sorted(os.sched_getaffinity(0))
    with contextlib.ExitStack() as stack:
        servers = []
        for role, port, cpu in zip(("prefill", "decode"), ports, (cpus[0], cpus[-1]), strict=False):
            command, env = serve(arguments, role, cpu, port, folder)
            servers.append(stack.enter_context(started(role, command, port, work, env)))
        prefill, decode = servers
        wait_ready([(prefill, "/health"), (decode, "/health")])
        options = {
            "port": ports[2],
            "prefiller-hosts": "127.0.0.1",
            "prefiller-ports": prefill.port,
            "decoder-hosts": "127.0.0.1",
            "decoder-ports": decode.port,
        }
        proxy_command = [str(arguments.python), str(tests / PROXY)]
        proxy_command += [str(part) for k, v in options.items() for part in (f"--{k}", v)]
        proxy = stack.enter_context(started("proxy", proxy_command, ports[2], work, environment()))
        wait_ready([(proxy, "/healthcheck")])
        where = {f"{s.name.upper()}_PORT": str(s.port) for s in (prefill, decode, proxy)}
        where |= {f"{s.name.upper()}_HOST": "127.0.0.1" for s in (prefill, decode, proxy)}
        try:
            env = environment(TMPDIR=str(work), **where)
            run_pytest(arguments.python, tests, [EDGE_CASES], env)
            return check_shared_tier(prefill, decode, "model", folder)
        except (CheckError, OSError) as error:
            logs = "\n".join(f"--- {s.name}\n{s.tail()}" for s in (prefill, decode))
            raise CheckError(f"{error}\n{logs}") from error


def unit(arguments: argparse.Namespace, tests: Path, work: Path) -> str:
    """Run the tests that need no server."""
    env = environment(TMPDIR=str(work), HF_HOME=str(hub_stand_in(work / "hf")))
    run_pytest(arguments.python, tests, UNIT, env)
    return "passed"


CHECKS = {"unit": unit, "edge": edge_cases}


def parse() -> argparse.Namespace:
    """Read the command line; prepare what isn't named there."""
    parser = argparse.ArgumentParser(description="Run vLLM's own KV connector tests against ours.")
    parser.add_argument("--python", type=Path, help="has vLLM and our packages (default: prepare)")
    parser.add_argument("--model", type=Path, help="directory (default: a tiny random Llama)")
    parser.add_argument("--connector", choices=CONNECTORS, default="lmcache")
    parser.add_argument("--only", choices=CHECKS)
    parser.add_argument("--keep", type=Path, metavar="DIRECTORY", help="leave logs and files here")
    arguments = parser.parse_args()
    if arguments.python is None:
        from engine_env import overlay, shared_environment

        arguments.python = overlay(shared_environment())
    if arguments.model is None:
        command = [str(arguments.python), str(REPOSITORY / "tools" / "models.py"), "tiny"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            raise PreparationError("tools/models.py tiny failed; its message is above")
        arguments.model = Path(done.stdout.strip())
    return arguments


def main() -> int:
    """Run the checks and print one line for each."""
    # A terminated runner must still end its servers; the default action would leave them running.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    results: dict[str, str] = {}
    failed = 0
    try:
        arguments = parse()
        tests = sources(arguments.python)
    except PreparationError as error:
        say(f"error: {error}")
        return 1
    with contextlib.ExitStack() as stack:
        if arguments.keep:
            root = arguments.keep.absolute()
            shutil.rmtree(root, ignore_errors=True)
        else:
            root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="outside-vllm-")))
        for name, check in CHECKS.items():
            if arguments.only not in (None, name):
                continue
            say(f"{name}: vLLM {VLLM}, connector {arguments.connector}")
            work = root / name
            work.mkdir(parents=True)
            try:
                results[name] = f"ok      {check(arguments, tests, work)}"
            except CheckError as error:
                failed += 1
                say(str(error))
                results[name] = f"FAILED  {str(error).splitlines()[0]}"
    for name, result in results.items():
        print(f"{name:8} {result}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
