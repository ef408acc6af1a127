"""transformers answers as our autoregressive decoding does."""

from trimode.cluster.bench.local import LocalTarget, engine_config, load_encoder
from trimode.cluster.bench.settings import AR
from trimode.cluster.bench.transformers_baseline import TransformersTarget
from trimode.cluster.bench.workload import DEFAULT_PROMPTS, Sampling, closed_load, jobs_of
from trimode.replicas.loading import build_engine
from trimode.replicas.model.config import BUNDLED_CHECKPOINT


def test_the_greedy_ids_are_ours_and_end_at_max_tokens_only() -> None:
    load = closed_load(DEFAULT_PROMPTS[:2], 1, 2, Sampling(max_tokens=12, ignore_eos=True))
    encode = load_encoder(BUNDLED_CHECKPOINT)
    engine = build_engine(
        BUNDLED_CHECKPOINT, engine_config(BUNDLED_CHECKPOINT, encode, [load]), dtype="float32"
    )
    jobs, done = jobs_of("run", AR, load), []
    ours = LocalTarget(engine, encode).run(jobs, 1, lambda: None)
    target = TransformersTarget(BUNDLED_CHECKPOINT, "float32", encode)
    theirs = target.run(jobs, 1, lambda: done.append(1))
    assert [record.token_ids for record in theirs] == [record.token_ids for record in ours]
    assert [record.tokens for record in theirs] == [12, 12]
    assert [record.prompt_tokens for record in theirs] == [record.prompt_tokens for record in ours]
    assert len(done) == 2
    assert target.attention == "sdpa"
