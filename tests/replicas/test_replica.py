"""The Serve deployment around one engine, without Serve."""

from pathlib import Path
from typing import Any

import pytest

from trimode.replicas import loading
from trimode.replicas.config import EngineConfig
from trimode.replicas.model.config import BUNDLED_CHECKPOINT
from trimode.replicas.replica import Replica

ENGINE = EngineConfig(num_pages=64, max_sequences=2)


@pytest.mark.parametrize(
    ("settings", "governed", "profile"),
    [
        ({}, True, None),
        ({"governed": False}, False, None),
        ({"profile": Path("p.json")}, True, Path("p.json")),
    ],
)
def test_a_replica_has_a_governor_unless_told_otherwise(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], governed: bool, profile: Path | None
) -> None:
    built: list[dict[str, Any]] = []
    build = loading.build_engine

    def recorded(*args: Any, **kwargs: Any) -> Any:
        built.append(kwargs)
        return build(*args, **kwargs | {"governed": False, "profile": None})

    monkeypatch.setattr(loading, "build_engine", recorded)
    Replica(BUNDLED_CHECKPOINT, "auto", 1, ENGINE, **settings)
    assert (built[0]["governed"], built[0]["profile"]) == (governed, profile)
