"""A real ``vllm serve`` process, for tests, the demo and benchmarks.

Knows how to start one, wait for it, talk to it, read its metrics and log, and end it with all its
children. Knows nothing about caches: a caller passes the arguments and the environment. Standard
library only, and what of core needs no more, so that it runs in any Python; ``python`` is the one
that has vLLM (``tools/engine_env.py`` prints it).
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from lmcache_core.testing.ports import free_port

READY_TIMEOUT_S = 600.0
REQUEST_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 30.0

_PR_SET_PDEATHSIG = 1
_SAMPLE = re.compile(r"^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)$")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
# Loopback never goes through a proxy, whatever the environment says.
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class ServerError(Exception):
    """The server didn't start, ended, or answered with an error. Shows the end of its log."""


@dataclass(frozen=True)
class Completion:
    """What came of one request."""

    text: str
    token_ids: list[int]
    finish_reason: str | None
    prompt_tokens: int
    cached_tokens: int
    """Prompt tokens that the engine did not compute, as its ``usage`` says."""
    ttft_s: float
    """From sending the request to the first token."""
    total_s: float


class Process(Protocol):
    """A process that was started, as `subprocess.Popen` shows it."""

    pid: int

    def wait(self, timeout: float | None = None) -> int: ...

    def send_signal(self, sig: int) -> None: ...


Launch = Callable[[Sequence[str], Mapping[str, str], Path], Process]
"""Starts a command with that environment, in a process group of its own. What it writes goes into
the file, in whose folder it runs."""


@dataclass
class VllmServer:
    """``with VllmServer(...) as server:`` runs a server for the length of the block.

    ``arguments`` are added to the command line and ``environ`` to the environment, from which all
    ``LMCACHE_*`` variables are taken first: a test means what it says. ``log`` is overwritten.
    Where the engine runs on a CPU, ``kv_cache_gib`` is its own KV memory, and it is bound to the
    same cores whatever its arguments; give ``VLLM_CPU_OMP_THREADS_BIND`` for more than one rank.
    """

    python: Path
    model: Path
    log: Path
    arguments: Sequence[str] = ()
    environ: Mapping[str, str] = field(default_factory=dict)
    kv_cache_gib: int = 1
    ready_timeout_s: float = READY_TIMEOUT_S
    progress: Callable[[str], None] | None = None
    """Told every 20 s that the server is still starting."""
    launch: Launch | None = None
    """How it is started, if not as a new process."""
    port: int = 0
    _process: Process | None = None

    def __enter__(self) -> VllmServer:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """Where it listens; the port is chosen anew at every start."""
        return f"http://127.0.0.1:{self.port}"

    def pids(self) -> list[int]:
        """Its living processes: the API server, the engine, the workers. Linux only."""
        return [] if self._process is None else _members(self._process.pid)

    def command(self) -> list[str]:
        """What is run: ``vllm serve``, without relying on what is on PATH."""
        return [
            *(str(self.python), "-m", "vllm.entrypoints.cli.main", "serve", str(self.model)),
            *("--served-model-name", "model", "--host", "127.0.0.1", "--port", str(self.port)),
            *("--enable-prompt-tokens-details", *self.arguments),
        ]

    def start(self) -> None:
        """Start it and wait until it answers.

        Raises:
            ServerError: it ended, or wasn't ready within ``ready_timeout_s``. Nothing is left.
        """
        self.port = free_port()
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.log.write_bytes(b"")
        launch = self.launch or _launched
        self._process = launch(self.command(), self._environment(), self.log)
        try:
            self._wait_ready()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End it as an operator would, then whatever is left of its process group. Idempotent."""
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_TIMEOUT_S)
        self._kill_group(process)

    def kill(self) -> None:
        """End all its processes at once, as a power cut would."""
        process, self._process = self._process, None
        if process is not None:
            self._kill_group(process)

    def log_text(self) -> str:
        """Everything that it has written so far."""
        return self.log.read_text(errors="replace")

    def complete(
        self, prompt: str | Sequence[int], *, max_tokens: int = 16, **options: Any
    ) -> Completion:
        """Send one greedy ``/v1/completions`` request and follow it to its end.

        ``prompt`` is text or token ids. ``options`` are added to the request.

        Raises:
            ServerError: the server answered with an error, or went away.
        """
        body = {
            "model": "model",
            "prompt": prompt if isinstance(prompt, str) else list(prompt),
            "max_tokens": max_tokens,
            "temperature": 0,
            "return_token_ids": True,
            **options,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        started = time.perf_counter()
        first: float | None = None
        text, token_ids, finish_reason, usage = "", [], None, {}
        with self._open("/v1/completions", body) as response:
            for event in self._events(response):
                for choice in event["choices"]:
                    first = first or time.perf_counter()
                    text += choice["text"]
                    token_ids += choice.get("token_ids") or []
                    finish_reason = choice["finish_reason"] or finish_reason
                usage = event.get("usage") or usage
        ended = time.perf_counter()
        return Completion(
            text=text,
            token_ids=token_ids,
            finish_reason=finish_reason,
            prompt_tokens=usage.get("prompt_tokens", 0),
            cached_tokens=(usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0,
            ttft_s=(first or ended) - started,
            total_s=ended - started,
        )

    def tokenize(self, text: str) -> list[int]:
        """The model's token ids for a text."""
        with self._open("/tokenize", {"model": "model", "prompt": text}) as response:
            tokens: list[int] = json.load(response)["tokens"]
        return tokens

    def post(self, path: str, body: Mapping[str, Any] | None = None) -> bytes:
        """Send a POST request to any other endpoint and return the answer's body."""
        with self._open(path, body or {}) as response:
            return response.read()

    def metric(self, name: str, **labels: str) -> float:
        """One Prometheus metric now, summed over what ``labels`` leave open; 0 if there is none."""
        total = 0.0
        for sample, found, value in self.metrics():
            if sample == name and labels.items() <= found.items():
                total += value
        return total

    def metrics(self) -> list[tuple[str, dict[str, str], float]]:
        """All Prometheus samples: name, labels, value."""
        with self._open("/metrics", None) as response:
            lines = response.read().decode().splitlines()
        matches = (_SAMPLE.match(line) for line in lines if not line.startswith("#"))
        return [
            (match[1], dict(_LABEL.findall(match[2] or "")), float(match[3]))
            for match in matches
            if match
        ]

    # -- inside --------------------------------------------------------------------------------

    def _environment(self) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith("LMCACHE_")}
        return {
            **kept,
            "NO_PROXY": "*",
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
            "VLLM_CPU_KVCACHE_SPACE": str(self.kv_cache_gib),
            "VLLM_CPU_OMP_THREADS_BIND": _cores(),
            **self.environ,
        }

    def _wait_ready(self) -> None:
        if self._process is None:
            raise ServerError("the server isn't running")
        began = said = time.monotonic()
        while True:
            # Waiting for its end is the pause between two questions.
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = self._process.wait(0.25)
                raise ServerError(f"vllm serve ended at start, exit code {code}\n{self._tail()}")
            with contextlib.suppress(OSError, HTTPException):
                _DIRECT.open(self.url + "/health", timeout=5).close()
                return
            now = time.monotonic()
            if now - began > self.ready_timeout_s:
                limit = f"{self.ready_timeout_s:.0f} s"
                raise ServerError(f"vllm serve wasn't ready within {limit}\n{self._tail()}")
            if self.progress is not None and now - said > 20:
                said = now
                self.progress(f"vLLM is starting … {now - began:.0f} s")

    def _open(self, path: str, body: Mapping[str, Any] | None) -> HTTPResponse:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self.url + path, data, {"Content-Type": "application/json"}
        )
        try:
            response: HTTPResponse = _DIRECT.open(request, timeout=REQUEST_TIMEOUT_S)
        except urllib.error.HTTPError as error:
            with error:
                detail = error.read().decode(errors="replace")
            raise ServerError(f"{path}: HTTP {error.code}: {detail}\n{self._tail()}") from error
        except (OSError, HTTPException) as error:
            raise ServerError(f"{path}: {error}\n{self._tail()}") from error
        return response

    def _events(self, response: HTTPResponse) -> Iterator[dict[str, Any]]:
        try:
            for line in response:
                if not line.startswith(b"data: ") or line.strip() == b"data: [DONE]":
                    continue
                event = json.loads(line[len(b"data: ") :])
                if "error" in event:
                    raise ServerError(f"the request failed: {event['error']}\n{self._tail()}")
                yield event
        except (OSError, HTTPException) as error:
            raise ServerError(f"the answer broke off: {error}\n{self._tail()}") from error

    def _tail(self, lines: int = 30) -> str:
        return "\n".join(self.log_text().splitlines()[-lines:]) + f"\n(all of it: {self.log})"

    def _kill_group(self, process: Process) -> None:
        # The engine is a child of the API server and can outlive it.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        # Those aren't our children, so there is nothing to wait on; but their memory has to be free
        # before the next server starts.
        until = time.monotonic() + STOP_TIMEOUT_S
        while _members(process.pid) and time.monotonic() < until:
            time.sleep(0.05)


def _launched(command: Sequence[str], environ: Mapping[str, str], log: Path) -> Process:
    with log.open("ab") as output:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environ,
            cwd=log.parent,
            start_new_session=True,
            preexec_fn=_end_with_parent(),
        )


def _members(group: int) -> list[int]:
    """The living processes of a process group. Linux only: elsewhere, none are seen."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # After the name, which may hold anything: state, parent, group.
            state, _, its_group = stat.read_text().rpartition(")")[2].split()[:3]
            if state != "Z" and int(its_group) == group:
                found.append(int(stat.parent.name))
    return found


def _cores() -> str:
    """All cores that we may use but the last, which the API server and the engine's loop share.

    By itself vLLM leaves one more core free when there is a KV connector. Another number of threads
    adds floating-point numbers up in another order, and greedy texts drift apart.
    """
    if chosen := os.environ.get("VLLM_CPU_OMP_THREADS_BIND"):
        return chosen
    if sys.platform != "linux":
        return "auto"
    cores = sorted(os.sched_getaffinity(0))
    return ",".join(map(str, cores[:-1] or cores))


def _end_with_parent() -> Callable[[], None] | None:
    """What a new server does first: ask the kernel for SIGTERM when its parent is gone.

    A test run that is killed can't clean up after itself. Linux only.
    """
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)
    return lambda: libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
