"""What cannot be served is told before anything is started."""

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trimode.cluster.config import ClusterConfig
from trimode.cluster.preflight import (
    check_model,
    check_one_node,
    check_port,
    check_ray_address,
)
from trimode.replicas.errors import CheckpointError, ConfigError, Unavailable
from trimode.replicas.model.config import BUNDLED_CHECKPOINT

NODE = {"CPU": 8.0, "GPU": 2.0, "accelerator_type:A100": 1.0}


def one_pool(**settings: Any) -> ClusterConfig:
    pool = {"name": "mixed", "mode": "self_speculation"} | settings
    return ClusterConfig.parse({"pools": [pool]})


def test_a_port_that_is_taken_is_told(free_port: Callable[[], int]) -> None:
    config = ClusterConfig.parse({"gateway": {"port": free_port()}})
    check_port(config)
    taken = socket.create_server(("127.0.0.1", config.gateway.port))
    with taken, pytest.raises(ConfigError, match=r"gateway\.port: .*--port"):
        check_port(config)


def test_a_folder_without_a_model_is_told_by_its_setting(tmp_path: Path) -> None:
    config = ClusterConfig.parse({"model": {"path": str(tmp_path)}})
    with pytest.raises(CheckpointError, match=r"^model.path: .*config.json is missing"):
        check_model(config, tmp_path)


def test_ranks_that_cannot_share_the_model_are_told_by_their_pool() -> None:
    check_model(one_pool(tensor_parallel=4), BUNDLED_CHECKPOINT)
    with pytest.raises(ConfigError, match="pool mixed: tensor_parallel is 3; it must divide"):
        check_model(one_pool(tensor_parallel=3), BUNDLED_CHECKPOINT)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gpus": 1, "replicas": 2},
        {"gpus": 0.5, "replicas": 4},
        {"gpus": 1, "tensor_parallel": 2, "gpu_type": "A100"},
        {"tensor_parallel": 2, "placement": "SPREAD"},
    ],
)
def test_what_fits_one_node_is_let_through(settings: dict[str, Any]) -> None:
    check_one_node(one_pool(**settings), NODE)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"gpus": 1, "replicas": 3}, "they take 3 GPUs .mixed 3., this machine has 2"),
        ({"gpus": 1, "tensor_parallel": 4}, "they take 4 GPUs"),
        ({"gpu_type": "H100"}, "pool mixed: gpu_type is H100; this machine has A100"),
        ({"tensor_parallel": 2, "placement": "STRICT_SPREAD"}, "pool mixed: .*STRICT_SPREAD"),
    ],
)
def test_what_one_node_can_never_hold_is_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        check_one_node(one_pool(**settings), NODE)


def test_an_address_where_nobody_listens_is_told_at_once(free_port: Callable[[], int]) -> None:
    address = f"127.0.0.1:{free_port()}"
    with pytest.raises(Unavailable, match=f"--ray-address: nobody answers at {address}"):
        check_ray_address(address)
    check_ray_address("auto")  # Ray's to judge
