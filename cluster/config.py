"""ClusterConfig: everything a cluster is made of, from one YAML. An unknown key is an error that
names it.
"""

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from trimode.replicas.config import EngineConfig, RankConfig
from trimode.replicas.errors import CheckpointError, ConfigError
from trimode.replicas.model.config import BUNDLED_CHECKPOINT
from trimode.replicas.model.source import HubModel, ModelSource
from trimode.replicas.types import Mode


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelSettings(_Settings):
    """Which checkpoint, and in which precision: a folder or a hub's model, else the bundled one.

    It is the same in every pool: the same request gets the same tokens in each, and prefixes found
    in one count in all.
    """

    path: Path | None = None  # a model folder, the same on every node
    name: str | None = None  # org/name on a hub; each node downloads it once
    revision: str | None = None  # of name, a full commit hash; None: the known one, or the head
    dtype: Literal["auto", "float16", "bfloat16", "float32"] = "auto"
    quantization: Literal["fp8"] | None = None  # of the decoder's projections

    @model_validator(mode="after")
    def _check(self) -> "ModelSettings":
        if self.path is not None and self.name is not None:
            raise ValueError("give one of path and name")
        if self.revision is not None and self.name is None:
            raise ValueError("revision belongs to a name; a path has none")
        try:
            _ = self.source
        except CheckpointError as error:
            raise ValueError(str(error)) from None
        return self

    @property
    def source(self) -> ModelSource:
        if self.name is not None:
            return HubModel(self.name, self.revision)
        return self.path if self.path is not None else BUNDLED_CHECKPOINT


class EngineSettings(_Settings):
    """Bounds of every engine; `replicas.config.EngineConfig` says what they mean."""

    page_size: int = Field(16, ge=1)
    num_pages: int | None = Field(None, ge=1)
    max_sequences: int = Field(64, ge=1)
    max_waiting: int = Field(256, ge=1)
    max_step_tokens: int = Field(2048, ge=1)
    prefix_cache: bool = True
    launch_ahead: bool | None = None
    batch_invariant: bool = False
    memory_utilization: float = Field(0.9, gt=0, le=1)
    cuda_graphs: bool = True
    graph_memory_mib: int = Field(1024, ge=1)


class PoolSettings(_Settings):
    """Replicas of one purpose and one hardware shape."""

    name: str = Field(pattern=r"^[a-z][a-z0-9-]{0,31}$")
    mode: Literal["autoregressive", "block_diffusion", "self_speculation"]
    max_block_size: int = Field(32, ge=1)  # 1 speculates nothing
    replicas: int = Field(1, ge=1)
    tensor_parallel: int = Field(1, ge=1, le=64)  # ranks that share one replica's model
    cpus: float = Field(1, gt=0)  # per rank
    gpus: float = Field(0, ge=0)  # per rank
    gpu_type: str | None = None  # as Ray names it, for example H100; None: any
    # Where Ray puts the ranks of a replica: all on one node, or spread over several.
    placement: Literal["STRICT_PACK", "PACK", "SPREAD", "STRICT_SPREAD"] = "STRICT_PACK"
    # Longest pass of several ranks before they are given up and restarted.
    step_timeout_s: float = Field(10, gt=0)
    # A governor picks the block sizes that requests leave open; none where max_block_size is 1.
    governed: bool = True
    # What `trimode calibrate` wrote on such hardware; None: each replica measures at its start.
    profile: Path | None = None

    @property
    def decoding_mode(self) -> Mode:
        return Mode(self.mode)

    @property
    def num_cpus(self) -> float:
        """Of all its replicas."""
        return self.replicas * self.tensor_parallel * self.cpus


class GatewaySettings(_Settings):
    """The gRPC front."""

    host: str = "127.0.0.1"  # loopback unless told otherwise
    port: int = Field(50051, ge=1, le=65535)
    replicas: int = Field(1, ge=1)
    max_message_bytes: int = Field(4 * 1024 * 1024, ge=1024)
    max_streams: int = Field(1024, ge=1)  # in progress in one gateway
    keepalive_s: float = Field(60, ge=1)  # between pings on an idle connection
    drain_s: float = Field(5, ge=0)  # how long running streams may go on once it is stopped
    default_max_tokens: int = Field(256, ge=1)


class RouterSettings(_Settings):
    """How AUTO requests are placed."""

    # Requests in progress per self-speculation replica from which AUTO goes to the AR pool.
    auto_concurrency: int = Field(4, ge=1)


def _without_model(pool: Any, model: Any) -> Any:
    if not isinstance(pool, dict) or "model" not in pool:
        return pool
    if pool["model"] != model:
        raise ValueError(
            f"pool {pool.get('name')}: model is {pool['model']}, the application's is "
            f"{'the bundled one' if model is None else model}; all "
            "pools of an application serve one model and share its prefixes. Deploy the other "
            "model as an application of its own, with its own gateway.port"
        )
    return {key: value for key, value in pool.items() if key != "model"}


class ClusterConfig(_Settings):
    """One model, one gateway, any number of pools."""

    model: ModelSettings = ModelSettings()
    engine: EngineSettings = EngineSettings()
    pools: tuple[PoolSettings, ...] = (
        PoolSettings(name="speculation", mode="self_speculation"),
        PoolSettings(name="autoregressive", mode="autoregressive", max_block_size=1),
    )
    gateway: GatewaySettings = GatewaySettings()
    router: RouterSettings = RouterSettings()

    @model_validator(mode="before")
    @classmethod
    def _one_model(cls, raw: Any) -> Any:
        """A pool may repeat the application's model, and not name another."""
        pools = raw.get("pools") if isinstance(raw, dict) else None
        if not isinstance(pools, list):
            return raw
        return raw | {"pools": [_without_model(pool, raw.get("model")) for pool in pools]}

    @model_validator(mode="after")
    def _check(self) -> "ClusterConfig":
        names = [pool.name for pool in self.pools]
        if not names:
            raise ValueError("pools: at least one is needed")
        if len(set(names)) < len(names):
            raise ValueError(f"pools: names must differ, got {names}")
        if "gateway" in names:
            raise ValueError("pools: the name 'gateway' is taken")
        for pool in self.pools:
            self.engine_config(pool)
            self.rank_config(pool)
        return self

    def engine_config(self, pool: PoolSettings) -> EngineConfig:
        """The engine of one pool's replicas."""
        try:
            return EngineConfig(**self.engine.model_dump(), max_block_size=pool.max_block_size)
        except ConfigError as error:
            raise ValueError(f"pool {pool.name}: {error}") from None  # for pydantic to report

    def rank_config(self, pool: PoolSettings) -> RankConfig:
        """The ranks of one pool's replicas."""
        try:
            return RankConfig(pool.tensor_parallel, pool.cpus, pool.gpus, pool.step_timeout_s)
        except ConfigError as error:
            raise ValueError(f"pool {pool.name}: {error}") from None

    @classmethod
    def load(cls, path: Path) -> "ClusterConfig":
        """Read a YAML file. Raises ConfigError that names the file and the key."""
        try:
            raw = yaml.safe_load(path.read_text()) or {}
        except (OSError, yaml.YAMLError) as error:
            raise ConfigError(f"{path} cannot be read: {error}") from None
        return cls.parse(raw, where=str(path))

    @classmethod
    def parse(cls, raw: Any, where: str = "config") -> "ClusterConfig":
        """Check a parsed document; `where` names it in errors."""
        try:
            return cls.model_validate(raw)
        except ValidationError as error:
            lines = [f"  {_told(problem)}" for problem in error.errors()]
            heading = f"{where} is not a valid configuration:"
            raise ConfigError("\n".join([heading, *lines])) from None


def _told(problem: ErrorDetails) -> str:
    """'engine.pages: unknown key'"""
    key = ".".join(map(str, problem["loc"]))
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        message = "unknown key"
    return f"{key}: {message}" if key else message
