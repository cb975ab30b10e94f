"""Real vLLM engines that start in seconds: processes forked from one that has imported vLLM.

    with EngineHost(folder) as host, host.engine("first", arguments, environ) as engine:
        engine.ask(prompt).tokens

Nearly all of an engine's start is importing vLLM; here it is imported once. Each engine is a
process of its own all the same: two run side by side, one ends while another goes on, one that
starts knows nothing of those before it. `EngineHost.launch` forks ``vllm serve`` likewise, for
`server`.

Run as a program it is that first process. It and the engines speak JSON lines over Unix sockets.
Knows nothing about caches: a caller passes vLLM's arguments and the environment.
"""

from __future__ import annotations

import ctypes
import gc
import json
import multiprocessing
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

START_TIMEOUT_S = 300.0
ANSWER_TIMEOUT_S = 300.0
KV_CACHE_BYTES = 128 << 20
"""An engine's own KV memory, 32,768 tokens of the tiny model. All of it is written at its start."""
_PR_SET_PDEATHSIG = 1
_NOT_INHERITED = ("LMCACHE_", "AWS_")
"""What these begin with isn't taken from the environment: a test means what it says."""

Prompt = str | Sequence[int]
Adapter = Mapping[str, Any]
"""Arguments of vLLM's ``LoRARequest``."""


class EngineError(Exception):
    """The engine didn't start, ended, or raised. Shows the end of its log."""


@dataclass(frozen=True)
class Answer:
    """What came of one prompt."""

    tokens: list[int]
    cached: int
    """Prompt tokens that the engine did not compute."""
    prompt_tokens: int


def arguments(model: Path, **more: Any) -> dict[str, Any]:
    """What most tests start an engine with; in float32, no result hangs on the order of a sum."""
    return {
        "model": str(model),
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 2048,
        "block_size": 32,
        "enable_prefix_caching": False,
        "kv_cache_memory_bytes": KV_CACHE_BYTES,
        **more,
    }


class Engine:
    """One engine; made by `EngineHost.engine`. Used by one thread at a time."""

    def __init__(self, wire: socket.socket, log: Path) -> None:
        self._wire = wire
        self._lines = wire.makefile("r")
        self._log = log
        self.pid: int = self._receive(START_TIMEOUT_S)["pid"]

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def ask(
        self, prompt: Prompt, *, max_tokens: int = 16, adapter: Adapter | None = None
    ) -> Answer:
        """The greedy continuation of one prompt, which is text or token ids."""
        return self.ask_all([prompt], max_tokens=max_tokens, adapter=adapter)[0]

    def ask_all(
        self,
        prompts: Sequence[Prompt],
        *,
        max_tokens: int = 16,
        adapter: Adapter | None = None,
        ignore_eos: bool = False,
    ) -> list[Answer]:
        """Those of several prompts at the same time; ``ignore_eos``: as long as they may be.

        Raises:
            EngineError: the engine ended or raised.
        """
        call = {
            "ask": list(prompts),
            "max_tokens": max_tokens,
            "adapter": adapter,
            "ignore_eos": ignore_eos,
        }
        return [Answer(*answer) for answer in self._call(call)["answers"]]

    def load(self, adapter: Adapter) -> None:
        """Load an adapter, as an API server does; in place if it says so."""
        self._call({"load": adapter})

    def metric(self, name: str, **labels: str) -> float:
        """A metric, named without ``vllm:``, summed over the labels that aren't given."""
        samples = self._call({"metrics": True})["metrics"]
        return sum(
            value
            for sample, found, value in samples
            if sample == f"vllm:{name}" and labels.items() <= found.items()
        )

    def log_text(self) -> str:
        """Everything that it has written so far."""
        return self._log.read_text(errors="replace")

    def stop(self) -> None:
        """Let it shut down and wait until it is gone. Idempotent."""
        if self._wire.fileno() < 0:
            return
        try:
            self._call({"stop": True})
            self._lines.readline()  # the end of the file is the end of the process
        finally:
            self._close()

    def kill(self) -> None:
        """End it at once, as a power cut would."""
        os.kill(self.pid, signal.SIGKILL)
        self._wire.settimeout(ANSWER_TIMEOUT_S)
        self._lines.readline()
        self._close()

    def _close(self) -> None:
        self._lines.close()
        self._wire.close()

    def _call(self, message: dict[str, Any]) -> dict[str, Any]:
        try:
            self._wire.sendall(json.dumps(message).encode() + b"\n")
        except OSError as error:
            raise EngineError(f"the engine is gone: {error}\n{self._tail()}") from error
        return self._receive(ANSWER_TIMEOUT_S)

    def _receive(self, timeout_s: float) -> dict[str, Any]:
        self._wire.settimeout(timeout_s)
        try:
            line = self._lines.readline()
        except OSError as error:
            raise EngineError(f"the engine doesn't answer: {error}\n{self._tail()}") from error
        if not line:
            raise EngineError(f"the engine ended\n{self._tail()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _tail(self) -> str:
        return "\n".join(self.log_text().splitlines()[-40:])


class Launched:
    """A command that runs in a fork, as `subprocess.Popen` would show it."""

    def __init__(self, wire: socket.socket) -> None:
        self._wire = wire
        self._code: int | None = None
        wire.settimeout(START_TIMEOUT_S)
        self.pid = int(wire.recv(32))

    def send_signal(self, sig: int) -> None:
        """To its first process.

        Raises:
            ProcessLookupError: it has ended.
        """
        os.kill(self.pid, sig)

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code, once it has ended.

        Raises:
            subprocess.TimeoutExpired: it hasn't.
        """
        if self._code is None:
            if not select.select([self._wire], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("vllm", timeout or 0.0)
            self._code = int(self._wire.recv(32) or -signal.SIGKILL)
            self._wire.close()
        return self._code


class EngineHost:
    """The process that has imported vLLM; ends with ``with``, and its engines with it."""

    def __init__(self, folder: Path) -> None:
        """``folder`` is where engines write their logs."""
        self._folder = folder
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with (folder / "host.log").open("wb") as log, theirs:
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[theirs.fileno()],
            )
        self._wire = ours

    def __enter__(self) -> EngineHost:
        return self

    def __exit__(self, *error: object) -> None:
        self._wire.close()
        self._process.wait(ANSWER_TIMEOUT_S)

    def engine(
        self,
        name: str,
        arguments: Mapping[str, Any],
        environ: Mapping[str, str] | None = None,
        path: Sequence[str] = (),
    ) -> Engine:
        """Start one and wait until it can be asked.

        ``arguments`` are those of ``vllm.LLM``, with ``kv_transfer_config`` as a dictionary;
        ``path`` goes before ``sys.path``.

        Raises:
            EngineError: it didn't start.
        """
        log = self._folder / f"{name}.log"
        log.touch()
        ours, theirs = socket.socketpair()
        request = {
            "arguments": dict(arguments),
            "environ": dict(environ or {}),
            "path": list(path),
            "log": str(log),
        }
        self._send(request, theirs)
        return Engine(ours, log)

    def launch(self, command: Sequence[str], environ: Mapping[str, str], log: Path) -> Launched:
        """Run ``PYTHON -m vllm.entrypoints.cli.main …`` without importing vLLM again.

        Its engine is a fork, too: by itself vLLM starts a new interpreter for it on a CPU.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        _, _, _, *words = command
        self._send({"command": words, "environ": dict(environ), "log": str(log)}, theirs)
        return Launched(ours)

    def _send(self, request: dict[str, Any], theirs: socket.socket) -> None:
        with theirs:
            socket.send_fds(self._wire, [json.dumps(request).encode()], [theirs.fileno()])


# -- the program -----------------------------------------------------------------------------------


def host(control: socket.socket) -> None:
    """Fork an engine or a command for each request, until nobody can ask any more."""
    import vllm.model_executor.models.llama
    import vllm.v1.engine.core
    import vllm.v1.worker.cpu_worker

    # Each engine would go through all of that, again and again, and copy its pages.
    gc.collect()
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for engines: their sockets tell
    while True:
        message, fds, _, _ = socket.recv_fds(control, 1 << 20, 1)
        if not message:
            return
        request = json.loads(message)
        if "command" in request:
            import vllm.entrypoints.cli.serve  # noqa: F401  once for all of them
        if os.fork() == 0:
            control.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            output = os.open(request["log"], os.O_WRONLY | os.O_APPEND)
            os.dup2(output, 1)
            os.dup2(output, 2)
            with socket.socket(fileno=fds[0]) as wire:
                if "command" in request:
                    run(request, wire)
                else:
                    with wire.makefile("rw") as lines:
                        serve(request, lines)
            return
        os.close(fds[0])


def serve(request: dict[str, Any], lines: TextIO) -> None:
    """Start an engine and do what is asked, until it is to stop or nobody can ask."""
    for name in [name for name in os.environ if name.startswith(_NOT_INHERITED)]:
        del os.environ[name]
    os.environ.update(request["environ"])
    sys.path[:0] = request["path"]
    from vllm import LLM, SamplingParams
    from vllm.config import KVTransferConfig
    from vllm.lora.request import LoRARequest

    arguments = dict(request["arguments"])
    if transfer := arguments.pop("kv_transfer_config", None):
        arguments["kv_transfer_config"] = KVTransferConfig(**transfer)
    llm = LLM(disable_log_stats=False, seed=0, **arguments)
    _say(lines, pid=os.getpid())
    for line in lines:
        message = json.loads(line)
        if "stop" in message:
            break
        if "metrics" in message:
            samples = [
                (one.name, one.labels, one.value)
                for one in llm.get_metrics()
                if hasattr(one, "value")
            ]
            _say(lines, metrics=samples)
            continue
        if "load" in message:
            llm.llm_engine.add_lora(LoRARequest(**message["load"]))
            _say(lines)
            continue
        adapter = LoRARequest(**message["adapter"]) if message["adapter"] else None
        sampling = SamplingParams(
            max_tokens=message["max_tokens"],
            temperature=0,
            ignore_eos=message["ignore_eos"],
            detokenize=False,
        )
        prompts = [
            {"prompt" if isinstance(prompt, str) else "prompt_token_ids": prompt}
            for prompt in message["ask"]
        ]
        outputs = llm.generate(prompts, sampling, use_tqdm=False, lora_request=adapter)
        answers = [
            (list(one.outputs[0].token_ids), one.num_cached_tokens or 0, len(one.prompt_token_ids))
            for one in outputs
        ]
        _say(lines, answers=answers)
    llm.llm_engine.engine_core.shutdown()
    _say(lines)


def run(request: dict[str, Any], wire: socket.socket) -> None:
    """Run a command in another fork, and tell its number and then its exit code."""
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if pid := os.fork():
        wire.send(str(pid).encode())
        _, status = os.waitpid(pid, 0)
        wire.send(str(os.waitstatus_to_exitcode(status)).encode())
        os._exit(0)
    wire.close()
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    os.setsid()
    os.chdir(Path(request["log"]).parent)
    os.environ.clear()
    os.environ.update(request["environ"])
    fork = multiprocessing.get_context("fork")
    multiprocessing.get_context = lambda method=None: fork
    sys.argv = ["vllm", *request["command"]]
    from vllm.entrypoints.cli.main import main

    main()


def _say(lines: TextIO, **message: Any) -> None:
    lines.write(json.dumps(message) + "\n")
    lines.flush()


def main() -> None:
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    # Threads that spin while they wait make two engines on two cores crawl.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    with socket.socket(fileno=int(sys.argv[1])) as control:
        host(control)


if __name__ == "__main__":
    main()
