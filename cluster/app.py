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
        ray_actor_options={"num_cpus": pool.cpus, "num_gpus": pool.gpus},
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
    )
