"""Two ranks under `trimode serve`: one that is lost ends every stream in seconds, takes the other
with it, and the pool serves again by itself.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from trimode.cluster.client import CallFailed, Client
from trimode.proto import inference_pb2 as pb

CONFIG = """
engine: {num_pages: 512, max_sequences: 8}
pools:
  - {name: both, mode: self_speculation, tensor_parallel: 2, governed: false}
"""
WORKER, RANK_0 = b"ray::RankActor", b"ray::ServeReplica:trimode:both"
# Until the streams end. Ray tells of a death at once; a silent worker is missed after 3 s, a silent
# rank 0 after 6. The rest is for a busy machine.
KILLED_S, STOPPED_S = 5.0, 15.0
RESTARTED_S = 120.0

pytestmark = pytest.mark.timeout(300)


@dataclass
class Cluster:
    """A running `trimode serve`."""

    process: subprocess.Popen[str]
    port: int

    def client(self) -> Client:
        return Client(f"127.0.0.1:{self.port}")

    def processes(self, title: bytes = b"") -> list[int]:
        """All that it started, by the beginning of their titles."""
        marker = f"TRIMODE_TEST_PORT={self.port}".encode()
        found = []
        for entry in Path("/proc").iterdir():
            try:
                if (
                    entry.name.isdigit()
                    and marker in (entry / "environ").read_bytes().split(b"\0")
                    and (entry / "cmdline").read_bytes().startswith(title)
                ):
                    found.append(int(entry.name))
            except OSError:
                continue
        return found


@pytest.fixture(scope="module")
def cluster(
    free_port: Callable[[], int], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cluster]:
    config, port = tmp_path_factory.mktemp("ranks") / "cluster.yaml", free_port()
    config.write_text(CONFIG)
    command = [str(Path(sys.executable).parent / "trimode"), "serve", "--config", str(config)]
    process = subprocess.Popen(
        [*command, "--port", str(port)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | {"TRIMODE_TEST_PORT": str(port)},
    )  # fmt: skip
    assert process.stdout is not None
    assert any("Ctrl-C" in line for line in process.stdout), "trimode serve ended early"
    cluster = Cluster(process, port)
    yield cluster
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    until(lambda: not cluster.processes(), 10)


def until(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.1)


def message(max_tokens: int, mode: pb.Mode = pb.MODE_SELF_SPECULATION) -> pb.GenerateRequest:
    stop = pb.StopConditions(max_tokens=max_tokens)
    return pb.GenerateRequest(text="def __init__(self", mode=mode, stop=stop)


def serves(cluster: Cluster) -> bool:
    try:
        with cluster.client() as client:
            return bool(list(client.generate(message(4), timeout_s=20)))
    except CallFailed as error:
        assert error.status in ("UNAVAILABLE", "DEADLINE_EXCEEDED")
        return False


def lose(cluster: Cluster, title: bytes, how: signal.Signals) -> float:
    """Send a signal to a rank in the middle of a stream; the seconds until the stream was ended,
    as unavailable. Afterwards the pool serves from other processes.
    """
    before = cluster.processes(WORKER) + cluster.processes(RANK_0)
    assert len(before) == 2
    with cluster.client() as client:
        stream = client.generate(message(1900))
        next(stream)
        os.kill(cluster.processes(title)[0], how)
        begun = time.monotonic()
        with pytest.raises(CallFailed) as caught:
            for _ in stream:
                pass
        seconds = time.monotonic() - begun
    assert caught.value.status == "UNAVAILABLE"
    until(lambda: serves(cluster), RESTARTED_S)
    after = cluster.processes(WORKER) + cluster.processes(RANK_0)
    assert len(after) == 2 and not set(after) & set(before)
    return seconds


def test_a_killed_worker_ends_the_streams_and_the_group_is_restarted_whole(
    cluster: Cluster,
) -> None:
    assert lose(cluster, WORKER, signal.SIGKILL) < KILLED_S


def test_all_modes_are_served_by_two_ranks(cluster: Cluster) -> None:
    with cluster.client() as client:
        tokens = [
            [i for reply in client.generate(message(12, mode)) for i in reply.token_ids]
            for mode in (pb.MODE_AUTOREGRESSIVE, pb.MODE_SELF_SPECULATION)
        ]
        assert list(client.generate(message(12, pb.MODE_BLOCK_DIFFUSION)))[-1].HasField("finish")
    assert tokens[0] == tokens[1]


@pytest.mark.slow
def test_a_worker_that_hangs_ends_the_streams_and_the_group_is_restarted_whole(
    cluster: Cluster,
) -> None:
    assert lose(cluster, WORKER, signal.SIGSTOP) < STOPPED_S


@pytest.mark.slow
def test_a_rank_0_that_hangs_ends_the_streams_and_the_group_is_restarted_whole(
    cluster: Cluster,
) -> None:
    assert lose(cluster, RANK_0, signal.SIGSTOP) < STOPPED_S
