import re
from pathlib import Path

import pytest

from trimode.replicas.errors import CheckpointError
from trimode.replicas.model.source import HubModel, label, parse_source

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("size", "revision"),
    [
        ("3B", "0d51902da1f8869f83413ce642fab402fa5641e0"),
        ("8B", "16c67f0560b912e93e0cabb6e0c4f5c3086d95fc"),
        ("14B", "f8c3e2c078e193599b8882d965b1001c456ba738"),
    ],
)
def test_the_known_models_are_pinned(size: str, revision: str) -> None:
    name = f"nvidia/Nemotron-Labs-Diffusion-{size}"
    assert parse_source(name) == HubModel(name, revision)
    assert parse_source(f"{name}@{COMMIT}") == HubModel(name, COMMIT)
    assert HubModel(f"{name}-Base").revision is None


@pytest.mark.parametrize("text", ["/models/8B", "./models/8B", "8B", "a/b/c", "../8B", "~/8B@x"])
def test_what_does_not_look_like_a_name_is_a_folder(text: str) -> None:
    assert parse_source(text) == Path(text)


def test_a_folder_that_is_there_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert isinstance(parse_source("org/model"), HubModel)
    (tmp_path / "org" / "model").mkdir(parents=True)
    assert parse_source("org/model") == Path("org/model")


@pytest.mark.parametrize("revision", ["main", "v1", COMMIT[:12], COMMIT.upper(), ""])
def test_a_revision_is_a_full_commit_hash(revision: str) -> None:
    with pytest.raises(
        CheckpointError, match=rf"{re.escape(repr(revision))} must be a full commit"
    ):
        parse_source(f"org/model@{revision}")


@pytest.mark.parametrize("name", ["model", "a/b/c", "org/", "/model", "org/-x", "org/mo del", ""])
def test_a_name_has_an_organisation_and_a_model(name: str) -> None:
    with pytest.raises(CheckpointError, match="org/name"):
        HubModel(name)


def test_labels_are_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert label(Path(".")) == tmp_path.name
    assert label(HubModel("org/model")) == "model"
    assert label(tmp_path / "hub/models--org--model/snapshots" / COMMIT) == "model"


def test_a_model_reads_as_one_would_type_it() -> None:
    assert str(HubModel("org/model")) == "org/model"
    assert str(HubModel("org/model", COMMIT)) == f"org/model@{COMMIT}"
