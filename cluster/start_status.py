"""How far the start of an application is, from Serve's status: progress, delays, why it failed."""

import re

from ray.serve.schema import ApplicationStatus, ApplicationStatusOverview, ReplicaState

COLOUR = re.compile(r"\x1b\[\d*m")
# At the end of a trace; no replica that is tried again gets any further.
FINAL_ERROR = re.compile(
    r".*^trimode\.replicas\.errors\.(?:Checkpoint|Config)Error: (.+)", re.M | re.S
)
OWN_ERROR = re.compile(r".*^trimode\.replicas\.errors\.\w+: (.+)", re.M | re.S)


def progress(application: ApplicationStatusOverview) -> str:
    """'gateway 0/1, speculation 1/1'"""
    parts = []
    for name, deployment in application.deployments.items():
        states = deployment.replica_states
        parts.append(f"{name} {states.get(ReplicaState.RUNNING, 0)}/{sum(states.values())}")
    return ", ".join(parts) or "the application to be built"


def failure(application: ApplicationStatusOverview) -> str | None:
    """Why it will not start, in one line where the error is one of ours; else None."""
    messages = _messages(application)
    failed = application.status == ApplicationStatus.DEPLOY_FAILED
    for name, message in messages.items():
        found = (OWN_ERROR if failed else FINAL_ERROR).match(message)
        if found:
            return f"{name}: {found[1].strip()}"
    return "\n".join([application.message, *messages.values()]) if failed else None


def delays(application: ApplicationStatusOverview) -> list[str]:
    """What Serve says of deployments that take long or are tried again, each in a line."""
    said = []
    for name, message in _messages(application).items():
        if name in application.deployments:
            lines = message.strip().splitlines()
            said.append(f"{name}: {lines[-1] if 'Traceback' in message else ' '.join(lines)}")
    return said


def _messages(application: ApplicationStatusOverview) -> dict[str, str]:
    """Of the application and its deployments, where they have any."""
    said = {"application": application.message} | {
        name: deployment.message for name, deployment in application.deployments.items()
    }
    return {name: COLOUR.sub("", message) for name, message in said.items() if message.strip()}
