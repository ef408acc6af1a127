"""How rank 0 tells the other ranks of its group what the next pass is: plain bytes over TCP with
their length in front. Nothing of it is unpickled.

Rank 0 listens only until its workers, who know a secret, have connected.
"""

import hmac
import secrets
import socket
import struct
import time

from trimode.replicas.addresses import listen
from trimode.replicas.errors import Unavailable

SECRET_LEN = 32  # bytes
HANDSHAKE_TIMEOUT_S = 5.0  # for a stranger who connects and says nothing

_LENGTH = struct.Struct("<Q")


def new_secret() -> bytes:
    return secrets.token_bytes(SECRET_LEN)


class StepListener:
    """Rank 0 before its workers have come."""

    def __init__(self, host: str) -> None:
        self._socket = listen(host)
        self.port: int = self._socket.getsockname()[1]

    def accept(self, num_workers: int, secret: bytes, timeout_s: float) -> "StepSender":
        """Wait for the workers, then listen no more. Raises Unavailable where they do not come."""
        deadline = time.monotonic() + timeout_s
        connections: list[socket.socket] = []
        with self._socket:
            while len(connections) < num_workers:
                self._socket.settimeout(max(0.001, deadline - time.monotonic()))
                try:
                    connection, _ = self._socket.accept()
                except TimeoutError:
                    for connection in connections:
                        connection.close()
                    raise Unavailable(
                        f"{len(connections)} of {num_workers} workers connected in {timeout_s:g} s"
                    ) from None
                if _knows(connection, secret):
                    connections.append(connection)
                else:
                    connection.close()
        return StepSender(connections)

    def close(self) -> None:
        self._socket.close()


class StepSender:
    """Rank 0's end: whatever is sent reaches every worker, in order."""

    def __init__(self, connections: list[socket.socket]) -> None:
        self._connections = connections

    def send(self, message: bytes | bytearray | memoryview) -> None:
        """Hand the message to every worker's socket. Raises Unavailable where one is gone."""
        frame = b"".join((_LENGTH.pack(len(message)), message))
        for connection in self._connections:
            try:
                connection.sendall(frame)
            except OSError as error:
                raise Unavailable(f"a worker is gone: {error}") from None

    def close(self) -> None:
        """Let the workers leave."""
        for connection in self._connections:
            connection.close()


class StepReceiver:
    """A worker's end."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    @classmethod
    def connect(cls, host: str, port: int, secret: bytes, timeout_s: float) -> "StepReceiver":
        """Raises OSError where rank 0 does not listen."""
        connection = socket.create_connection((host, port), timeout_s)
        _prepare(connection)
        connection.sendall(secret)
        return cls(connection)

    def receive(self) -> bytearray | None:
        """The next message, in memory of its own; None once rank 0 has closed its end or is gone.
        Waits without limit.
        """
        try:
            header = _read(self._connection, _LENGTH.size)
            return None if header is None else _read(self._connection, *_LENGTH.unpack(header))
        except OSError:
            return None

    def close(self) -> None:
        self._connection.close()


def _prepare(connection: socket.socket) -> None:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.settimeout(None)


def _read(connection: socket.socket, length: int) -> bytearray | None:
    """So many bytes; None where the other end closes before."""
    message = bytearray(length)
    rest = memoryview(message)
    while rest:
        count = connection.recv_into(rest)
        if not count:
            return None
        rest = rest[count:]
    return message


def _knows(connection: socket.socket, secret: bytes) -> bool:
    """Whether the one who connected sends the secret, and at once."""
    connection.settimeout(HANDSHAKE_TIMEOUT_S)
    try:
        said = _read(connection, len(secret))
    except OSError:
        return False
    _prepare(connection)
    return said is not None and hmac.compare_digest(said, secret)
