"""Language: what an engine needs a tokenizer for: stop strings."""

from pathlib import Path

from tokenizers import Tokenizer

from trimode.replicas.errors import CheckpointError, InvalidRequest
from trimode.replicas.sequence import GrammarState
from trimode.replicas.stop_strings import StopScanner
from trimode.replicas.types import Grammar


class Language:
    """One checkpoint's tokenizer, as the engine uses it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    @classmethod
    def load(cls, folder: Path) -> "Language | None":
        """The folder's language; None without a tokenizer.json. Raises CheckpointError."""
        path = folder / "tokenizer.json"
        if not path.exists():
            return None
        try:
            return cls(Tokenizer.from_file(str(path)))
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(f"{path} cannot be read: {error}") from None

    def grammar(self, grammar: Grammar) -> GrammarState:
        """Raises InvalidRequest where the grammar is malformed."""
        raise InvalidRequest("grammar", "structured output is not served yet")

    def stop_scanner(self, stop_strings: tuple[str, ...]) -> StopScanner:
        return StopScanner(self._tokenizer, stop_strings)
