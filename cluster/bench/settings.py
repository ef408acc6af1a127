"""What is compared: settings, each a mode and its block size and one curve of the picture."""

from dataclasses import dataclass

from trimode.replicas.errors import ConfigError
from trimode.replicas.types import Mode


@dataclass(frozen=True, slots=True)
class Setting:
    """One curve. block_size None: the engine chooses (the governor)."""

    name: str
    mode: Mode
    block_size: int | None = None

    @property
    def is_governed(self) -> bool:
        return self.mode is Mode.SELF_SPECULATION and self.block_size is None

    @property
    def largest_block(self) -> int:
        """What an engine must be able to run for it; 2 where any block will do."""
        if self.block_size is not None:
            return self.block_size
        return 1 if self.mode in (Mode.AUTOREGRESSIVE, Mode.AUTO) else 2


AR = Setting("ar", Mode.AUTOREGRESSIVE)
GOVERNOR = Setting("governor", Mode.SELF_SPECULATION)
SPECULATION = tuple(
    Setting(f"speculation-{size}", Mode.SELF_SPECULATION, size) for size in (4, 8, 16, 32)
)
AUTO = Setting("auto", Mode.AUTO)  # a router's to resolve: only of a served cluster
ENGINE_SETTINGS = (AR, Setting("diffusion", Mode.BLOCK_DIFFUSION), *SPECULATION, GOVERNOR)
CLUSTER_SETTINGS = (*ENGINE_SETTINGS, AUTO)


def settings_named(names: str) -> tuple[Setting, ...]:
    """'ar,governor' -> those settings. Raises ConfigError that lists the known ones."""
    by_name = {setting.name: setting for setting in CLUSTER_SETTINGS}
    wanted = dict.fromkeys(name.strip() for name in names.split(","))
    for name in wanted:
        if name not in by_name:
            raise ConfigError(f"--settings: {name!r} is not one of {', '.join(by_name)}")
    return tuple(by_name[name] for name in wanted)
