"""Tables of loads and orders."""

from trimode.router.load_board import ReplicaLoad
from trimode.router.replica_policy import MAX_RANKED, rank_replicas


def loads(**in_flight: int) -> list[ReplicaLoad]:
    return [ReplicaLoad(name, count, None) for name, count in in_flight.items()]


def test_the_least_loaded_replica_comes_first() -> None:
    assert rank_replicas(loads(a=2, b=0, c=1), lambda _: 0.0) == ("b", "c", "a")


def test_ties_are_broken_by_the_tie_break_alone() -> None:
    order = {"a": 3.0, "b": 1.0, "c": 2.0}
    assert rank_replicas(loads(a=1, b=1, c=1), order.__getitem__) == ("b", "c", "a")


def test_no_replica_gives_an_empty_ranking() -> None:
    assert rank_replicas([], lambda _: 0.0) == ()


def test_a_ranking_is_bounded() -> None:
    many = [ReplicaLoad(str(i), i, None) for i in range(100)]
    assert len(rank_replicas(many, lambda _: 0.0)) == MAX_RANKED
