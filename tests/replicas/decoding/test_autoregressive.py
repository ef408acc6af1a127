from typing import Any

from trimode.replicas.decoding.autoregressive import Autoregressive
from trimode.replicas.decoding.strategy import Outcome, PassKind, Position, Query, Stage


def test_a_query_is_the_known_token_and_asks_for_the_next(make_context: Any) -> None:
    query = Autoregressive(make_context()).next_query(Position(known_id=20, start=7))
    assert query == Query(Stage.DECODE, PassKind.CAUSAL, (20,), 7, (0,))


def test_the_answer_is_emitted_and_the_known_tokens_kv_kept(make_context: Any) -> None:
    strategy = Autoregressive(make_context())
    strategy.next_query(Position(20, 7))
    assert strategy.accept([30], []) == Outcome(emitted=[30], num_committed=1)
