"""EngineLoop: the one thread that steps an engine, and the asyncio side that feeds it and reads
from it.
"""

import asyncio
import queue
import threading
import traceback
from collections.abc import AsyncGenerator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import structlog

from trimode.replicas.engine import Engine
from trimode.replicas.errors import RequestError, Unavailable
from trimode.replicas.grammar import GrammarState
from trimode.replicas.types import Chunk, EngineLoad, Request

logger = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _Add:
    request: Request
    grammar: GrammarState | None
    mailbox: "_Mailbox"


@dataclass(frozen=True, slots=True)
class _Abort:
    request_id: str
    mailbox: "_Mailbox"


class _Stop:
    pass


class _Mailbox:
    """Where one request's chunks arrive. Bounded by n * max_tokens: only a last one is empty."""

    def __init__(self, num_samples: int) -> None:
        self.num_samples = num_samples  # that have not finished
        self.loop = asyncio.get_running_loop()
        self.queue: asyncio.Queue[Chunk | RequestError] = asyncio.Queue()

    async def take(self) -> tuple[list[Chunk], RequestError | None]:
        """All that has arrived, at least one thing: a chunk a sample, and what ended them all."""
        chunks: dict[int, Chunk] = {}  # by sample
        item = await self.queue.get()
        while isinstance(item, Chunk):
            earlier = chunks.get(item.index)
            chunks[item.index] = item if earlier is None else earlier.then(item)
            if self.queue.empty():
                return list(chunks.values()), None
            item = self.queue.get_nowait()
        return list(chunks.values()), item


class EngineLoop:
    """Owns the engine after start(). All engine calls happen on its thread, between two steps; only
    grammars are compiled on others. It may fail from outside, while that thread hangs in a step.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._inbox: queue.SimpleQueue[_Add | _Abort | _Stop] = queue.SimpleQueue()
        self._mailboxes: dict[str, _Mailbox] = {}  # of what the engine runs; the thread's own
        self._load = engine.load()
        self._gate = threading.Lock()  # of the next three
        self._open: set[_Mailbox] = set()  # of everybody who waits for chunks
        self._closed = False
        self._failure: BaseException | None = None
        self._stopped = False  # set on the thread, by a _Stop from the inbox
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread, unless it has failed and may hang; requests still in progress get
        Unavailable.
        """
        self._inbox.put(_Stop())
        if self._thread.is_alive() and self._failure is None:
            self._thread.join()

    def fail(self, error: BaseException) -> None:
        """Refuse everybody from now on, those who wait included. From any thread, whatever the
        engine's does; the first error stays.
        """
        with self._gate:
            if self._failure is None:
                self._failure = error
        self._close()

    @property
    def load(self) -> EngineLoad:
        """As of the last step."""
        return self._load

    def check_health(self) -> None:
        """Raises RuntimeError once the engine has failed; only a restart helps then."""
        if self._failure is not None:
            raise RuntimeError(f"the engine failed: {self._failure!r}") from self._failure
        if not self._thread.is_alive():
            raise RuntimeError("the engine's thread is not running")

    async def generate(self, request: Request) -> AsyncGenerator[Chunk]:
        """The chunks of a request. Leaving the iterator early, for any reason, frees all it holds.
        A reader that is slower than the engine gets fewer and larger ones, so that it keeps up.

        Raises InvalidRequest or Overloaded before the first chunk, Unavailable where the engine
        fails or has failed.
        """
        grammar = None
        if request.grammar is not None:  # not on the engine's thread: nobody waits for it there
            grammar = await asyncio.to_thread(self._engine.compile, request)
        mailbox = _Mailbox(request.n)
        with self._gate:
            if self._closed:
                raise self._gone()
            self._open.add(mailbox)
        self._inbox.put(_Add(request, grammar, mailbox))
        left = request.n  # samples that have not finished
        try:
            while left:
                chunks, error = await mailbox.take()
                for chunk in chunks:
                    left -= chunk.finish is not None
                    yield chunk
                if error is not None and left:
                    left = 0
                    raise error
        finally:
            with self._gate:
                self._open.discard(mailbox)
            if left:
                self._inbox.put(_Abort(request.request_id, mailbox))

    def _run(self) -> None:
        try:
            while self._failure is None and self._read_inbox():
                self._deliver(self._engine.step())
                self._load = self._engine.load()
        except BaseException as error:
            self.fail(error)  # first, as whoever waits need not wait for a log
            # As text: a formatter may show what variables hold, and here they hold prompts.
            logger.error("the engine failed", traceback=traceback.format_exc())
        self._close()

    def _read_inbox(self) -> bool:
        """Take what has arrived; sleeps while there is nothing to do. False: stop."""
        while not self._stopped:
            try:
                self._take(self._inbox.get(block=not self._engine.has_work))
            except queue.Empty:
                return True
        return False

    def _take(self, message: "_Add | _Abort | _Stop") -> None:
        if isinstance(message, _Stop):
            self._stopped = True
        elif isinstance(message, _Abort):
            # Only its own: a refused request must not abort the running one whose id it had.
            if self._mailboxes.get(message.request_id) is message.mailbox:
                del self._mailboxes[message.request_id]
                self._engine.abort(message.request_id)
                self._load = self._engine.load()
        else:
            try:
                self._engine.add(message.request, message.grammar)
            except RequestError as error:
                _post([(message.mailbox, error)])
            else:
                self._mailboxes[message.request.request_id] = message.mailbox

    def _deliver(self, chunks: list[tuple[str, Chunk]]) -> None:
        letters: list[tuple[_Mailbox, Chunk | RequestError]] = []
        for request_id, chunk in chunks:
            mailbox = self._mailboxes.get(request_id)
            if mailbox is None:
                continue
            letters.append((mailbox, chunk))
            mailbox.num_samples -= chunk.finish is not None
            if mailbox.num_samples == 0:
                del self._mailboxes[request_id]
        _post(letters)

    def _close(self) -> None:
        with self._gate:
            self._closed = True
            letters = [(mailbox, self._gone()) for mailbox in self._open]
            self._open.clear()
        _post(letters)

    def _gone(self) -> Unavailable:
        """With the reason where that is no bug."""
        reason = f": {self._failure}" if isinstance(self._failure, Unavailable) else ""
        return Unavailable(f"the replica's engine has stopped{reason}")


def _post(letters: SequenceOf[tuple[_Mailbox, Chunk | RequestError]]) -> None:
    """Hand everything over with one wake-up an event loop, not one a chunk."""
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[_Mailbox, Chunk | RequestError]]] = {}
    for letter in letters:
        by_loop.setdefault(letter[0].loop, []).append(letter)
    for loop, own in by_loop.items():
        try:
            loop.call_soon_threadsafe(_put_all, own)
        except RuntimeError:  # the loop was closed: nobody is left to read
            continue


def _put_all(letters: list[tuple[_Mailbox, Chunk | RequestError]]) -> None:
    for mailbox, item in letters:
        mailbox.queue.put_nowait(item)
