"""Gateway: the Serve deployment that faces clients. It wires the pieces of one gateway and owns its
server.
"""

import asyncio

from ray.serve.handle import DeploymentHandle

from trimode.cluster.config import ClusterConfig
from trimode.cluster.dispatcher import Dispatcher
from trimode.cluster.grpc_server import GrpcServer, InferenceServicer
from trimode.cluster.messages import MODE_MESSAGES, Defaults
from trimode.cluster.serve_pool import ServePool
from trimode.cluster.tokenizer import Tokenizer
from trimode.proto import inference_pb2 as pb
from trimode.replicas.model.config import ModelConfig
from trimode.replicas.model.hub import local_folder
from trimode.replicas.model.source import ModelSource, label
from trimode.router.load_board import LoadBoard
from trimode.router.mode_policy import PoolView


class Gateway:
    """Runs its own gRPC server; Serve hears of its streams by record_autoscaling_stats."""

    async def __init__(  # type: ignore[misc] # Serve awaits constructors
        self, config: ClusterConfig, source: ModelSource, handles: dict[str, DeploymentHandle]
    ) -> None:
        self._config = config
        self.load_board = LoadBoard()  # the request routers of this process find it by this name
        self._source = source
        folder = local_folder(source, weights=False)
        self._model = ModelConfig.load(folder)
        self._tokenizer = Tokenizer.load(folder, self._model.bos_id)
        pools = {name: ServePool(name, handle) for name, handle in handles.items()}
        self._dispatcher = Dispatcher(
            pools,
            config.pools,
            self.load_board,
            auto_concurrency=config.router.auto_concurrency,
            max_streams=config.gateway.max_streams,
        )
        defaults = Defaults(config.gateway.default_max_tokens, self._model.max_positions)
        servicer = InferenceServicer(
            self._dispatcher, self._tokenizer, defaults, self._describe_model
        )
        self._server = GrpcServer(config.gateway, servicer)
        await self._server.start()
        infos = await asyncio.gather(*(pool.describe() for pool in pools.values()))
        self._info = infos[0]
        await self._server.serve()

    def record_autoscaling_stats(self) -> dict[str, float]:
        """For Serve's autoscaler, which does not see calls to our own server."""
        return {"in_flight_streams": float(self.load_board.num_in_flight)}

    async def drain(self) -> None:
        """Stop taking calls and wait for the running ones, at most gateway.drain_s."""
        await self._server.stop()

    async def __del__(self) -> None:
        if hasattr(self, "_server"):  # absent where the constructor failed
            await self._server.stop()

    def _describe_model(self) -> pb.GetModelResponse:
        model, info = self._model, self._info
        return pb.GetModelResponse(
            name=label(self._source),
            vocab_size=model.vocab_size,
            max_positions=model.max_positions,
            block_size=model.block_size,
            eos_token_id=model.eos_id,
            has_tokenizer=self._tokenizer is not None,
            has_chat_template=self._tokenizer is not None and self._tokenizer.has_chat_template,
            has_draft_adapter=info.has_draft_adapter,
            dtype=info.dtype,
            quantization=info.quantization or "",
            pools=[self._describe_pool(view) for view in self._dispatcher.views()],
        )

    def _describe_pool(self, view: PoolView) -> pb.Pool:
        engines = [load.engine for load in self.load_board.loads(view.name) if load.engine]
        return pb.Pool(
            name=view.name,
            mode=MODE_MESSAGES[view.mode],
            max_block_size=view.max_block_size,
            replicas=view.num_replicas,
            in_flight=view.in_flight,
            running=sum(engine.running for engine in engines),
            waiting=sum(engine.waiting for engine in engines),
            free_pages=sum(engine.free_pages for engine in engines),
            total_pages=sum(engine.total_pages for engine in engines),
        )
