"""The hold of rank 0 on its workers, with real Ray actors; tests/cluster/test_rank_failure.py has
them under Serve.
"""

import time
from collections.abc import Iterator
from typing import Any

import pytest
import ray
from ray.exceptions import RayActorError, RayTaskError
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from trimode.replicas.config import EngineConfig, RankConfig
from trimode.replicas.errors import ConfigError, Unavailable
from trimode.replicas.model.config import BUNDLED_CHECKPOINT
from trimode.replicas.rank_actor import WorkerOptions
from trimode.replicas.ranks import Ranks
from trimode.replicas.replica import Replica
from trimode.replicas.types import Mode, Request

ENGINE = EngineConfig(num_pages=256, max_sequences=2)


def test_a_model_that_cannot_be_split_so_is_refused_before_anything_is_started() -> None:
    options = WorkerOptions(BUNDLED_CHECKPOINT, "auto", None, ENGINE, num_threads=1)
    with pytest.raises(ConfigError, match="tensor_parallel is 7"):
        Ranks(RankConfig(size=7), options, BUNDLED_CHECKPOINT)


@pytest.fixture
def local_ray() -> Iterator[None]:
    ray.init(
        address="local", num_cpus=2, include_dashboard=False, log_to_driver=False,
        logging_level="ERROR",
    )  # fmt: skip
    yield
    ray.shutdown()


def start(ranks: RankConfig) -> Any:
    """A replica of two ranks, as Serve would start it."""
    group = placement_group([{"CPU": 1}] * ranks.size, strategy="STRICT_PACK")
    place = PlacementGroupSchedulingStrategy(group, 0, placement_group_capture_child_tasks=True)
    actor = ray.remote(Replica).options(num_cpus=1, scheduling_strategy=place)
    return actor.remote(BUNDLED_CHECKPOINT, "auto", 1, ENGINE, governed=False, ranks=ranks)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_step_that_does_not_end_in_time_ends_the_streams_and_the_process(
    local_ray: None,
) -> None:
    replica = start(RankConfig(size=2, step_timeout_s=1e-4))
    request = Request("r", (1, 5, 6, 7), Mode.AUTOREGRESSIVE, 1900, ignore_eos=True)
    chunks = replica.generate.options(num_returns="streaming").remote(request)
    begun = None
    with pytest.raises((RayTaskError, RayActorError)) as caught:
        for chunk in chunks:
            ray.get(chunk)
            begun = begun or time.monotonic()
    assert begun is not None and time.monotonic() - begun < 10
    assert isinstance(getattr(caught.value, "cause", None), Unavailable)
    with pytest.raises(RayActorError):
        while time.monotonic() - begun < 20:
            ray.get(replica.describe.remote(), timeout=20)
