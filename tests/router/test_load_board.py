"""What a gateway knows of its replicas."""

from trimode.replicas.types import EngineLoad
from trimode.router.load_board import LoadBoard

IDLE = EngineLoad(waiting=0, running=0, free_pages=8, total_pages=8)


def test_a_replica_that_is_no_longer_seen_is_no_longer_listed() -> None:
    board = LoadBoard()
    board.see("pool", {"a": None, "b": IDLE})
    board.see("pool", {"b": IDLE})
    assert [load.replica_id for load in board.loads("pool")] == ["b"]


def test_a_request_counts_for_its_pool_before_a_replica_took_it() -> None:
    board = LoadBoard()
    board.see("pool", {"a": IDLE})
    board.started("r1", "pool")
    assert (board.in_flight("pool"), board.loads("pool")[0].in_flight) == (1, 0)


def test_a_routed_request_counts_for_its_replica_until_it_is_finished() -> None:
    board = LoadBoard()
    board.see("pool", {"a": IDLE, "b": IDLE})
    board.started("r1", "pool")
    board.routed("r1", "b")
    assert [load.in_flight for load in board.loads("pool")] == [0, 1]
    board.finished("r1")
    assert board.num_in_flight == 0
    assert [load.in_flight for load in board.loads("pool")] == [0, 0]


def test_news_of_a_request_that_is_over_changes_nothing() -> None:
    board = LoadBoard()
    board.see("pool", {"a": IDLE})
    board.routed("late", "a")
    board.finished("unknown")
    assert board.num_in_flight == 0
    assert board.replica_of("late") is None
