"""Replica: the Serve deployment around one engine. Ray calls it; it decides nothing."""

import asyncio
import os
import time
from collections.abc import AsyncGenerator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from trimode.replicas.config import EngineConfig, RankConfig
from trimode.replicas.engine_loop import EngineLoop
from trimode.replicas.errors import Unavailable
from trimode.replicas.model.source import ModelSource
from trimode.replicas.types import Chunk, ModelInfo, Request

FAREWELL_S = 0.5  # for refusals to leave, before a group that has failed ends


class Replica:
    """One copy of the model. Every replica can run every mode up to its largest block.

    With several ranks it is rank 0, and the group is restarted whole: it ends where one is lost.
    """

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
        ranks: RankConfig | None = None,
    ) -> None:
        """quantization, governed, profile: as for build_engine. Raises CheckpointError and
        ConfigError.
        """
        self._ranks = None
        # Here and not above: whoever builds or routes to the application names this class without
        # paying for torch.
        import torch

        from trimode.replicas.loading import build_engine
        from trimode.replicas.model.hub import local_folder

        torch.set_num_threads(num_threads)
        folder = local_folder(model)
        if ranks is not None and ranks.size > 1:
            from trimode.replicas.rank_actor import WorkerOptions
            from trimode.replicas.ranks import Ranks

            workers = WorkerOptions(model, dtype, quantization, engine, num_threads)
            self._ranks = Ranks(ranks, workers, folder)
        try:
            self._engine = build_engine(
                folder,
                engine,
                dtype=dtype,
                quantization=quantization,
                governed=governed,
                profile=profile,
                peers=None if self._ranks is None else self._ranks.meet(),
            )
        except Exception as error:
            theirs = None if self._ranks is None else self._ranks.failure()
            if theirs is None:
                raise
            raise theirs from error
        self._loop = EngineLoop(self._engine)
        self._loop.start()
        if self._ranks is not None:
            self._ranks.watch(self._end)

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

    def _end(self, error: Unavailable) -> None:
        """Refuse all streams and end the process, which may hang in a pass. Serve sees that sooner
        than a failed health check, and Ray ends the other ranks with it.
        """
        self._loop.fail(error)
        time.sleep(FAREWELL_S)
        os._exit(1)

    def __del__(self) -> None:
        for part in ("_loop", "_ranks"):  # absent where the constructor failed
            owned = getattr(self, part, None)
            if owned is not None:
                owned.stop()
