"""How rank 0 best tells its workers what the next pass is, by gloo's broadcast or by sockets: the
time from its first byte until all have the message. Writes docs/measurements/step_broadcast.json.

    python tests/benchmarks/step_broadcast.py
"""

import json
import os
import socket
import statistics
import struct
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from trimode.replicas.machine import describe_machine
from trimode.replicas.step_channel import StepListener, StepReceiver, StepSender, new_secret

OUT = Path(__file__).parents[2] / "docs" / "measurements" / "step_broadcast.json"
SIZES = (1_000, 4_000, 16_000, 64_000, 512_000)
GROUP_SIZES = (2, 4)
REPEATS = 300
TIMEOUT_S = 60.0
HEAD = 4096  # bytes of gloo's first message, of which eight are the length

Send = Callable[[bytes], None]
Receive = Callable[[], int]  # the message's length


class Gloo:
    """A message of fixed size with the length in front, and a second one for what is longer."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._store = tempfile.mktemp()

    def _join(self, rank: int) -> Any:
        options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._timeout = timedelta(seconds=TIMEOUT_S)
        options._devices = [dist.ProcessGroupGloo.create_device(interface="lo")]
        store = dist.FileStore(self._store, self._size)
        return dist.ProcessGroupGloo(store, rank, self._size, options)

    def sender(self) -> Send:
        group, head = self._join(0), torch.zeros(HEAD, dtype=torch.uint8)

        def send(message: bytes) -> None:
            first = struct.pack("<Q", len(message)) + message[: HEAD - 8]
            head.numpy()[: len(first)] = np.frombuffer(first, dtype=np.uint8)
            group.broadcast([head]).wait()
            if rest := message[HEAD - 8 :]:
                group.broadcast([torch.frombuffer(bytearray(rest), dtype=torch.uint8)]).wait()

        return send

    def receiver(self, rank: int) -> Receive:
        group, head = self._join(rank), torch.zeros(HEAD, dtype=torch.uint8)

        def receive() -> int:
            group.broadcast([head]).wait()
            length: int = struct.unpack("<Q", head[:8].numpy().tobytes())[0]
            if length > HEAD - 8:
                group.broadcast([torch.empty(length - HEAD + 8, dtype=torch.uint8)]).wait()
            return length

        return receive


class Tcp:
    """What the replicas use."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._secret = new_secret()
        self._listener = StepListener("127.0.0.1")

    def sender(self) -> Send:
        return self._listener.accept(self._size - 1, self._secret, TIMEOUT_S).send

    def receiver(self, rank: int) -> Receive:
        self._listener.close()  # this process's copy
        port = self._listener.port
        steps = StepReceiver.connect("127.0.0.1", port, self._secret, TIMEOUT_S)
        return lambda: len(steps.receive() or b"")


class Unix:
    """The same frames between two ends of one machine."""

    def __init__(self, size: int) -> None:
        self._pairs = [socket.socketpair() for _ in range(size - 1)]

    def sender(self) -> Send:
        return StepSender([pair[0] for pair in self._pairs]).send

    def receiver(self, rank: int) -> Receive:
        steps = StepReceiver(self._pairs[rank - 1][1])
        return lambda: len(steps.receive() or b"")


def work(channel: Gloo | Tcp | Unix, rank: int, told: int) -> None:
    receive = channel.receiver(rank)
    for size in SIZES:
        for _ in range(REPEATS):
            assert receive() == size
            os.write(told, b".")


def measure(kind: type[Gloo] | type[Tcp] | type[Unix], group_size: int) -> dict[str, float]:
    """Median milliseconds by size of message."""
    channel = kind(group_size)
    pipes = [os.pipe() for _ in range(group_size - 1)]
    workers = []
    for rank in range(1, group_size):
        pid = os.fork()
        if not pid:
            work(channel, rank, pipes[rank - 1][1])
            os._exit(0)
        workers.append(pid)
    send = channel.sender()
    found = {}
    for size in SIZES:
        message, taken = os.urandom(size), []
        for _ in range(REPEATS):
            time.sleep(0.0005)  # steps do not come one upon the other
            begun = time.perf_counter()
            send(message)
            for read_end, _ in pipes:
                os.read(read_end, 1)
            taken.append(time.perf_counter() - begun)
        found[str(size)] = round(statistics.median(taken) * 1e3, 3)
    for pid in workers:
        os.waitpid(pid, 0)
    return found


def main() -> None:
    torch.set_num_threads(1)
    document = {
        "command": "python tests/benchmarks/step_broadcast.py",
        "machine": describe_machine("torch", "trimode"),
        "repeats": REPEATS,
        "median_ms_by_bytes": {
            f"{group_size} ranks": {
                kind.__name__.lower(): measure(kind, group_size) for kind in (Gloo, Tcp, Unix)
            }
            for group_size in GROUP_SIZES
        },
    }
    OUT.write_text(json.dumps(document, indent=2) + "\n")
    print(json.dumps(document, indent=2))


if __name__ == "__main__":
    main()
