"""Which checkpoint, as people name it: a local folder, or a model of a hub at one revision."""

import re
from dataclasses import dataclass
from pathlib import Path

from trimode.replicas.errors import CheckpointError

# The revisions that trimode was written for. A name that is not here needs one, or takes the head.
KNOWN_REVISIONS = {
    "nvidia/Nemotron-Labs-Diffusion-3B": "0d51902da1f8869f83413ce642fab402fa5641e0",
    "nvidia/Nemotron-Labs-Diffusion-8B": "16c67f0560b912e93e0cabb6e0c4f5c3086d95fc",
    "nvidia/Nemotron-Labs-Diffusion-14B": "f8c3e2c078e193599b8882d965b1001c456ba738",
}

_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True)
class HubModel:
    """A model of a hub. Raises CheckpointError that says what a name and a revision look like.

    revision: a full commit hash; None: the known one, or else the hub's head at the time.
    """

    name: str
    revision: str | None = None

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise CheckpointError(f"model name {self.name!r} must be of the form org/name")
        if self.revision is None:
            # A frozen dataclass has no other way to fill a field in.
            object.__setattr__(self, "revision", KNOWN_REVISIONS.get(self.name))
        elif not _COMMIT.fullmatch(self.revision):
            raise CheckpointError(
                f"model revision {self.revision!r} must be a full commit hash (40 hexadecimal "
                "digits): branches and tags move"
            )

    def __str__(self) -> str:
        return self.name if self.revision is None else f"{self.name}@{self.revision}"


# A folder, or where its contents come from.
ModelSource = Path | HubModel


def parse_source(text: str) -> ModelSource:
    """A folder, or org/name[@revision]; a folder that is there wins. Raises CheckpointError."""
    name, at, revision = text.partition("@")
    if Path(text).exists() or not _NAME.fullmatch(name):
        return Path(text)
    return HubModel(name, revision if at else None)


def label(source: ModelSource) -> str:
    """A short name to show. A snapshot in huggingface_hub's cache goes by its model's name."""
    if isinstance(source, HubModel):
        return source.name.partition("/")[2]
    folder = source.resolve()
    if folder.parent.name == "snapshots":
        return folder.parent.parent.name.rpartition("--")[2]
    return folder.name
