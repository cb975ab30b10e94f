"""Transfer channels: how far is moving bytes to and from another process from the bare means?

    python3 bench/transfer.py                      1 GiB each way, over tcp and nixl; a minute
    python3 bench/transfer.py --quick              256 MiB, wider spread
    python3 bench/transfer.py --channel tcp --mib 4096

The other process has a channel on a region of its own, as a peer has. A turn moves all of it, in
ranges of 2 MiB, and before the turns the xxh3 of both regions is compared, each in its own
process. Calibrations move as many bytes in the same direction:

    tcp     one socket to another process, with calls that are as large as they get
    nixl    two agents in two processes, and their own calls for the same ranges

What is around that in a channel: a thread and a future for each call, ranges and their check; with
nixl also the process that it is kept in.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from calibrations import SocketPeer, address, aligned
from measuring import Report, parse, parser, runs_of, throughput

from lmcache_core.contracts.transfer import Peer, Range
from lmcache_core.testing.transfer_peer import End, Process, descriptor_of, pattern
from lmcache_core.tiers.peers import make_channel

PIECE_BYTES = 2 << 20
TURNS = 3
NIXL_OPTIONS = {"devices": "lo"}


class Moved:
    """A channel here and one in another process, with a region each."""

    def __init__(self, name: str, options: dict[str, Any], nbytes: int) -> None:
        self._loop = asyncio.new_event_loop()
        found = descriptor_of(name)
        config = found.config.model_validate(options)
        self._here = End(make_channel(found, config), nbytes)
        self._run(self._here.open())
        self._there = Process(name, options, nbytes, writable=True)
        self._peer: Peer = self._run(self._here.channel.connect(self._there.descriptor))
        self._ranges = [Range(at, at, PIECE_BYTES) for at in range(0, nbytes, PIECE_BYTES)]
        self._check()

    def read(self, _: int = 0) -> None:
        self._run(self._here.channel.read(self._peer, self._ranges))

    def write(self, _: int = 0) -> None:
        self._run(self._here.channel.write(self._peer, self._ranges))

    def close(self) -> None:
        self._run(self._here.channel.close())
        self._loop.close()
        self._there.end()

    def _check(self) -> None:
        self._there.fill(1)
        self.read()
        self._same("read")
        self._here.view[:] = pattern(2, self._here.nbytes)
        self.write()
        self._same("written")

    def _same(self, how: str) -> None:
        ours, theirs = self._here.digest(), self._there.digest()
        assert ours == theirs, f"what was {how} has another checksum"
        print(f"{self._here.nbytes >> 20} MiB {how}, xxh3 {ours} in both processes", flush=True)

    def _run(self, work: Any) -> Any:
        return self._loop.run_until_complete(work)


class RawAgents:
    """An agent here and one in another process; as little as NIXL needs."""

    def __init__(self, nbytes: int) -> None:
        self._memory = aligned(nbytes)
        self._agent = raw_agent("here", self._memory)
        ours, theirs = socket.socketpair()
        command = [sys.executable, __file__, "--raw-agent", str(theirs.fileno()), str(nbytes)]
        with theirs:
            self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()])
        self._socket = ours
        told = json.loads(ours.makefile().readline())
        self._peer = self._agent.add_remote_agent(base64.b64decode(told["metadata"]))
        if isinstance(self._peer, bytes):
            self._peer = self._peer.decode()
        places = range(0, nbytes, PIECE_BYTES)
        self._ours = [(address(self._memory) + at, PIECE_BYTES, 0) for at in places]
        self._theirs = [(told["address"] + at, PIECE_BYTES, 0) for at in places]
        self.read()

    def read(self, _: int = 0) -> None:
        self._move("READ")

    def write(self, _: int = 0) -> None:
        self._move("WRITE")

    def close(self) -> None:
        self._socket.close()  # which ends it
        self._process.wait()

    def _move(self, op: str) -> None:
        agent = self._agent
        handle = agent.initialize_xfer(
            op,
            agent.get_xfer_descs(self._ours, "DRAM"),
            agent.get_xfer_descs(self._theirs, "DRAM"),
            self._peer,
        )
        state = agent.transfer(handle)
        while state == "PROC" and (state := agent.check_xfer_state(handle)) == "PROC":
            time.sleep(0)
        agent.release_xfer_handle(handle)
        assert state == "DONE", state


def raw_agent(name: str, memory: memoryview) -> Any:
    from nixl import nixl_agent, nixl_agent_config

    # Without its own thread, which takes a CPU all the time, from whatever else is measured here.
    agent = nixl_agent(name, nixl_agent_config(enable_prog_thread=False, backends=[]))
    agent.create_backend("UCX", {"ucx_devices": NIXL_OPTIONS["devices"]})
    agent.register_memory([(address(memory), memory.nbytes, 0, "")], "DRAM")
    return agent


def serve_raw_agent(descriptor: str, nbytes: str) -> None:
    """The other end of `RawAgents`."""
    memory = aligned(int(nbytes))
    agent = raw_agent("there", memory)
    metadata = base64.b64encode(agent.get_agent_metadata()).decode()
    with socket.socket(fileno=int(descriptor)) as connection:
        told = {"metadata": metadata, "address": address(memory)}
        connection.sendall(json.dumps(told).encode() + b"\n")
        while not select.select([connection], [], [], 0.0005)[0]:  # until it is closed
            agent.get_new_notifs()  # answers the other one
    os._exit(0)  # as in `main`


def compare(
    report: Report,
    name: str,
    nbytes: int,
    runs: int,
    raw: tuple[Callable[[int], object], Callable[[int], object]],
) -> None:
    options = NIXL_OPTIONS if name == "nixl" else {}
    moved = Moved(name, options, nbytes)
    for what, ours, theirs in (("read", moved.read, raw[0]), ("write", moved.write, raw[1])):
        found = runs_of(ours, theirs, runs=runs, turns=TURNS)
        report.add(throughput(f"{name}, {nbytes >> 20} MiB, {what}", nbytes, found))
    moved.close()


def measure(arguments: argparse.Namespace) -> None:
    nbytes = arguments.mib << 20
    report = Report(arguments, "calibration")
    if arguments.channel in (None, "tcp"):
        with SocketPeer(nbytes) as peer:
            memory = aligned(nbytes)
            raw = lambda _: peer.receive(memory), lambda _: peer.send(memory)
            compare(report, "tcp", nbytes, arguments.runs, raw)
    if arguments.channel in (None, "nixl"):
        agents = RawAgents(nbytes)
        compare(report, "nixl", nbytes, arguments.runs, (agents.read, agents.write))
        agents.close()
    report.write()


def main() -> None:
    if sys.argv[1:2] == ["--raw-agent"]:
        serve_raw_agent(*sys.argv[2:])
        return
    options = parser(__doc__)
    options.add_argument("--channel", choices=["tcp", "nixl"], help="only this one")
    options.add_argument("--mib", type=int, help="a turn; default: 1024, with --quick 256")
    arguments = parse(options)
    arguments.mib = arguments.mib or (256 if arguments.quick else 1024)
    if arguments.mib < 2 or arguments.mib % 2:
        options.error(f"--mib {arguments.mib}: a multiple of 2")
    measure(arguments)
    sys.stdout.flush()
    os._exit(0)  # what was measured is printed; finalisers of clients aren't ours to run


if __name__ == "__main__":
    main()
