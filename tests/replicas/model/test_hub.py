"""Downloads from a hub on the loopback interface, through the real client library."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from trimode.replicas.errors import CheckpointError
from trimode.replicas.model.hub import Hub, local_folder, pin
from trimode.replicas.model.source import HubModel

NAME = "org/model"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
MODEL = HubModel(NAME, COMMIT)
WEIGHTS = bytes(range(256)) * 40
NOBODY = "http://127.0.0.1:9"  # the discard port: refused at once


@pytest.fixture
def hub(loopback_hub: Any, tmp_path: Path) -> Hub:
    loopback_hub.publish(
        {
            "config.json": b'{"hidden_size": 32}',
            "chat_template.jinja": b"{{ messages }}",
            "model.safetensors": WEIGHTS,
            "linear_spec_lora/adapter_config.json": b"{}",
            "linear_spec_lora/adapter_model.safetensors": WEIGHTS[:1000],
            "modeling.py": b"import os",
            "pytorch_model.bin": b"a pickle",
        }
    )
    return Hub(loopback_hub.endpoint, tmp_path / "cache")


def down(hub: Hub) -> Hub:
    """The same cache, and no hub."""
    return Hub(NOBODY, hub.cache)


def names(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def fails(model: HubModel, hub: Hub, *parts: str) -> None:
    pattern = "(?s)" + ".*".join(re.escape(part) for part in parts)
    with pytest.raises(CheckpointError, match=pattern):
        local_folder(model, hub=hub)


def test_a_folder_is_its_own_source(tmp_path: Path) -> None:
    assert local_folder(tmp_path) == tmp_path


def test_a_model_comes_whole_and_without_code_or_pickle(hub: Hub) -> None:
    folder = local_folder(MODEL, hub=hub)
    assert names(folder) == [
        "chat_template.jinja",
        "config.json",
        "linear_spec_lora/adapter_config.json",
        "linear_spec_lora/adapter_model.safetensors",
        "model.safetensors",
    ]
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS


def test_who_needs_no_weights_gets_none(hub: Hub) -> None:
    folder = local_folder(MODEL, weights=False, hub=hub)
    assert "config.json" in names(folder)
    assert not any(name.endswith("safetensors") for name in names(folder))
    assert "model.safetensors" in names(local_folder(MODEL, hub=hub))


def test_progress_is_told_of_the_download_and_of_the_check(hub: Hub) -> None:
    told: list[tuple[str, int, int]] = []
    folder = local_folder(MODEL, hub=hub, report=lambda *step: told.append(step))
    total = sum((folder / name).stat().st_size for name in names(folder))
    assert told[-1] == ("checking", total, total)
    downloads = [step[1:] for step in told if step[0] == "downloading"]
    assert downloads[-1] == (total, total)


def test_a_second_start_asks_the_hub_nothing(hub: Hub, loopback_hub: Any) -> None:
    first = local_folder(MODEL, hub=hub)
    loopback_hub.requests.clear()
    assert local_folder(MODEL, hub=hub) == first
    assert loopback_hub.requests == []


def test_a_checked_model_needs_no_hub(hub: Hub) -> None:
    folder = local_folder(MODEL, hub=hub)
    with capture_logs() as logs:
        assert local_folder(MODEL, hub=down(hub)) == folder
    assert logs == []


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_damaged_file_is_refused_and_removed(hub: Hub, loopback_hub: Any, name: str) -> None:
    good = loopback_hub.files[name]
    loopback_hub.files[name] = bytes([good[0] ^ 1]) + good[1:]
    fails(MODEL, hub, name, "was damaged", "removed", "start again")
    assert not list(hub.cache.rglob(f"snapshots/*/{name}"))  # type: ignore[union-attr]
    loopback_hub.files[name] = good
    assert (local_folder(MODEL, hub=hub) / name).read_bytes() == good


def test_a_file_that_changes_after_its_check_is_checked_again(hub: Hub) -> None:
    path = local_folder(MODEL, hub=hub) / "model.safetensors"
    path.resolve().write_bytes(WEIGHTS[:-1] + b"x")
    fails(MODEL, hub, "model.safetensors", "was damaged")


def test_a_model_that_was_never_checked_is_served_with_a_warning_when_the_hub_is_down(
    hub: Hub,
) -> None:
    folder = local_folder(MODEL, hub=hub)
    (folder.parent.parent / "checked" / f"{COMMIT}.json").unlink()
    with capture_logs() as logs:
        assert local_folder(MODEL, hub=down(hub)) == folder
    assert [log["event"] for log in logs] == ["model files could not be checked against the hub"]


def test_a_cache_that_cannot_be_written_only_costs_the_note(hub: Hub, tmp_path: Path) -> None:
    folder = local_folder(MODEL, hub=hub)
    note = folder.parent.parent / "checked" / f"{COMMIT}.json"
    note.unlink()
    note.mkdir()
    with capture_logs() as logs:
        assert local_folder(MODEL, hub=hub) == folder
    assert ["cannot be noted" in log["event"] for log in logs] == [True]


def test_a_hub_that_is_down_says_how_to_do_without(hub: Hub) -> None:
    fails(
        MODEL,
        down(hub),
        f"{NAME}@{COMMIT}",
        "cannot be had from the hub",
        f"hf download {NAME}",
        "path",
    )


def test_half_a_model_is_not_served_when_the_hub_is_down(hub: Hub) -> None:
    local_folder(MODEL, weights=False, hub=hub)
    fails(MODEL, down(hub), "not in the cache")


def test_a_model_that_is_not_there_is_named(hub: Hub) -> None:
    fails(HubModel("org/other", COMMIT), hub, "org/other", "no model of that name", "HF_TOKEN")


def test_a_revision_that_is_not_there_is_named(hub: Hub) -> None:
    fails(HubModel(NAME, "f" * 40), hub, f"{NAME}@{'f' * 40}", "no such revision")


def test_an_unpinned_model_takes_the_head_and_says_how_to_pin_it(hub: Hub) -> None:
    with capture_logs() as logs:
        assert pin(HubModel(NAME), hub) == MODEL
    assert [log["pin"] for log in logs] == [f"{NAME}@{COMMIT}"]


def test_an_unpinned_model_can_be_had_at_once(hub: Hub) -> None:
    assert local_folder(HubModel(NAME), hub=hub).name == COMMIT


def test_the_head_of_a_hub_that_is_down_is_the_one_seen_last(hub: Hub) -> None:
    with pytest.raises(CheckpointError, match="cannot be had from the hub"):
        pin(HubModel(NAME), down(hub))
    pin(HubModel(NAME), hub)
    assert pin(HubModel(NAME), down(hub)) == MODEL


def test_what_is_pinned_or_a_folder_needs_no_hub(hub: Hub, tmp_path: Path) -> None:
    assert pin(MODEL, down(hub)) == MODEL
    assert pin(tmp_path, down(hub)) == tmp_path


def run_elsewhere(cache: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Get the model in another process, told by its environment alone where the hub is."""
    code = (
        "from trimode.replicas.model.hub import local_folder\n"
        "from trimode.replicas.model.source import parse_source\n"
        f"print(local_folder(parse_source('{NAME}@{COMMIT}')))\n"
    )
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"HF_HOME": str(cache)} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_environment_names_hub_and_cache_and_forbids_to_ask(hub: Hub, tmp_path: Path) -> None:
    assert hub.endpoint is not None
    offline = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "1"}
    refused = run_elsewhere(tmp_path, **offline)
    assert refused.returncode == 1
    assert "cannot be had from the hub (OfflineModeIsEnabled" in refused.stderr
    done = run_elsewhere(tmp_path, HF_ENDPOINT=hub.endpoint)
    assert done.stdout.strip() == str(tmp_path / "hub/models--org--model/snapshots" / COMMIT)
    again = run_elsewhere(tmp_path, **offline)
    assert (again.returncode, again.stdout) == (0, done.stdout)
