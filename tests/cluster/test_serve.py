"""What `trimode serve` finds out before it starts anything."""

import socket
from typing import Any

import pytest

from trimode.cluster import serve
from trimode.cluster.config import ClusterConfig
from trimode.replicas.errors import CheckpointError
from trimode.replicas.model.source import HubModel


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def test_a_model_that_cannot_be_had_is_told_before_a_cluster_is_started(
    monkeypatch: pytest.MonkeyPatch,
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
