"""What a sequence asks of a pass, and what it takes of the answers."""

from trimode.replicas.decoding.strategy import Outcome, PassKind, Position, Query, Stage
from trimode.replicas.scheduled import Answers
from trimode.replicas.sequence import Sequence


def next_query(sequence: Sequence) -> Query:
    """What a sequence asks whose answers have all been read."""
    start = sequence.num_launched
    known_id = sequence.token_ids[start]
    return sequence.strategy.next_query(Position(known_id, start, sequence.block_size))


def prefill_query(sequence: Sequence, budget: int) -> Query:
    """The next chunk of the prefill; a prompt's last token answers the first output token."""
    start = sequence.num_launched
    end = min(sequence.prefill_end, start + budget)
    first = sequence.num_output_tokens == 0  # else it only restores what a preemption took
    answers = (end - start - 1,) if first and end == sequence.prefill_end else ()
    token_ids = sequence.token_ids[start:end]
    return Query(Stage.PREFILL, PassKind.CAUSAL, token_ids, start, answers)


def take(sequence: Sequence, query: Query, answer: Answers) -> Outcome:
    """Hand the answers to whoever asked, and count the pass."""
    if query.stage is Stage.PREFILL:
        if query.answers:  # all chunks of a prefill count as one forward
            sequence.num_forwards += 1
        return Outcome(
            answer.token_ids, num_committed=len(query.token_ids), logprobs=answer.logprobs
        )
    sequence.num_forwards += 1
    token_ids = answer.token_ids
    if query.num_candidates:
        token_ids = sequence.put_in_grammar(query, token_ids, answer.candidates)
    return sequence.strategy.accept(token_ids, answer.confidences, answer.logprobs)
