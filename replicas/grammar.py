"""Which tokens a grammar allows next: compiled once a request by llguidance, asked every step."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from numpy.typing import NDArray

from trimode.replicas.errors import CheckpointError, InvalidRequest
from trimode.replicas.types import MAX_GRAMMAR_CHARS, Grammar, GrammarKind

BUILDERS: dict[GrammarKind, Callable[[str], str]] = {
    GrammarKind.JSON_SCHEMA: LLMatcher.grammar_from_json_schema,
    GrammarKind.REGEX: LLMatcher.grammar_from_regex,
    GrammarKind.LARK: LLMatcher.grammar_from_lark,
}
MAX_ERROR_CHARS = 500
# Work that one grammar may cause, in llguidance's units; a quarter of a second for the worst tried.
INITIAL_LEXER_FUEL = 200_000
STEP_LEXER_FUEL = 50_000

Mask = NDArray[np.bool_]


class GrammarCompiler:
    """Turns grammars into states for one tokenizer. Compiling is independent of other requests."""

    def __init__(self, tokenizer: LLTokenizer, vocab_size: int, eos_id: int) -> None:
        self._tokenizer = tokenizer
        self._eos_id = eos_id
        # Special tokens stand for no text; a grammar that names one (Lark can) does not get it.
        is_special = (tokenizer.is_special_token(i) for i in range(vocab_size))
        self._ordinary = ~np.fromiter(is_special, np.bool_, vocab_size)
        self._ordinary[eos_id] = True

    @classmethod
    def load(cls, tokenizer_file: Path, vocab_size: int, eos_id: int) -> "GrammarCompiler":
        """vocab_size: of the model's logits. Raises CheckpointError for a file it cannot use."""
        try:
            text = tokenizer_file.read_text(encoding="utf-8")
            tokenizer = LLTokenizer(text, n_vocab=vocab_size, eos_token=eos_id)
        except Exception as error:  # the library raises bare exceptions
            raise CheckpointError(f"{tokenizer_file} allows no grammars: {error}") from None
        return cls(tokenizer, vocab_size, eos_id)

    def compile(self, grammar: Grammar) -> "GrammarState":
        """The state before the first token. Raises InvalidRequest where the grammar is malformed,
        too large or allows no output.
        """
        if len(grammar.text) > MAX_GRAMMAR_CHARS:
            raise InvalidRequest("grammar", f"at most {MAX_GRAMMAR_CHARS} characters are allowed")
        limits = LLParserLimits(
            initial_lexer_fuel=INITIAL_LEXER_FUEL,
            step_lexer_fuel=STEP_LEXER_FUEL,
            verbose_errors=False,
        )
        try:
            text = BUILDERS[grammar.kind](grammar.text)
            matcher = LLMatcher(self._tokenizer, text, log_level=0, limits=limits)
            matcher.compute_bitmask()  # some limits are only met here
            problem = matcher.get_error() if matcher.is_error() else ""
        except Exception as error:  # whatever the library raises is this grammar's fault
            problem = str(error) or type(error).__name__
        if problem:
            raise InvalidRequest("grammar", problem.strip()[:MAX_ERROR_CHARS])
        state = GrammarState(matcher, self._ordinary, self._eos_id)
        state.masks(())
        if state.is_broken:
            raise InvalidRequest("grammar", "no output without special tokens belongs to it")
        return state


class GrammarState:
    """Where one sample stands in its grammar. The end-of-sequence token ends it."""

    def __init__(self, matcher: LLMatcher, ordinary: Mask, eos_id: int) -> None:
        self._matcher = matcher
        self._ordinary = ordinary  # [vocab_size]: what a grammar may allow at all
        self._eos_id = eos_id
        self._ended = False
        # No way to go on, or a limit of the library: only eos is allowed from then on.
        self.is_broken = False

    def copy(self) -> "GrammarState":
        """A state of its own at the same place."""
        return GrammarState(self._matcher.deep_copy(), self._ordinary, self._eos_id)

    def masks(self, drafts: Sequence[int]) -> Mask:
        """[len(drafts) + 1, vocab_size]: row i says which tokens may follow the committed ones and
        the first i drafts. Rows after a draft outside the grammar, or after eos, allow everything.
        The state stays as it was.
        """
        rows = np.ones((len(drafts) + 1, len(self._ordinary)), np.bool_)
        rows[0] = self._allowed()
        num_consumed = 0
        for i, token_id in enumerate(drafts):
            if not self._try(token_id, rows[i]):
                break
            num_consumed += 1
            rows[i + 1] = self._allowed()
        self._rollback(num_consumed)
        return rows

    def draft(self, candidates: Sequence[Sequence[int]]) -> list[int]:
        """A draft inside the grammar, at most len(candidates) long: at each position the only token
        allowed where there is just one, else the first candidate allowed. Ends where none is, and
        with eos. The state stays as it was.
        """
        drafts: list[int] = []
        num_consumed = 0
        for wanted in candidates:
            allowed = self._allowed()
            if np.count_nonzero(allowed) == 1:
                wanted = (int(allowed.argmax()),)
            token_id = next((i for i in wanted if 0 <= i < len(allowed) and allowed[i]), None)
            if token_id is None:
                break
            drafts.append(token_id)
            if not self._try(token_id, allowed):
                break
            num_consumed += 1
        self._rollback(num_consumed)
        return drafts

    def advance(self, token_ids: Sequence[int]) -> None:
        """Commit tokens. What comes after eos changes nothing; a token outside the grammar breaks
        the state.
        """
        for token_id in token_ids:
            if self._ended or self.is_broken:
                return
            if token_id == self._eos_id:
                self._ended = True
            elif not self._matcher.try_consume_tokens([token_id]):
                self.is_broken = True

    def _allowed(self) -> Mask:
        """[vocab_size]: what may come next; eos alone after the end."""
        allowed = np.zeros_like(self._ordinary)
        if not (self._ended or self.is_broken):
            bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
            words = np.unpackbits(bits, count=len(allowed), bitorder="little")
            np.logical_and(words, self._ordinary, out=allowed)
            self.is_broken = self._matcher.is_error() or not allowed.any()
        if self._ended or self.is_broken:
            allowed[self._eos_id] = True
        return allowed

    def _try(self, token_id: int, allowed: Mask) -> bool:
        """Step over a draft; False where nothing can follow it."""
        inside = 0 <= token_id < len(allowed) and bool(allowed[token_id])
        if not inside or token_id == self._eos_id:
            return False
        return bool(self._matcher.try_consume_tokens([token_id]))

    def _rollback(self, num_tokens: int) -> None:
        if num_tokens and not self._matcher.rollback(num_tokens):
            self.is_broken = True
