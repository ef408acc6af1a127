"""How `trimode serve` starts nothing where it cannot, and stops where it is told to."""

import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from trimode.cluster import serve
from trimode.cluster.config import ClusterConfig
from trimode.replicas.errors import CheckpointError, Unavailable
from trimode.replicas.model.source import HubModel


@pytest.fixture
def own_signals() -> Iterator[None]:
    """Signal handlers as they were, afterwards."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_model_that_cannot_be_had_is_told_before_a_cluster_is_started(
    free_port: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetch(source: Any) -> None:
        raise CheckpointError(f"{source} cannot be had")

    monkeypatch.setattr(serve, "fetch", fetch)
    monkeypatch.setattr(serve, "_start", lambda *_: pytest.fail("started a cluster"))
    model = HubModel("org/model", "0" * 40)
    config = ClusterConfig.parse(
        {
            "model": {"name": model.name, "revision": model.revision},
            "gateway": {"port": free_port()},
        }
    )
    with pytest.raises(CheckpointError, match=f"{model} cannot be had"):
        serve.run(config, None)


@pytest.mark.usefixtures("own_signals")
def test_a_start_that_is_interrupted_has_nothing_to_drain(
    free_port: Callable[[], int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupted(*_: Any) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(serve, "_start", interrupted)
    monkeypatch.setattr(serve, "_drain", lambda _: pytest.fail("drained"))
    serve.run(ClusterConfig.parse({"gateway": {"port": free_port()}}), None)
    assert capsys.readouterr().out == "stopped\n"


@pytest.mark.usefixtures("own_signals")
def test_a_cluster_that_cannot_be_joined_is_told_and_nothing_is_deleted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refused(**_: Any) -> None:
        raise ConnectionError("Failed to connect") from OSError("Traceback:\nnobody listens")

    monkeypatch.setattr(serve, "check_ray_address", lambda _: None)
    monkeypatch.setattr(serve.ray, "init", refused)
    monkeypatch.setattr(serve.serve, "delete", lambda _: pytest.fail("looked for a cluster"))
    with pytest.raises(Unavailable, match=r"ray-address: .* at host:6379: nobody listens"):
        serve.run(ClusterConfig(), "host:6379")
