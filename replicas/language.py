"""Language: what an engine needs a tokenizer for: grammars and stop strings."""

from pathlib import Path

from tokenizers import Tokenizer

from trimode.replicas.errors import CheckpointError
from trimode.replicas.grammar import GrammarCompiler, GrammarState
from trimode.replicas.stop_strings import StopScanner
from trimode.replicas.types import Grammar, ModelInfo


class Language:
    """One checkpoint's tokenizer, as the engine uses it."""

    def __init__(self, tokenizer_file: Path, info: ModelInfo) -> None:
        self._tokenizer = Tokenizer.from_file(str(tokenizer_file))
        self._compiler = GrammarCompiler.load(tokenizer_file, info.vocab_size, info.eos_id)

    @classmethod
    def load(cls, folder: Path, info: ModelInfo) -> "Language | None":
        """The folder's language; None without a tokenizer.json. Raises CheckpointError."""
        path = folder / "tokenizer.json"
        if not path.exists():
            return None
        try:
            return cls(path, info)
        except Exception as error:  # the libraries raise bare Exception
            raise CheckpointError(f"{path} cannot be read: {error}") from None

    def grammar(self, grammar: Grammar) -> GrammarState:
        """Raises InvalidRequest where the grammar is malformed."""
        return self._compiler.compile(grammar)

    def stop_scanner(self, stop_strings: tuple[str, ...]) -> StopScanner:
        return StopScanner(self._tokenizer, stop_strings)
