"""Replica: the Serve deployment around one engine. Ray calls it; it decides nothing."""

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from trimode.replicas.config import EngineConfig
from trimode.replicas.engine_loop import EngineLoop
from trimode.replicas.model.source import ModelSource
from trimode.replicas.types import Chunk, ModelInfo, Request


class Replica:
    """One copy of the model. Every replica can run every mode up to its largest block."""

    def __init__(
        self,
        model: ModelSource,
        dtype: str,
        num_threads: int,
        engine: EngineConfig,
        *,
        quantization: str | None = None,
        governed: bool = True,
        profile: Path | None = None,
    ) -> None:
        """quantization, governed, profile: as for build_engine. Raises CheckpointError and
        ConfigError.
        """
        # Here and not above: whoever builds or routes to the application names this class without
        # paying for torch.
        import torch

        from trimode.replicas.loading import build_engine
        from trimode.replicas.model.hub import local_folder

        torch.set_num_threads(num_threads)
        self._engine = build_engine(
            local_folder(model),
            engine,
            dtype=dtype,
            quantization=quantization,
            governed=governed,
            profile=profile,
        )
        self._loop = EngineLoop(self._engine)
        self._loop.start()

    async def generate(self, request: Request) -> AsyncGenerator[Chunk]:
        """The chunks of a request; a caller that goes away frees all it holds.

        Raises InvalidRequest or Overloaded before the first chunk, TimeoutError at its deadline.
        """
        async with asyncio.timeout(request.timeout_s):
            async for chunk in self._loop.generate(request):
                yield chunk

    async def describe(self) -> ModelInfo:
        """What this replica serves."""
        return self._engine.info

    def record_routing_stats(self) -> dict[str, Any]:
        """How busy the engine is; Serve carries it to every gateway's request router."""
        return asdict(self._loop.load)

    def check_health(self) -> None:
        """Serve's health check: raises once the engine has failed, so that Serve replaces the
        replica.
        """
        self._loop.check_health()

    def __del__(self) -> None:
        loop = getattr(self, "_loop", None)  # absent where the constructor failed
        if loop is not None:
            loop.stop()
