"""Serve's status of a start, in the words of `trimode serve`."""

import pytest
from ray.serve.schema import (
    ApplicationStatus,
    ApplicationStatusOverview,
    DeploymentStatus,
    DeploymentStatusOverview,
    DeploymentStatusTrigger,
    ReplicaState,
)

from trimode.cluster import start_status

TRACE = """A replica failed to start with exception. Retrying 2 more time(s). Error:
\x1b[36mray::ServeReplica:trimode:mixed()\x1b[39m (pid=1)
RuntimeError: Traceback (most recent call last):
  File "replica.py", line 1, in initialize
trimode.replicas.errors.{name}: it is wrong
"""


def starting(
    message: str, status: ApplicationStatus = ApplicationStatus.DEPLOYING
) -> ApplicationStatusOverview:
    """An application whose gateway runs and whose pool has something to say."""

    def deployment(states: dict[ReplicaState, int], message: str) -> DeploymentStatusOverview:
        return DeploymentStatusOverview(
            status=DeploymentStatus.UPDATING,
            status_trigger=DeploymentStatusTrigger.UNSPECIFIED,
            replica_states=states,
            message=message,
        )

    return ApplicationStatusOverview(
        status=status,
        message="",
        last_deployed_time_s=0,
        deployments={
            "gateway": deployment({ReplicaState.RUNNING: 1}, ""),
            "mixed": deployment({ReplicaState.RUNNING: 1, ReplicaState.STARTING: 2}, message),
        },
    )


def test_progress_counts_the_replicas_that_run() -> None:
    assert start_status.progress(starting("")) == "gateway 1/1, mixed 1/3"


def test_a_start_that_goes_well_has_neither_failed_nor_been_delayed() -> None:
    assert start_status.failure(starting("")) is None
    assert start_status.delays(starting("")) == []


@pytest.mark.parametrize("name", ["CheckpointError", "ConfigError"])
def test_what_no_other_attempt_helps_is_a_failure_at_once_and_one_line(name: str) -> None:
    assert start_status.failure(starting(TRACE.format(name=name))) == "mixed: it is wrong"


def test_what_another_attempt_may_help_is_a_delay_until_serve_gives_up() -> None:
    message = TRACE.format(name="Unavailable")
    assert start_status.failure(starting(message)) is None
    assert start_status.delays(starting(message)) == [
        "mixed: trimode.replicas.errors.Unavailable: it is wrong"
    ]
    given_up = starting(message, ApplicationStatus.DEPLOY_FAILED)
    assert start_status.failure(given_up) == "mixed: it is wrong"


def test_an_error_that_is_not_ours_keeps_its_trace_without_colours() -> None:
    message = TRACE.format(name="x").replace("trimode.replicas.errors.x", "KeyError")
    told = start_status.failure(starting(message, ApplicationStatus.DEPLOY_FAILED))
    assert told is not None
    assert "line 1, in initialize" in told
    assert "\x1b" not in told


def test_a_pool_that_finds_no_room_is_a_delay() -> None:
    message = "1 replicas have taken more than 30s to be scheduled.\nResources required: GPU 8"
    assert start_status.delays(starting(message)) == ["mixed: " + message.replace("\n", " ")]
