"""One YAML makes a cluster; a mistake in it is named."""

from pathlib import Path

import pytest

from trimode.cluster.config import ClusterConfig
from trimode.replicas.errors import ConfigError
from trimode.replicas.model.config import BUNDLED_CHECKPOINT
from trimode.replicas.model.source import HubModel


def test_an_empty_document_is_the_default_cluster() -> None:
    config = ClusterConfig.parse({})
    assert [(pool.mode, pool.max_block_size) for pool in config.pools] == [
        ("self_speculation", 32),
        ("autoregressive", 1),
    ]


def test_the_gateway_listens_on_loopback_unless_told_otherwise() -> None:
    assert ClusterConfig.parse({}).gateway.host == "127.0.0.1"


AR = {"name": "a", "mode": "autoregressive"}
EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"


@pytest.mark.parametrize(
    ("document", "named"),
    [
        ({"gatway": {}}, "gatway"),
        ({"gateway": {"prot": 1}}, "gateway.prot"),
        ({"gateway": {"port": 70000}}, "gateway.port"),
        ({"pools": []}, "pools"),
        ({"pools": [{"name": "Bad Name", "mode": "autoregressive"}]}, "pools.0.name"),
        ({"pools": [{"name": "a", "mode": "telepathy"}]}, "pools.0.mode"),
        ({"pools": [{"name": "a", "mode": "autoregressive"}] * 2}, "names must differ"),
        ({"pools": [{"name": "gateway", "mode": "autoregressive"}]}, "'gateway' is taken"),
        (
            {"pools": [{"name": "a", "mode": "autoregressive", "governed": "perhaps"}]},
            "pools.0.governed",
        ),
        ({"engine": {"max_step_tokens": 16}}, "engine.max_step_tokens is 16"),
        ({"model": {"path": "/m", "name": "a/b"}}, "model: .*one of path and name"),
        ({"model": {"path": "/m", "revision": "0" * 40}}, "model: .*revision belongs to a name"),
        ({"model": {"name": "a"}}, "model: .*'a' must be of the form org/name"),
        ({"model": {"name": "a/b", "revision": "main"}}, "model: .*'main' must be a full commit"),
        ({"model": {"quantization": "int3"}}, "model.quantization"),
        ([], "not a valid configuration"),
        ({"pools": [AR | {"tensor_parallel": 0}]}, "pools.0.tensor_parallel"),
        ({"pools": [AR | {"tensor_parallel": 2, "gpus": 0.5}]}, "pool a: gpus is 0.5; .* own"),
        ({"pools": [AR | {"placement": "TIGHT"}]}, "pools.0.placement"),
        ({"pools": [AR | {"step_timeout_s": 0}]}, "pools.0.step_timeout_s"),
    ],
)
def test_a_mistake_is_named(document: object, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        ClusterConfig.parse(document)


def test_a_model_is_a_folder_or_a_name_of_a_hub_or_the_bundled_one() -> None:
    def source(**model: str) -> object:
        return ClusterConfig.parse({"model": model}).model.source

    assert source() == BUNDLED_CHECKPOINT
    assert source(path="/models/8b") == Path("/models/8b")
    assert source(name="org/model", revision="0" * 40) == HubModel("org/model", "0" * 40)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml"):
        ClusterConfig.load(tmp_path / "absent.yaml")


def test_a_file_that_is_not_yaml_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken.yaml").write_text("pools: [")
    with pytest.raises(ConfigError, match=r"broken\.yaml"):
        ClusterConfig.load(tmp_path / "broken.yaml")


def test_a_pool_bounds_its_engines_by_its_own_largest_block() -> None:
    config = ClusterConfig.parse({})
    assert [config.engine_config(pool).max_block_size for pool in config.pools] == [32, 1]


def test_a_configuration_survives_the_way_through_serve() -> None:
    pool = {"name": "a", "mode": "self_speculation", "governed": False, "profile": "p.json"}
    config = ClusterConfig.parse(
        {"model": {"path": "/models/8b"}, "gateway": {"port": 1234}, "pools": [pool]}
    )
    assert ClusterConfig.parse(config.model_dump(mode="json")) == config


def test_a_pool_of_another_model_is_refused_with_the_way_out() -> None:
    document = {"model": {"path": "/models/14b"}, "pools": [AR | {"model": {"path": "/models/8b"}}]}
    with pytest.raises(ConfigError) as caught:
        ClusterConfig.parse(document)
    message = str(caught.value)
    for part in ("pool a", "/models/8b", "/models/14b", "application of its own"):
        assert part in message


def test_a_pool_may_repeat_the_applications_model() -> None:
    model = {"path": "/models/14b"}
    repeated = ClusterConfig.parse({"model": model, "pools": [AR | {"model": model}]})
    assert repeated == ClusterConfig.parse({"model": model, "pools": [AR]})


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_example_is_a_valid_configuration(path: Path) -> None:
    config = ClusterConfig.load(path)
    assert config.model.path is not None
    assert all(pool.gpus == 1 for pool in config.pools)


def test_the_examples_are_those_that_the_documentation_names() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.yaml")} == {
        "8b-one-gpu",
        "14b-tp2",
        "14b-tp4",
        "14b-two-shapes",
    }


def test_what_makes_tokens_the_same_everywhere_is_set_once_for_all_pools() -> None:
    config = ClusterConfig.parse(
        {"model": {"quantization": "fp8"}, "engine": {"batch_invariant": True}}
    )
    assert config.model.quantization == "fp8"
    assert all(config.engine_config(pool).batch_invariant for pool in config.pools)
    with pytest.raises(ConfigError, match=r"pools\.0\.quantization"):
        ClusterConfig.parse(
            {"pools": [{"name": "a", "mode": "autoregressive", "quantization": "fp8"}]}
        )
