"""What `trimode serve` finds out before it starts anything, or at once after: what would otherwise
fail a minute later inside a replica, or wait for ever.
"""

import socket
from collections.abc import Mapping
from pathlib import Path

from trimode.cluster.config import ClusterConfig, PoolSettings
from trimode.replicas.addresses import family_of
from trimode.replicas.errors import CheckpointError, ConfigError, Unavailable
from trimode.replicas.model.config import ModelConfig

CONNECT_TIMEOUT_S = 10.0
GPU_TYPE = "accelerator_type:"  # begins the name of the resource that Ray makes of a node's GPU


def check_port(config: ClusterConfig) -> None:
    """Raises ConfigError where the gateway could not listen here."""
    host, port = config.gateway.host, config.gateway.port
    with socket.socket(family_of(host)) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"gateway.port: cannot listen on {host}:{port} ({error.strerror}); is another "
                "trimode running? Choose another with --port"
            ) from None


def check_model(config: ClusterConfig, folder: Path) -> None:
    """Can each pool hold the model that is in this folder?

    Raises CheckpointError or ConfigError that names the setting.
    """
    try:
        model = ModelConfig.load(folder)
    except CheckpointError as error:
        key = "name" if config.model.name is not None else "path"
        raise CheckpointError(f"model.{key}: {error}") from None
    for pool in config.pools:
        try:
            model.check_ranks(pool.tensor_parallel)
        except ConfigError as error:
            raise ConfigError(f"pool {pool.name}: {error}") from None


def check_ray_address(address: str) -> None:
    """Raises Unavailable where nobody listens at host:port; Ray itself asks on for many minutes.
    Other forms of address are Ray's to judge.
    """
    host, _, port = address.rpartition(":")
    if not host or "/" in address or not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT_S).close()
    except (OSError, OverflowError) as error:
        raise Unavailable(f"--ray-address: nobody answers at {address} ({error})") from None


def check_one_node(config: ClusterConfig, resources: Mapping[str, float]) -> None:
    """Do all pools fit on one node that has these resources, as Ray counts them?

    Raises ConfigError that names the setting. On a cluster nobody knows: it may grow.
    """
    types = [name.removeprefix(GPU_TYPE) for name in resources if name.startswith(GPU_TYPE)]
    for pool in config.pools:
        if pool.gpu_type is not None and pool.gpu_type not in types:
            raise ConfigError(
                f"pool {pool.name}: gpu_type is {pool.gpu_type}; this machine has "
                f"{', '.join(types) or 'none'}"
            )
        if pool.tensor_parallel > 1 and pool.placement == "STRICT_SPREAD":
            raise ConfigError(
                f"pool {pool.name}: placement STRICT_SPREAD gives each of {pool.tensor_parallel} "
                "ranks a node of its own; this machine is one. --ray-address names a cluster"
            )
    needed = sum(map(_num_gpus, config.pools))
    found = resources.get("GPU", 0)
    if needed > found:
        takers = [f"{pool.name} {_num_gpus(pool):g}" for pool in config.pools if pool.gpus]
        raise ConfigError(
            f"pools: they take {needed:g} GPUs ({', '.join(takers)}), this machine has {found:g}. "
            "`gpus: 0` runs on the CPU; --ray-address names a cluster"
        )


def _num_gpus(pool: PoolSettings) -> float:
    """Of all its replicas."""
    return pool.replicas * pool.tensor_parallel * pool.gpus
