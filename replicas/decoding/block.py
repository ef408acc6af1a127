"""Block: the token ids of one diffusion or draft block, some of them still masked."""

from collections.abc import Sequence as SequenceOf

from trimode.replicas.types import TokenLogprobs


class Block:
    """One known token followed by masks, at positions start .. start + size - 1. Not aligned to
    anything.
    """

    def __init__(self, known_id: int, start: int, size: int, mask_id: int) -> None:
        self.token_ids = [known_id] + [mask_id] * (size - 1)
        self.start = start
        self.masked = list(range(1, size))  # indices without a token, ascending
        self.logprobs: dict[int, TokenLogprobs] = {}  # by index, where they are wanted

    def fill(
        self,
        chosen: SequenceOf[int],
        token_ids: SequenceOf[int],
        logprobs: SequenceOf[TokenLogprobs] = (),
    ) -> None:
        """Put answers into the block: chosen holds indices into `masked`, token_ids and logprobs
        have one entry per masked index.
        """
        for i in chosen:
            self.token_ids[self.masked[i]] = token_ids[i]
            if logprobs:
                self.logprobs[self.masked[i]] = logprobs[i]
        taken = set(chosen)
        self.masked = [index for i, index in enumerate(self.masked) if i not in taken]

    def first_stop(self, stop_ids: frozenset[int]) -> int | None:
        """Index of the first stop token that has no mask on its left, if there is one."""
        border = self.masked[0] if self.masked else len(self.token_ids)
        for index in range(1, border):
            if self.token_ids[index] in stop_ids:
                return index
        return None
