"""LocalModel: a model folder in this process, which answers messages as a served cluster does."""

import signal
import threading
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType

from trimode.cluster.loading_bars import loading_bars
from trimode.cluster.messages import Defaults, is_chat, to_request, to_response
from trimode.cluster.text_stream import RequestText
from trimode.cluster.tokenizer import Tokenizer
from trimode.proto import inference_pb2 as pb
from trimode.replicas.config import EngineConfig
from trimode.replicas.engine import Engine
from trimode.replicas.loading import build_engine
from trimode.replicas.model.config import ModelConfig
from trimode.replicas.model.source import label
from trimode.replicas.types import Mode, Request

PAGE_SIZE = 16


class LocalModel:
    """Tokenizer and settings at once, weights when load() is called."""

    def __init__(self, folder: Path, max_positions: int | None = None) -> None:
        """max_positions: of prompt and output together; None: the model's own limit.

        Raises CheckpointError.
        """
        self._folder = folder
        self._config = ModelConfig.load(folder)
        self._max_positions = min(
            max_positions or self._config.max_positions, self._config.max_positions
        )
        self._tokenizer = Tokenizer.load(folder, self._config.bos_id)
        self._engine: Engine | None = None

    @property
    def has_tokenizer(self) -> bool:
        return self._tokenizer is not None

    @property
    def has_chat_template(self) -> bool:
        return self._tokenizer is not None and self._tokenizer.has_chat_template

    def request(self, message: pb.GenerateRequest) -> Request:
        """A message as an engine takes it. Raises InvalidRequest."""
        defaults = Defaults(self._max_positions, self._max_positions)
        request = to_request(message, self._tokenizer, defaults, timeout_s=None)
        if request.mode is Mode.AUTO:  # a lone user is who self-speculation is for
            return replace(request, mode=Mode.SELF_SPECULATION)
        return request

    def load(
        self,
        num_positions: int | None = None,
        num_samples: int = 1,
        *,
        dtype: str,
        quantization: str | None = None,
        adapter: bool = True,
        quiet: bool = False,
    ) -> None:
        """Load the weights, with room for so many positions of as many samples. Shows progress.

        Raises CheckpointError and ConfigError.
        """
        config = self._config
        length = min(num_positions or self._max_positions, self._max_positions)
        engine_config = EngineConfig(
            page_size=PAGE_SIZE,
            num_pages=num_samples * ((length + config.block_size) // PAGE_SIZE + 1),
            max_sequences=num_samples,
            max_waiting=num_samples,
            max_block_size=config.block_size,
        )
        with loading_bars(label(self._folder), quiet=quiet) as bars:
            self._engine = build_engine(
                self._folder,
                engine_config,
                dtype=dtype,
                quantization=quantization,
                adapter=adapter,
                progress=bars.on_load,
                on_loaded=bars.on_loaded,
                on_capture=bars.on_capture,
            )

    def generate(self, message: pb.GenerateRequest) -> Generator[pb.GenerateResponse]:
        """Stream a message's replies. Closing the iterator, or ^C, frees what it holds.

        Raises InvalidRequest.
        """
        yield from self.answer(self.request(message), is_chat=is_chat(message))

    def answer(self, request: Request, *, is_chat: bool) -> Generator[pb.GenerateResponse]:
        """As generate, for a message that was converted before."""
        engine = self._engine
        assert engine is not None, "load() comes first"
        text = RequestText(self._tokenizer, request, is_chat=is_chat)
        engine.add(request)
        try:
            while engine.has_work:
                with _uninterrupted():
                    chunks = engine.step()
                for _, chunk in chunks:
                    yield to_response(request, chunk, text.push(chunk))
        finally:
            engine.abort(request.request_id)


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """^C is heard at the end: an engine cut off within a step would be of no more use."""
    if threading.current_thread() is not threading.main_thread():  # no signal comes here
        yield
        return
    heard: list[tuple[int, FrameType | None]] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: heard.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if heard and callable(before):
        before(*heard[-1])
