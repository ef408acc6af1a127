"""A worker runs what it is told and leaves with rank 0."""

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from trimode.replicas.rank_runner import RankRunner
from trimode.replicas.step_channel import StepListener, StepReceiver, StepSender, new_secret
from trimode.replicas.worker import Worker

HOST, TIMEOUT_S = "127.0.0.1", 10.0


@pytest.fixture
def connected(tiny_model: Any, small_engine: Any) -> Iterator[tuple[Worker, StepSender]]:
    listener, secret = StepListener(HOST), new_secret()
    steps = StepReceiver.connect(HOST, listener.port, secret, TIMEOUT_S)
    sender = listener.accept(1, secret, TIMEOUT_S)
    yield Worker(RankRunner(tiny_model(), small_engine()), steps), sender
    sender.close()
    steps.close()


def test_a_worker_leaves_once_rank_0_has(connected: tuple[Worker, StepSender]) -> None:
    worker, sender = connected
    running = threading.Thread(target=worker.run, daemon=True)
    running.start()
    sender.close()
    running.join(TIMEOUT_S)
    assert not running.is_alive()
    assert worker.num_steps == 0


def test_a_worker_ends_at_a_message_that_is_none(connected: tuple[Worker, StepSender]) -> None:
    worker, sender = connected
    sender.send(b"cos\nsystem\n(S'true'\ntR.")  # a pickle, for one
    with pytest.raises(ValueError, match="not a message"):
        worker.run()
