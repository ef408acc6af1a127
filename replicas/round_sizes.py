"""Between scheduler and governor: who starts a round, and in what company."""

from trimode.replicas.governor import Governor
from trimode.replicas.sequence import Sequence
from trimode.replicas.size_problem import Candidate, Companions


def set_block_sizes(governor: Governor, running: list[Sequence]) -> None:
    """Give every governed sequence that starts a round its block size."""
    revisits = governor.revisits()
    decoding = [s for s in running if not s.is_prefilling]
    starting = []
    for sequence in decoding:
        if not (sequence.starts_round and sequence.is_governed):
            continue
        if sequence.block_size == 1 and not revisits:
            continue
        if sequence.acceptance is None:
            sequence.acceptance = governor.new_acceptance()
        starting.append(sequence)
    if not starting:
        return
    begun = set(starting)
    others = [s for s in decoding if s not in begun]
    plain = [s for s in others if s.rows == 1]
    blocks = [s for s in others if s.rows > 1]
    prefilling = [s for s in running if s.is_prefilling]
    companions = Companions(
        autoregressive=len(plain),
        block_sequences=len(blocks),
        block_rows=sum(s.rows for s in blocks),
        block_tokens=sum(_tokens_per_pass(s) for s in blocks),
        prefill_sequences=len(prefilling),
        prefill_rows=sum(s.prefill_end - s.num_committed for s in prefilling),
        context_tokens=sum(s.num_committed for s in running)
        - sum(s.num_committed for s in starting),
    )
    candidates = [
        Candidate(
            s.acceptance, s.block_size or 0,
            s.request.max_tokens - s.num_output_tokens, s.num_committed,
        )
        for s in starting if s.acceptance is not None
    ]  # fmt: skip
    for sequence, size in zip(starting, governor.choose(candidates, companions), strict=True):
        sequence.block_size = size


def _tokens_per_pass(sequence: Sequence) -> float:
    """Of a block that is not chosen now: half of what its round is expected to keep or, where
    nothing is learnt of it (block diffusion, a pinned size), what it kept until now.
    """
    if sequence.acceptance is not None:
        return sequence.acceptance.expected(sequence.rows) / 2
    return sequence.num_output_tokens / max(1, sequence.num_forwards)
