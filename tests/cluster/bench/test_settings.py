"""Settings by name."""

import pytest

from trimode.cluster.bench.settings import AR, AUTO, ENGINE_SETTINGS, settings_named
from trimode.replicas.errors import ConfigError


def test_settings_are_named_once_in_the_order_given() -> None:
    assert settings_named("auto, ar,auto") == (AUTO, AR)


def test_an_unknown_setting_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="'fast' is not one of ar, diffusion"):
        settings_named("ar,fast")


def test_only_the_governor_leaves_the_block_size_open() -> None:
    assert [setting.name for setting in ENGINE_SETTINGS if setting.is_governed] == ["governor"]
