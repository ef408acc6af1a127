from trimode.replicas.decoding.block import Block

MASK = 3


def test_a_block_starts_with_its_known_token_and_masks() -> None:
    block = Block(known_id=20, start=7, size=4, mask_id=MASK)
    assert block.token_ids == [20, MASK, MASK, MASK]
    assert (block.start, block.masked) == (7, [1, 2, 3])


def test_a_block_of_1_has_no_mask() -> None:
    assert Block(20, 7, 1, MASK).masked == []


def test_fill_puts_each_answer_at_its_masked_place() -> None:
    block = Block(20, 7, 5, MASK)
    block.fill([1, 3], [30, 31, 32, 33])
    assert block.token_ids == [20, MASK, 31, MASK, 33]
    assert block.masked == [1, 3]
    block.fill([1], [40, 41])
    assert block.token_ids == [20, MASK, 31, 41, 33]
    assert block.masked == [1]


def test_a_stop_behind_a_mask_does_not_count_yet() -> None:
    block = Block(20, 7, 4, MASK)
    block.fill([1], [30, 9, 32])
    assert block.first_stop(frozenset({9})) is None
    block.fill([0], [30, 32])
    assert block.first_stop(frozenset({9})) == 2


def test_the_first_of_two_stops_counts() -> None:
    block = Block(20, 7, 4, MASK)
    block.fill([0, 1, 2], [30, 9, 8])
    assert block.first_stop(frozenset({8, 9})) == 2


def test_the_known_token_is_no_stop() -> None:
    block = Block(9, 7, 3, MASK)
    block.fill([0, 1], [30, 31])
    assert block.first_stop(frozenset({9})) is None
