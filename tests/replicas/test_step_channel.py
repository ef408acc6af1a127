"""Rank 0 tells its workers what to do: everything arrives, in order, and only with them."""

import socket
import threading
from collections.abc import Iterator

import pytest

from trimode.replicas import step_channel
from trimode.replicas.errors import Unavailable
from trimode.replicas.step_channel import StepListener, StepReceiver, StepSender, new_secret

HOST, TIMEOUT_S = "127.0.0.1", 10.0


@pytest.fixture
def channel() -> Iterator[tuple[StepSender, list[StepReceiver]]]:
    """Rank 0's end and those of two workers."""
    listener, secret = StepListener(HOST), new_secret()
    receivers = [StepReceiver.connect(HOST, listener.port, secret, TIMEOUT_S) for _ in range(2)]
    sender = listener.accept(2, secret, TIMEOUT_S)
    yield sender, receivers
    sender.close()
    for receiver in receivers:
        receiver.close()


def test_every_worker_gets_every_message_in_order(
    channel: tuple[StepSender, list[StepReceiver]],
) -> None:
    sender, receivers = channel
    messages = [b"first", b"", bytes(range(256)) * 40]
    for message in messages:
        sender.send(message)
    for receiver in receivers:
        assert [receiver.receive() for _ in messages] == messages


def test_a_message_larger_than_any_buffer_arrives_whole(
    channel: tuple[StepSender, list[StepReceiver]],
) -> None:
    sender, receivers = channel
    message = bytes(8 * 1024 * 1024)
    sending = threading.Thread(target=sender.send, args=(message,))
    sending.start()
    assert [receiver.receive() for receiver in receivers] == [message, message]
    sending.join()


def test_a_later_message_does_not_change_an_earlier_one(
    channel: tuple[StepSender, list[StepReceiver]],
) -> None:
    sender, receivers = channel
    sender.send(b"one")
    first = receivers[0].receive()
    sender.send(b"two")
    receivers[0].receive()
    assert first == b"one"


def test_workers_learn_that_rank_0_has_left(
    channel: tuple[StepSender, list[StepReceiver]],
) -> None:
    sender, receivers = channel
    sender.send(b"last")
    sender.close()
    assert [receivers[0].receive(), receivers[0].receive()] == [b"last", None]


def test_rank_0_learns_that_a_worker_is_gone(
    channel: tuple[StepSender, list[StepReceiver]],
) -> None:
    sender, receivers = channel
    receivers[1].close()
    with pytest.raises(Unavailable, match="a worker is gone"):
        for _ in range(100):
            sender.send(bytes(100_000))
            receivers[0].receive()


def test_a_stranger_is_not_taken_for_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_channel, "HANDSHAKE_TIMEOUT_S", 0.1)
    listener, secret = StepListener(HOST), new_secret()
    wrong = StepReceiver.connect(HOST, listener.port, new_secret(), TIMEOUT_S)
    silent = socket.create_connection((HOST, listener.port))
    worker = StepReceiver.connect(HOST, listener.port, secret, TIMEOUT_S)
    sender = listener.accept(1, secret, TIMEOUT_S)
    sender.send(b"for the worker")
    assert worker.receive() == b"for the worker"
    assert wrong.receive() is None
    assert silent.recv(100) == b""
    for end in (wrong, worker, sender, silent):
        end.close()


def test_nobody_listens_once_the_workers_have_come(
    channel: tuple[StepSender, list[StepReceiver]],
) -> None:
    port = channel[1][0]._connection.getpeername()[1]
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((HOST, port), 1)


def test_workers_that_do_not_come_are_counted() -> None:
    listener, secret = StepListener(HOST), new_secret()
    worker = StepReceiver.connect(HOST, listener.port, secret, TIMEOUT_S)
    with pytest.raises(Unavailable, match="1 of 3 workers"):
        listener.accept(3, secret, timeout_s=0.1)
    worker.close()
