"""ServePool: a pool behind a Ray Serve handle, with Ray's errors turned into ours."""

from collections.abc import AsyncGenerator

from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle

from trimode.replicas.errors import Overloaded, RequestError, Unavailable
from trimode.replicas.types import Chunk, ModelInfo, Request


class ServePool:
    """Streams from the replica that the pool's request router picks by the request's ranking."""

    def __init__(self, name: str, handle: DeploymentHandle) -> None:
        self._name = name
        self._handle = handle
        self._streams = handle.options(stream=True)

    async def describe(self) -> ModelInfo:
        """Ask any live replica what it serves; waits until there is one."""
        info: ModelInfo = await self._handle.describe.remote()
        return info

    async def generate(self, request: Request) -> AsyncGenerator[Chunk]:
        """The chunks of a request; leaving early cancels it on the replica.

        Raises RequestError and its kinds, TimeoutError at the request's deadline.
        """
        response = self._streams.generate.remote(request)
        left = request.n  # samples that have not finished
        try:
            async for chunk in response:
                left -= chunk.finish is not None
                yield chunk
        except Exception as error:
            left = 0
            raise self._translate(error) from None
        finally:
            if left:
                response.cancel()

    def _translate(self, error: Exception) -> Exception:
        cause = error.cause if isinstance(error, RayTaskError) else error
        if isinstance(cause, RequestError | TimeoutError):
            return cause
        if isinstance(cause, BackPressureError):
            return Overloaded(f"pool {self._name}: every replica's queue is full")
        if isinstance(cause, RayActorError | RayServeException | RayError):
            return Unavailable(f"pool {self._name}: the replica is gone or not reachable")
        return error
