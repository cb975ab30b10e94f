"""How a connection of the client begins: a socket, a greeting, and memory to share.

Knows which of several ways to a server is the best, and falls back to the next. Knows nothing about
calls. Runs once, in the writer's thread, before anybody else uses the line.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import time
from collections.abc import Callable

from lmcache_backend_lm import greeting, protocol
from lmcache_backend_lm.config import LmConfig
from lmcache_backend_lm.greeting import Welcome
from lmcache_backend_lm.line import Line
from lmcache_backend_lm.mapping import ReadOnlyMapping, is_sealed, may_share
from lmcache_backend_lm.proof import NONCE_BYTES, Side, Transcript
from lmcache_backend_lm.protocol import HEADER_BYTES, Op, ProtocolError, Status
from lmcache_backend_lm.shared import (
    PIECE_BYTES,
    STAGING_BYTES,
    SharedMemory,
    Staging,
    open_for_reading,
)
from lmcache_core import (
    BackendError,
    BackendRejected,
    HostRegion,
    PlainStream,
    Stream,
    TlsStream,
    client_context,
    dial,
    dial_unix,
)

logger = logging.getLogger(__name__)

_ANOTHER_USER = (
    "its server runs as another user, so no memory is shared with it and values go through the "
    "socket; run it as this engine's user, or set same_host: false"
)


class Handshake:
    """Says hello for the namespace ``fingerprint``, with ``token``. ``region``: memory to share.

    ``notice`` is told what the user should know about the way that was found.
    """

    def __init__(
        self,
        config: LmConfig,
        line: Line,
        fingerprint: str,
        token: bytes,
        region: HostRegion | None,
        notice: Callable[[str], None],
    ) -> None:
        self._notice = notice
        self._config = config
        self._line = line
        self._fingerprint = fingerprint
        self._token = token
        self._region = region

    def run(self) -> tuple[Welcome, SharedMemory | None]:
        """Connect; afterwards the line works. ``None``: values go through the socket.

        Raises:
            OSError, EOFError: nobody answers there, or not to the end.
            ProtocolError: somebody else does.
            BackendError: the server refused, or kept us waiting for too long.
        """
        config = self._config
        if config.path is not None:
            stream: Stream = PlainStream(dial_unix(config.path, config.connect_timeout_s))
        else:
            context = client_context(config.ca_file) if config.tls else None
            sock = dial(config.host, config.port, config.connect_timeout_s)
            if context is None:
                stream = PlainStream(sock)
            else:
                stream = TlsStream(sock, context, config.host, config.connect_timeout_s)
        self._line.use(stream)
        welcome = self._greet(stream)
        if config.same_host and config.path is None and stream.same_host and welcome.unix_path:
            stream, welcome = self._nearer(stream, welcome)
        shared: SharedMemory | None = None
        if config.same_host and welcome.shares_memory and isinstance(stream, PlainStream):
            if may_share(stream.sock):
                shared = self._share(stream)
            else:
                self._notice(_ANOTHER_USER)
        return welcome, shared

    # -- hello -----------------------------------------------------------------------------

    def _greet(self, stream: Stream) -> Welcome:
        """Say hello on the stream in use; with a token, both sides prove it."""
        token = self._token
        nonce = secrets.token_bytes(NONCE_BYTES)
        hello = greeting.hello(self._fingerprint, nonce, proves=bool(token))
        told = self._ask(Op.HELLO, hello)
        challenges = greeting.is_challenge(told)
        if not token and not challenges:
            return greeting.parse_welcome(told)
        if not token or not challenges:
            raise ProtocolError("it doesn't say whether there is a token")
        spoken = Transcript(hello, bytes(told), stream.binding)
        told = self._ask(Op.PROVE, spoken.proof(token, Side.CLIENT))
        welcome = greeting.parse_welcome(told)
        if not spoken.proves(welcome.proof, token, Side.SERVER):
            raise BackendRejected(
                f"{self._line.address}: whoever listens there doesn't know the token; it was sent "
                "neither that nor values"
            )
        return welcome

    def _ask(self, op: Op, said: bytes) -> memoryview:
        """The meta of the answer to HELLO or PROVE."""
        self._line.send([memoryview(protocol.header(op, 0, meta=len(said)) + said)])
        until = time.monotonic() + self._config.connect_timeout_s
        head = memoryview(bytearray(HEADER_BYTES))
        self._line.fill(head, until=until)
        answer = protocol.parse_header(head)
        if answer.status is not Status.OK:
            raise self._line.refusal(answer)
        if answer.op is not op or answer.meta > protocol.MAX_HELLO_BYTES or answer.payload:
            raise ProtocolError(f"{op.name} was answered with {answer}")
        meta = memoryview(bytearray(answer.meta))
        self._line.fill(meta, until=until)
        return meta

    def _nearer(self, stream: Stream, welcome: Welcome) -> tuple[Stream, Welcome]:
        """The same server's Unix socket, if it can be had; otherwise what there is."""
        line = self._line
        try:
            nearer = PlainStream(dial_unix(welcome.unix_path, self._config.connect_timeout_s))
        except OSError as error:
            logger.debug("%s: stays on TCP: %s: %s", line.address, welcome.unix_path, error)
            return stream, welcome
        if not may_share(nearer.sock):
            nearer.close()
            self._notice(_ANOTHER_USER)
            return stream, welcome
        try:
            line.use(nearer, keep_other=True)
            again = self._greet(nearer)
        except (BackendError, ProtocolError, OSError, EOFError) as error:
            again = None
            logger.debug("%s: stays on TCP: %s: %s", line.address, welcome.unix_path, error)
        if again is not None and again.instance == welcome.instance:
            stream.close()
            return nearer, again
        # Another server has the socket's name, in another container for instance.
        line.use(stream)
        return stream, welcome

    # -- shared memory ---------------------------------------------------------------------

    def _share(self, stream: PlainStream) -> SharedMemory:
        """Exchange shared memory with the server."""
        staging = Staging()
        region = self._region
        region_fd = None if region is None else open_for_reading(region)
        if region_fd is None:
            region = None
        try:
            size = 0 if region is None else region.nbytes
            meta = greeting.share(STAGING_BYTES, PIECE_BYTES, size)
            message = protocol.header(Op.SHARE, 0, meta=len(meta)) + meta
            fds = [staging.fd] if region_fd is None else [staging.fd, region_fd]
            socket.send_fds(stream.sock, [message], fds)
            arena, epoch_at = self._arena(stream)
        except BaseException:
            staging.close()
            raise
        finally:
            if region_fd is not None:
                os.close(region_fd)
        return SharedMemory(arena, epoch_at, staging, region)

    def _arena(self, stream: PlainStream) -> tuple[ReadOnlyMapping, int]:
        """What SHARE is answered with: the server's memory, and where our epoch is in it."""
        until = time.monotonic() + self._config.connect_timeout_s
        start, fds = self._with_fds(stream, until)
        try:
            head = memoryview(bytearray(HEADER_BYTES))
            head[: len(start)] = start
            self._line.fill(head[len(start) :], until=until)
            answer = protocol.parse_header(head)
            if answer.status is not Status.OK:
                raise self._line.refusal(answer)
            if answer.meta != 16 or len(fds) != 1:
                raise ProtocolError("SHARE wasn't answered with a descriptor")
            data = memoryview(bytearray(16))
            self._line.fill(data, until=until)
            nbytes, epoch_at = greeting.parse_shared(data)
            if not is_sealed(fds[0]):  # reading behind its end would end this process
                raise ProtocolError("the server's memory can still shrink; it must be sealed")
            return ReadOnlyMapping(fds[0], nbytes), epoch_at
        finally:
            for fd in fds:
                os.close(fd)

    def _with_fds(self, stream: PlainStream, until: float) -> tuple[bytes, list[int]]:
        """The beginning of a header, with the descriptors that come with its first byte."""
        while True:
            try:
                start, fds, _, _ = socket.recv_fds(
                    stream.sock, HEADER_BYTES, 1, socket.MSG_CMSG_CLOEXEC
                )
            except BlockingIOError:
                self._line.tick(until)
                continue
            if not start:
                raise EOFError
            return start, fds
