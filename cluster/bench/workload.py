"""What a benchmark asks: prompts, settings (a mode and its block size), and when each is asked."""

import json
import random
from dataclasses import dataclass
from pathlib import Path

from trimode.replicas.errors import ConfigError, InvalidRequest
from trimode.replicas.types import Mode

# Two of each domain that the bundled checkpoint was trained on: code, tests, prose, tables.
DEFAULT_PROMPTS = (
    "class Queue:\n    def __init__(self, maxsize=0):\n        self.maxsize = maxsize\n",
    "import os\nimport sys\n\ndef main():\n    if len(sys.argv) != 2:\n",
    "class TestParser(unittest.TestCase):\n    def test_empty(self):\n        self.assertEqual(",
    "    def test_repr(self):\n        self.assertRaises(TypeError, ",
    "To the Senate and House of Representatives: In my last annual message I",
    "The expenditures of the Government for the fiscal year ending June 30",
    "### Codec APIs\n\nclass Codec(codecs.Codec):\n\n    def encode(self,input,errors='strict'):\n",
    "    '\\x00'     #  0x00 -> NULL\n    '\\x01'     #  0x01 -> START OF HEADING\n",
)


@dataclass(frozen=True, slots=True)
class Setting:
    """One curve of the picture. block_size None: the engine chooses (the governor)."""

    name: str
    mode: Mode
    block_size: int | None = None

    @property
    def is_governed(self) -> bool:
        return self.mode is Mode.SELF_SPECULATION and self.block_size is None


SETTINGS = (
    Setting("ar", Mode.AUTOREGRESSIVE),
    Setting("diffusion", Mode.BLOCK_DIFFUSION),
    *(Setting(f"speculation-{size}", Mode.SELF_SPECULATION, size) for size in (4, 8, 16, 32)),
    Setting("governor", Mode.SELF_SPECULATION),
)


@dataclass(frozen=True, slots=True)
class Job:
    """One request to send. arrival_s: after the start of its run; 0 in a closed loop."""

    job_id: str
    prompt: str
    setting: Setting
    max_tokens: int
    temperature: float
    seed: int
    cache_salt: str
    arrival_s: float = 0.0


def settings_named(names: str) -> tuple[Setting, ...]:
    """'ar,governor' -> those settings. Raises ConfigError that lists the known ones."""
    by_name = {setting.name: setting for setting in SETTINGS}
    wanted = [name.strip() for name in names.split(",")]
    for name in wanted:
        if name not in by_name:
            raise ConfigError(f"--settings: {name!r} is not one of {', '.join(by_name)}")
    return tuple(by_name[name] for name in wanted)


def load_prompts(path: Path | None) -> tuple[str, ...]:
    """One prompt a line; in a .jsonl file each line is a string or {"prompt": string}.

    Raises InvalidRequest that names the line.
    """
    if path is None:
        return DEFAULT_PROMPTS
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest("prompts", f"{path} cannot be read: {error}") from None
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise InvalidRequest("prompts", f"{path} holds none")
    if path.suffix != ".jsonl":
        return tuple(line for _, line in numbered)
    return tuple(_parse(line, f"{path}:{number}") for number, line in numbered)


def _parse(line: str, where: str) -> str:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise InvalidRequest("prompts", f"{where}: {error}") from None
    prompt = value.get("prompt") if isinstance(value, dict) else value
    if not isinstance(prompt, str) or not prompt:
        raise InvalidRequest("prompts", f'{where} must be a string or {{"prompt": string}}')
    return prompt


def poisson_arrivals(rate: float, count: int, seed: int) -> list[float]:
    """Seconds at which `count` independent users arrive, `rate` a second on average, ascending."""
    noise, now, arrivals = random.Random(seed), 0.0, []
    for _ in range(count):
        now += noise.expovariate(rate)
        arrivals.append(now)
    return arrivals
