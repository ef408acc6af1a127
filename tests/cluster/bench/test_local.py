"""The engine in this process."""

import pytest

from trimode.cluster.bench.local import LocalTarget, engine_config, load_encoder
from trimode.cluster.bench.metrics import Limits, Record, Summary, summarise
from trimode.cluster.bench.settings import AR
from trimode.cluster.bench.workload import (
    DEFAULT_PROMPTS,
    Load,
    Sampling,
    closed_load,
    jobs_of,
    poisson_load,
)
from trimode.replicas.engine import Engine
from trimode.replicas.errors import InvalidRequest
from trimode.replicas.model.config import BUNDLED_CHECKPOINT

GREEDY = Sampling(max_tokens=6, ignore_eos=True)
SYSTEM = "# The standard library's queue module, with its tests and its documentation.\n"


def run(engine: Engine, load: Load, name: str) -> list[Record]:
    target = LocalTarget(engine, load_encoder(BUNDLED_CHECKPOINT))
    return target.run(jobs_of(name, AR, load), min(load.concurrency, 8), lambda: None)


def summary(engine: Engine, load: Load, name: str) -> Summary:
    return summarise(run(engine, load, name), Limits())


def test_records_come_in_the_order_of_the_jobs(engine: Engine) -> None:
    load = closed_load(DEFAULT_PROMPTS, 4, 12, GREEDY)
    encode = load_encoder(BUNDLED_CHECKPOINT)
    lengths = [len(encode(ask.prompt)) for ask in load.asks]
    assert [record.prompt_tokens for record in run(engine, load, "order")] == lengths


def test_an_open_loop_sends_by_the_clock(engine: Engine) -> None:
    load = poisson_load(DEFAULT_PROMPTS, 40, 5, GREEDY)
    records = run(engine, load, "open")
    offsets = [record.sent_s - records[0].sent_s for record in records]
    wanted = [ask.arrival_s - load.asks[0].arrival_s for ask in load.asks]  # type: ignore[operator]
    assert offsets == pytest.approx(wanted)


def test_prompts_that_share_a_system_text_hit_the_prefix_cache_in_each_run_anew(
    engine: Engine,
) -> None:
    prompts = [SYSTEM + prompt for prompt in DEFAULT_PROMPTS[:4]]
    shared = closed_load(prompts, 1, 4, GREEDY)
    rates = [summary(engine, shared, f"shared {turn}").prefix_hit_rate for turn in range(2)]
    assert rates[0] == rates[1] > 0.2
    alone = closed_load(DEFAULT_PROMPTS[:4], 1, 4, GREEDY)
    assert summary(engine, alone, "alone").prefix_hit_rate == 0


def test_an_engine_has_room_for_the_heaviest_load_and_no_more() -> None:
    def encode(text: str) -> list[int]:
        return [0] * len(text)

    loads = [closed_load(["a" * 40], users, 2, Sampling(max_tokens=24)) for users in (1, 5)]
    config = engine_config(BUNDLED_CHECKPOINT, encode, loads)
    assert (config.max_sequences, config.num_pages) == (5, 5 * ((40 + 24 + 32) // 16 + 1))
    rare = poisson_load(["a"], 1.0, 3, GREEDY)
    assert engine_config(BUNDLED_CHECKPOINT, encode, [rare]).max_sequences == 3


def test_a_prompt_longer_than_the_positions_is_refused_before_an_engine_is_built() -> None:
    load = closed_load(["one " * 9000], 1, 1, GREEDY)
    with pytest.raises(InvalidRequest, match=r"'one one.*6 new ones exceed.*2048 positions"):
        engine_config(BUNDLED_CHECKPOINT, load_encoder(BUNDLED_CHECKPOINT), [load])
