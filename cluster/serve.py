"""`trimode serve`: brings a cluster up, tells how to call it, and takes it down without a trace."""

import asyncio
import logging
import math
import os
import signal
import threading
import time
from pathlib import Path
from types import FrameType

import ray
import structlog
from ray import serve
from ray.exceptions import RayError
from ray.serve.context import _get_global_client
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ApplicationStatus, ServeDeploySchema
from rich.console import Console
from rich.panel import Panel
from rich.table import Table

from trimode.cluster import start_status
from trimode.cluster.app import APP_NAME, GATEWAY_NAME, serve_config
from trimode.cluster.config import ClusterConfig
from trimode.cluster.model_folder import fetch
from trimode.cluster.preflight import (
    check_model,
    check_one_node,
    check_port,
    check_ray_address,
)
from trimode.replicas.errors import Unavailable
from trimode.replicas.model.source import label

logging.getLogger("ray.serve").setLevel(logging.WARNING)  # its progress is ours to show
logger = structlog.get_logger(__name__)

READY_TIMEOUT_S = 1800.0  # 14B weights over a slow disk
POLL_S = 0.2


def run(config: ClusterConfig, ray_address: str | None) -> None:
    """Serve until SIGINT or SIGTERM.

    Raises ConfigError, CheckpointError or Unavailable where it cannot start.
    """
    console = Console(highlight=False)
    if ray_address is None:
        check_port(config)
        # Behind a bar; the replicas find it in the cache.
        check_model(config, fetch(config.model.source))
    else:
        check_ray_address(ray_address)
    stop = threading.Event()

    def on_signal(number: int, frame: FrameType | None) -> None:
        if stop.is_set():  # asked twice: no more draining
            os._exit(130)
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)
    try:
        _start(config, ray_address, console, stop)
        if not stop.is_set():
            _announce(config, console)
            stop.wait()
            console.print("stopping: running streams may finish, new ones are refused")
            asyncio.run(_drain(config))
    finally:
        if ray_address is not None and ray.is_initialized():
            _delete()
        ray.shutdown()
    console.print("stopped")


def _start(
    config: ClusterConfig, ray_address: str | None, console: Console, stop: threading.Event
) -> None:
    """Return once all runs, or when told to stop."""
    with console.status("starting Ray") as status:
        if ray_address is None:
            _start_ray(config)
        else:
            _join_ray(ray_address)
        status.update("starting Ray Serve")
        serve.start(proxy_location="Disabled")
        # The public serve.run() is imperative; a declared application is what autoscaling and
        # KubeRay work on.
        _get_global_client().deploy_apps(ServeDeploySchema.model_validate(serve_config(config)))
        deadline = time.monotonic() + READY_TIMEOUT_S
        told: set[str] = set()
        while not stop.is_set():
            application = serve.status().applications.get(APP_NAME)
            if application is not None:
                if application.status == ApplicationStatus.RUNNING:
                    return
                reason = start_status.failure(application)
                if reason is not None:
                    raise Unavailable(f"the cluster did not start: {reason}")
                status.update("waiting for " + start_status.progress(application))
                for delay in start_status.delays(application):
                    if delay not in told:
                        told.add(delay)
                        logger.warning("a start is delayed", reason=delay)
            if time.monotonic() > deadline:
                raise Unavailable(f"the cluster was not ready after {READY_TIMEOUT_S:.0f} s")
            time.sleep(POLL_S)


def _start_ray(config: ClusterConfig) -> None:
    """One node, of this machine. Raises ConfigError where it cannot hold all pools."""
    cpus_needed = sum(pool.num_cpus for pool in config.pools)
    ray.init(
        address="local",
        num_cpus=max(os.cpu_count() or 1, math.ceil(cpus_needed)),
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
    )
    check_one_node(config, ray.cluster_resources())


def _join_ray(address: str) -> None:
    """Raises Unavailable where there is no cluster that takes us."""
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, ValueError, RayError) as error:
        reason = str(error.__cause__ or error).strip().splitlines()[-1]
        raise Unavailable(f"--ray-address: cannot join a cluster at {address}: {reason}") from None


def _delete() -> None:
    """The application, from a cluster that stays; it may not be there yet."""
    try:
        serve.delete(APP_NAME)
    except RayServeException as error:
        logger.warning("the application could not be deleted", error=str(error))


def _announce(config: ClusterConfig, console: Console) -> None:
    address = f"{config.gateway.host}:{config.gateway.port}"
    pools = Table(box=None, pad_edge=False)
    for column in ("pool", "mode", "largest block", "replicas"):
        pools.add_column(column)
    for pool in config.pools:
        ranks = f" of {pool.tensor_parallel} ranks" if pool.tensor_parallel > 1 else ""
        pools.add_row(pool.name, pool.mode, str(pool.max_block_size), f"{pool.replicas}{ranks}")
    console.print(Panel(pools, title=f"trimode serves {label(config.model.source)} on {address}"))
    console.print("Try, from another terminal:")
    console.print(f'  trimode generate --address {address} --prompt "def main("', soft_wrap=True)
    console.print("Ctrl-C stops it.")


async def _drain(config: ClusterConfig) -> None:
    """Let streams finish; a gateway that is not there has none. Serve's handles need a loop."""
    try:
        gateway = serve.get_deployment_handle(GATEWAY_NAME, APP_NAME)
        async with asyncio.timeout(config.gateway.drain_s + 2):
            await gateway.drain.remote()
    except (RayError, RayServeException, TimeoutError) as error:
        logger.warning("the gateway could not be drained", error=str(error))


def load_config(path: Path | None, port: int | None) -> ClusterConfig:
    """The file's configuration, or the default one, with the command's overrides."""
    config = ClusterConfig() if path is None else ClusterConfig.load(path)
    if port is None:
        return config
    document = config.model_dump(mode="json")
    return ClusterConfig.parse(document | {"gateway": document["gateway"] | {"port": port}})
