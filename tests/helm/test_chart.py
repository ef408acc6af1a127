"""The chart lints, renders, and carries a configuration that the application accepts."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from trimode.cluster.config import ClusterConfig

ROOT = Path(__file__).parents[2]
HELM = shutil.which("helm", path=str(Path(sys.executable).parent))

pytestmark = pytest.mark.skipif(HELM is None, reason="needs the helm_binary package")


def helm(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(HELM), *arguments], capture_output=True, text=True, check=False, cwd=ROOT
    )


def test_the_chart_passes_helm_lint() -> None:
    assert helm("lint", "--strict", "helm").returncode == 0


def test_the_default_configuration_is_one_that_serve_accepts() -> None:
    rendered = helm("template", "release", "helm").stdout
    (config_map,) = [document for document in yaml.safe_load_all(rendered) if document]
    config = ClusterConfig.parse(yaml.safe_load(config_map["data"]["cluster.yaml"]))
    # What `trimode serve` starts without a file, but reachable from outside the pod.
    assert config.model_copy(update={"gateway": ClusterConfig().gateway}) == ClusterConfig()
    assert config.gateway.host == "0.0.0.0"


def test_an_unknown_value_is_refused_by_name() -> None:
    result = helm("template", "release", "helm", "--set", "replicaCont=3")
    assert result.returncode != 0
    assert "replicaCont" in result.stderr
