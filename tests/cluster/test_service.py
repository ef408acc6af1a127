"""The whole path as `make serve` gives it: the command, local Ray, gateway, pools, real clients."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest

from trimode.cluster.client import CallFailed, Client, chat_request
from trimode.proto import inference_pb2 as pb

BIN = Path(sys.executable).parent
PROMPT = "def __init__(self"
ALL_MODES = (pb.MODE_AUTOREGRESSIVE, pb.MODE_BLOCK_DIFFUSION, pb.MODE_SELF_SPECULATION)
STOP_TIMEOUT_S = 30.0

pytestmark = pytest.mark.timeout(300)


@dataclass
class Cluster:
    """A running `trimode serve`."""

    process: subprocess.Popen[str]
    address: str
    port: int
    output: list[str]

    def client(self) -> Client:
        return Client(self.address)

    def processes(self) -> list[int]:
        """Everything that it started, and itself; /proc knows by the port in the environment."""
        marker = f"TRIMODE_TEST_PORT={self.port}".encode()
        found = []
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and marker in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
            except OSError:
                continue
        return found


def start(port: int) -> Cluster:
    process = subprocess.Popen(
        [str(BIN / "trimode"), "serve", "--port", str(port)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"TRIMODE_TEST_PORT": str(port), "COLUMNS": "200"},
    )
    assert process.stdout is not None
    output = []
    for line in process.stdout:
        output.append(line)
        if "Ctrl-C" in line:
            return Cluster(process, f"127.0.0.1:{port}", port, output)
    raise AssertionError("trimode serve ended early:\n" + "".join(output))


def stop(cluster: Cluster) -> float:
    """^C; returns the seconds until the command has ended."""
    begun = time.monotonic()
    cluster.process.send_signal(signal.SIGINT)
    cluster.process.communicate(timeout=STOP_TIMEOUT_S)
    return time.monotonic() - begun


@pytest.fixture(scope="module")
def cluster(free_port: Callable[[], int]) -> Iterator[Cluster]:
    cluster = start(free_port())
    yield cluster
    if cluster.process.poll() is None:
        stop(cluster)


def until(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.1)


def message(**fields: object) -> pb.GenerateRequest:
    request = pb.GenerateRequest(text=PROMPT, stop=pb.StopConditions(max_tokens=24))
    request.MergeFrom(pb.GenerateRequest(**fields))  # type: ignore[arg-type]
    return request


def token_ids(replies: list[pb.GenerateResponse]) -> list[int]:
    return [token_id for reply in replies for token_id in reply.token_ids]


@pytest.mark.parametrize("mode", ALL_MODES)
def test_each_mode_streams_over_grpc(cluster: Cluster, mode: pb.Mode) -> None:
    with cluster.client() as client:
        replies = list(client.generate(message(mode=mode)))
    assert {reply.mode for reply in replies} == {mode}
    assert replies[-1].finish.usage.completion_tokens == len(token_ids(replies)) == 24


def test_greedy_speculation_and_ar_give_the_same_tokens_on_different_replicas(
    cluster: Cluster,
) -> None:
    with cluster.client() as client:
        plain = list(client.generate(message(mode=pb.MODE_AUTOREGRESSIVE)))
        speculative = list(client.generate(message(mode=pb.MODE_SELF_SPECULATION)))
    assert (plain[-1].finish.pool, speculative[-1].finish.pool) == ("autoregressive", "speculation")
    assert token_ids(plain) == token_ids(speculative)


def test_a_model_without_a_chat_template_says_so_and_refuses_chats(cluster: Cluster) -> None:
    with cluster.client() as client:
        model = client.get_model()
        assert model.has_tokenizer and not model.has_chat_template
        with pytest.raises(CallFailed, match="INVALID_ARGUMENT: chat: the model has no chat tem"):
            list(client.generate(chat_request([("user", "hi")])))


def test_auto_spills_to_the_ar_pool_above_the_configured_concurrency(cluster: Cluster) -> None:
    long = message(stop=pb.StopConditions(max_tokens=1900))
    with cluster.client() as client, ExitStack() as streams:
        for _ in range(12):
            next(streams.enter_context(closing(client.generate(long))))
        in_flight = {pool.name: pool.in_flight for pool in client.get_model().pools}
    assert in_flight == {"speculation": 4, "autoregressive": 8}  # auto_concurrency is 4


def test_two_clients_that_cancel_leave_no_sequence_and_no_page_in_use(cluster: Cluster) -> None:
    with cluster.client() as client:
        for mode in (pb.MODE_AUTOREGRESSIVE, pb.MODE_SELF_SPECULATION):
            stream = client.generate(message(mode=mode, stop=pb.StopConditions(max_tokens=1900)))
            next(stream)
            stream.close()

        def idle() -> bool:
            pools = client.get_model().pools
            return all(
                p.in_flight == p.running == p.waiting == 0 and p.free_pages == p.total_pages > 0
                for p in pools
            )

        until(idle)


def test_a_deadline_is_honoured(cluster: Cluster) -> None:
    request = message(mode=pb.MODE_AUTOREGRESSIVE, stop=pb.StopConditions(max_tokens=1900))
    started = time.monotonic()
    with cluster.client() as client:
        try:
            replies = list(client.generate(request, timeout_s=0.5))
        except CallFailed as error:
            assert error.status == "DEADLINE_EXCEEDED"
        else:  # the replica was quicker to see it
            assert replies[-1].finish.reason == pb.FINISH_REASON_DEADLINE
    assert time.monotonic() - started < 5


def test_a_mistake_that_only_the_replica_can_see_names_the_field(cluster: Cluster) -> None:
    request = message(stop=pb.StopConditions(max_tokens=5000))
    with cluster.client() as client, pytest.raises(CallFailed) as caught:
        list(client.generate(request))
    assert caught.value.status == "INVALID_ARGUMENT"
    assert caught.value.message.startswith("max_tokens: ")
    assert "2048 positions" in caught.value.message


def test_a_reflection_client_that_we_did_not_write_streams(cluster: Cluster) -> None:
    buf = shutil.which("buf", path=str(BIN))
    if buf is None:
        pytest.skip("needs the buf-bin package")
    data = '{"text": "def main(", "mode": "MODE_SELF_SPECULATION", "stop": {"max_tokens": 8}}'
    url = f"http://{cluster.address}/trimode.v1.InferenceService/Generate"
    called = subprocess.run(
        [buf, "curl", "--protocol", "grpc", "--http2-prior-knowledge", "--data", data, url],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert called.returncode == 0, called.stderr
    assert '"reason": "FINISH_REASON_LENGTH"' in called.stdout


def test_the_generate_command_talks_to_the_cluster(cluster: Cluster) -> None:
    command = [str(BIN / "trimode"), "generate", "--address", cluster.address, "--prompt", PROMPT]
    shown = subprocess.run(
        [*command, "--max-tokens", "12"], capture_output=True, text=True, check=True, timeout=60
    ).stdout
    assert re.search(r"12 tokens \(length\), \d+ forwards", shown)


def test_a_second_cluster_on_the_same_port_is_refused_at_once(cluster: Cluster) -> None:
    second = subprocess.run(
        [str(BIN / "trimode"), "serve", "--port", str(cluster.port)],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert second.returncode == 1
    assert "gateway.port: cannot listen" in second.stderr


def test_a_killed_replica_is_replaced_and_the_pool_serves_again(cluster: Cluster) -> None:
    replicas = [pid for pid in cluster.processes() if b"ServeReplica:trimode:autoreg" in title(pid)]
    os.kill(replicas[0], signal.SIGKILL)

    def serves() -> bool:
        try:
            with cluster.client() as client:
                list(client.generate(message(mode=pb.MODE_AUTOREGRESSIVE), timeout_s=20))
        except CallFailed as error:
            assert error.status in ("UNAVAILABLE", "DEADLINE_EXCEEDED")
            return False
        return True

    until(serves, 90)


def title(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def test_ctrl_c_lets_a_stream_finish_and_leaves_no_process(cluster: Cluster) -> None:
    with cluster.client() as client:
        stream = client.generate(message(mode=pb.MODE_AUTOREGRESSIVE))
        next(stream)
        with ThreadPoolExecutor(1) as threads:
            stopping = threads.submit(stop, cluster)
            replies = list(stream)
            seconds = stopping.result()
    assert replies[-1].HasField("finish")
    assert cluster.process.returncode == 0
    until(lambda: not cluster.processes(), 10)
    assert seconds < STOP_TIMEOUT_S
    with pytest.raises(grpc.FutureTimeoutError):
        grpc.channel_ready_future(grpc.insecure_channel(cluster.address)).result(timeout=1)
