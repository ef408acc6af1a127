"""build(config) -> the Serve application; the only file that names all parts."""

from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import RequestRouterConfig

from trimode.cluster.config import ClusterConfig, PoolSettings
from trimode.cluster.gateway import Gateway
from trimode.replicas.model.hub import pin
from trimode.replicas.model.source import ModelSource
from trimode.replicas.replica import Replica
from trimode.router.request_router import RankedRequestRouter

APP_NAME = "trimode"
GATEWAY_NAME = "gateway"
# A rank that is lost ends the replica's process, which Serve notices at its next health check.
GROUP_HEALTH_PERIOD_S = 1.0
GROUP_HEALTH_TIMEOUT_S = 5.0
STATS_PERIOD_S = 0.5  # how often Serve asks replicas for their load, for operators; not for routing


def build(args: dict[str, Any]) -> Application:
    """The application of a parsed cluster.yaml; Serve calls this with its config's `args`."""
    config = ClusterConfig.parse(args)
    source = pin(config.model.source)  # once, so that all replicas load the same
    pools = {pool.name: _pool(config, source, pool) for pool in config.pools}
    gateway = serve.deployment(
        name=GATEWAY_NAME,
        num_replicas=config.gateway.replicas,
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=config.gateway.drain_s + 5,
        max_ongoing_requests=16,  # of Serve's own calls; clients' streams never come this way
    )(Gateway)
    return gateway.bind(config, source, pools)


def serve_config(config: ClusterConfig) -> dict[str, Any]:
    """What Serve (and a KubeRay RayService) is given: an import path and the cluster's own YAML as
    args.
    """
    return {
        "proxy_location": "Disabled",  # gateways listen themselves
        "applications": [
            {
                "name": APP_NAME,
                "route_prefix": "/",
                "import_path": "trimode.cluster.app:build",
                "args": config.model_dump(mode="json"),
            }
        ],
    }


def _pool(config: ClusterConfig, source: ModelSource, pool: PoolSettings) -> Application:
    engine = config.engine_config(pool)
    replica = serve.deployment(
        name=pool.name,
        num_replicas=pool.replicas,
        **placement(pool),
        # The engine's own queue refuses with a message; Serve's limits only stand behind it.
        max_ongoing_requests=2 * (engine.max_sequences + engine.max_waiting),
        max_queued_requests=engine.max_waiting,
        request_router_config=RequestRouterConfig(
            request_router_class=RankedRequestRouter,
            request_router_kwargs={"pool": pool.name},
            request_routing_stats_period_s=STATS_PERIOD_S,
        ),
    )(Replica)
    return replica.bind(
        source,
        config.model.dtype,
        max(1, int(pool.cpus)),
        engine,
        quantization=config.model.quantization,
        governed=pool.governed,
        profile=pool.profile,
        ranks=config.rank_config(pool),
    )


def placement(pool: PoolSettings) -> dict[str, Any]:
    """What one replica takes and where: an actor, or a placement group with a bundle for each rank,
    of which the replica itself is in the first.
    """
    resources = {} if pool.gpu_type is None else {f"accelerator_type:{pool.gpu_type}": 0.001}
    actor = {"num_cpus": pool.cpus, "num_gpus": pool.gpus, "resources": resources}
    if pool.tensor_parallel == 1:
        return {"ray_actor_options": actor}
    bundle = {"CPU": pool.cpus, "GPU": pool.gpus} | resources
    return {
        "ray_actor_options": actor,
        "placement_group_bundles": [
            {name: amount for name, amount in bundle.items() if amount}
            for _ in range(pool.tensor_parallel)
        ],
        "placement_group_strategy": pool.placement,
        "health_check_period_s": GROUP_HEALTH_PERIOD_S,
        "health_check_timeout_s": GROUP_HEALTH_TIMEOUT_S,
    }
