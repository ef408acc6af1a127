"""What Serve is asked for, pool by pool."""

from typing import Any

from trimode.cluster.app import placement
from trimode.cluster.config import PoolSettings


def placement_of(**settings: Any) -> dict[str, Any]:
    return placement(PoolSettings(name="a", mode="autoregressive", **settings))


def test_a_replica_of_one_rank_is_an_actor() -> None:
    asked = placement_of(cpus=2, gpus=1)
    assert asked == {"ray_actor_options": {"num_cpus": 2, "num_gpus": 1, "resources": {}}}


def test_each_rank_has_a_bundle_and_the_replica_fits_into_the_first() -> None:
    asked = placement_of(cpus=2, gpus=1, tensor_parallel=4, gpu_type="H100")
    bundle = {"CPU": 2, "GPU": 1, "accelerator_type:H100": 0.001}
    assert asked["placement_group_bundles"] == [bundle] * 4
    assert asked["placement_group_strategy"] == "STRICT_PACK"
    actor = asked["ray_actor_options"]
    own = {"CPU": actor["num_cpus"], "GPU": actor["num_gpus"], **actor["resources"]}
    assert own == bundle


def test_ranks_without_gpus_ask_for_none() -> None:
    asked = placement_of(tensor_parallel=2, placement="SPREAD")
    assert asked["placement_group_bundles"] == [{"CPU": 1}] * 2
    assert asked["placement_group_strategy"] == "SPREAD"


def test_a_lost_group_is_noticed_sooner_than_serve_would_by_itself() -> None:
    assert placement_of(tensor_parallel=2)["health_check_period_s"] <= 2
