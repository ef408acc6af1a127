import pytest

from trimode.replicas.config import EngineConfig
from trimode.replicas.errors import ConfigError


@pytest.mark.parametrize("name", sorted({*EngineConfig.__slots__} - {"prefix_cache"}))
@pytest.mark.parametrize("value", [0, -1])
def test_a_setting_below_1_is_refused_by_name(name: str, value: int) -> None:
    with pytest.raises(ConfigError, match=rf"engine\.{name} must be at least 1, is {value}"):
        EngineConfig(**{name: value})


def test_a_block_must_fit_into_a_pass_beside_a_prefill() -> None:
    with pytest.raises(ConfigError, match=r"max_step_tokens is 41; blocks of 32.* at least 42"):
        EngineConfig(max_step_tokens=41)


@pytest.mark.parametrize("block_size", range(1, 40))
def test_the_least_that_the_error_names_works_and_leaves_prefill_its_share(block_size: int) -> None:
    with pytest.raises(ConfigError) as caught:
        EngineConfig(max_block_size=block_size, max_step_tokens=1)
    least = int(str(caught.value).rsplit(" ", 1)[1])
    config = EngineConfig(max_block_size=block_size, max_step_tokens=least)
    assert config.decode_tokens >= block_size
    assert config.prefill_tokens >= 1


def test_prefill_is_left_a_quarter_of_a_pass() -> None:
    config = EngineConfig(max_step_tokens=100)
    assert (config.prefill_tokens, config.decode_tokens) == (25, 75)
