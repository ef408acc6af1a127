"""Two and four ranks over gloo write what one rank writes, whatever is asked.

In float64, where the order of a sum does not decide between two ids. The ranks are threads of this
process, each with its own end of the group; tests/replicas/test_ranks.py has them in processes.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tokenizers import Tokenizer

from trimode.kernels.activation import silu_mul_triton
from trimode.kernels.draft_adapter import add_draft_adapter_triton
from trimode.kernels.norm import add_rms_norm_triton
from trimode.kernels.paged_attention import paged_attention_triton
from trimode.kernels.rope import rotate_and_write_triton
from trimode.replicas import rank_runner
from trimode.replicas.config import EngineConfig
from trimode.replicas.distributed_group import DistributedGroup
from trimode.replicas.engine import Engine
from trimode.replicas.language import Language
from trimode.replicas.loading import load_model
from trimode.replicas.model import layers
from trimode.replicas.model.config import BUNDLED_CHECKPOINT
from trimode.replicas.model.parallel import Group
from trimode.replicas.model.transformer import NemotronLabsDiffusionModel
from trimode.replicas.model_runner import TorchModelRunner
from trimode.replicas.rank_runner import RankRunner
from trimode.replicas.step_channel import StepListener, StepReceiver, new_secret
from trimode.replicas.tensor_parallel import StepClock, TensorParallelRunner
from trimode.replicas.types import Grammar, GrammarKind, Mode, Priority, Request, ThinkingBudget
from trimode.replicas.worker import Worker

AR, DIFFUSION, SPECULATION = Mode.AUTOREGRESSIVE, Mode.BLOCK_DIFFUSION, Mode.SELF_SPECULATION
HOST, TIMEOUT_S = "127.0.0.1", 30.0

Models = list[NemotronLabsDiffusionModel]


def together(size: int, part: Callable[[int], Any]) -> list[Any]:
    """What part(rank) returns on each rank, all at once."""
    results: list[Any] = [None] * size

    def run(rank: int) -> None:
        results[rank] = part(rank)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def groups_of(size: int, **settings: Any) -> list[Group]:
    store = dist.HashStore()
    cpu = torch.device("cpu")

    def join(rank: int) -> Group:
        return DistributedGroup(store, rank, size, cpu, timeout_s=TIMEOUT_S, **settings)

    return together(size, join)


def shard_of(full: NemotronLabsDiffusionModel, group: Group) -> NemotronLabsDiffusionModel:
    """One rank's part of a model, its draft adapter included."""
    model = NemotronLabsDiffusionModel(full.config, group)
    adapter = full.encoder.layers[0].self_attn.draft_adapter
    rank = len(adapter.lora_a)
    model.add_draft_adapter(rank, adapter.scale * rank)
    model = model.to(full.diffusion_head.weight.dtype).eval().requires_grad_(False)
    whole = full.published_tensors() | full.published_adapter_tensors()
    for name, target in (model.targets() | model.adapter_targets()).items():
        source, part = whole[name], target.part
        if part is not None:
            source = source.narrow(part.dim, part.start, target.view.shape[part.dim])
        target.view.copy_(source)
    return model


@pytest.fixture(scope="module", params=[2, 4], ids=["tp2", "tp4"])
def models(request: Any, tiny_model: Any) -> Models:
    """The tiny model in parts; four ranks hold its two KV heads twice."""
    return [shard_of(tiny_model(), group) for group in groups_of(request.param)]


@contextmanager
def running(models: Models, config: EngineConfig) -> Iterator[TensorParallelRunner]:
    """Rank 0's runner, with its workers in threads."""
    listener, secret = StepListener(HOST), new_secret()

    def work(model: NemotronLabsDiffusionModel) -> None:
        steps = StepReceiver.connect(HOST, listener.port, secret, TIMEOUT_S)
        Worker(RankRunner(model, config), steps).run()
        steps.close()

    threads = [threading.Thread(target=work, args=(model,)) for model in models[1:]]
    for thread in threads:
        thread.start()
    sender = listener.accept(len(threads), secret, TIMEOUT_S)
    try:
        yield TensorParallelRunner(TorchModelRunner(models[0], config), sender, StepClock())
    finally:
        sender.close()
        for thread in threads:
            thread.join()


Run = Callable[..., Any]


@pytest.fixture(scope="module")
def both(models: Models, tiny_model: Any, small_engine: Any, drain: Any) -> Run:
    """both(requests, **engine settings): what the ranks make of them together, and one alone."""

    def run(requests: list[Request], **settings: int) -> tuple[Any, Any]:
        config = small_engine(**settings)
        with running(models, config) as runner:
            split = drain(Engine(runner, config), requests)
        return split, drain(Engine(TorchModelRunner(tiny_model(), config), config), requests)

    return run


SAMPLED: dict[str, Any] = {
    "temperature": 0.9,
    "seed": 2**40 + 17,
    "top_p": 0.9,
    "top_k": 30,
    "min_p": 0.02,
    "repetition_penalty": 1.2,
    "presence_penalty": 0.4,
    "frequency_penalty": 0.3,
    "logit_bias": ((5, 3.0), (40, -4.0)),
    "num_logprobs": 3,
}


@pytest.mark.parametrize("sampling", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_the_ranks_write_what_one_rank_writes_in_every_mode(
    both: Run, make_request: Any, sampling: dict[str, Any]
) -> None:
    split, alone = both(
        [
            make_request(AR, 9, 14, "ar", **sampling),
            make_request(DIFFUSION, 8, 12, "diffusion", block_size=8, **sampling),
            make_request(DIFFUSION, 7, 12, "threshold", block_size=8, threshold=0.6, **sampling),
            make_request(SPECULATION, 11, 14, "adapter", block_size=8, **sampling),
            make_request(SPECULATION, 12, 14, "bare", block_size=8, use_adapter=False, **sampling),
            make_request(SPECULATION, 6, 12, "iterative", block_size=4, threshold=0.6, **sampling),
        ]
    )
    for name, own in alone.items():
        assert split[name].token_ids == own.token_ids, name
        assert split[name].finish.forwards == own.finish.forwards, name
        assert split[name].finish.accepted == own.finish.accepted, name


def test_samples_and_shared_prefixes_are_the_same_over_ranks(both: Run, make_request: Any) -> None:
    """Pages are shared, and a partial one is copied, on every rank alike."""
    split, alone = both(
        [
            make_request(SPECULATION, 23, 10, "three", n=3, temperature=1.0, block_size=8),
            make_request(AR, 23, 8, "again", temperature=0.7, seed=5),
        ]
    )
    assert split["three"].token_ids == alone["three"].token_ids
    assert split["again"].token_ids == alone["again"].token_ids
    assert split["again"].finish.cached_tokens == alone["again"].finish.cached_tokens


def test_preempted_sequences_write_the_same_over_ranks(both: Run, make_request: Any) -> None:
    crowd = [
        make_request(AR, 10, 20, "first"),
        make_request(SPECULATION, 12, 20, "second", block_size=4, temperature=0.8, seed=3),
        make_request(AR, 11, 20, "third", priority=Priority.BATCH),
    ]
    split, alone = both(crowd, num_pages=14)
    assert any(own.finish.forwards > 21 for own in split.values())  # somebody began anew
    assert {name: own.token_ids for name, own in split.items()} == {
        name: own.token_ids for name, own in alone.items()
    }


def test_passes_that_are_launched_ahead_are_the_same_over_ranks(
    both: Run, make_request: Any
) -> None:
    """Each rank fills in by itself what the host had not read."""
    split, alone = both(
        [
            make_request(AR, 7, 16, "ar"),
            make_request(SPECULATION, 9, 16, "speculation", block_size=8),
            make_request(SPECULATION, 6, 12, "sampled", block_size=4, temperature=0.8, seed=9),
        ],
        launch_ahead=True,
    )
    for name, own in alone.items():
        assert split[name].token_ids == own.token_ids, name
        assert split[name].finish.accepted == own.finish.accepted, name


def test_forced_and_banned_ids_are_the_same_over_ranks(both: Run, make_request: Any) -> None:
    own: dict[str, Any] = {
        "thinking": ThinkingBudget(5, start_id=7, end_id=9),
        "logit_bias": ((7, 6.0),),
        "min_tokens": 8,
        "stop_ids": (5, 12, 30),
    }
    split, alone = both(
        [make_request(mode, 6, 14, mode.value, block_size=8, **own) for mode in (AR, SPECULATION)]
    )
    assert {name: own.token_ids for name, own in split.items()} == {
        name: own.token_ids for name, own in alone.items()
    }


@pytest.mark.parametrize("size", [2, 4])
def test_the_bundled_checkpoint_follows_a_grammar_over_ranks_as_alone(
    drain: Any, size: int
) -> None:
    """Each rank reads its own part of the file."""
    config = EngineConfig(num_pages=64)
    tokenizer = Tokenizer.from_file(str(BUNDLED_CHECKPOINT / "tokenizer.json"))
    prompt = (1, *tokenizer.encode("the answer is: ").ids)
    grammar = Grammar(GrammarKind.REGEX, r"(ab|cd){3,5}[0-9]{2}")
    requests = [
        Request(mode.value, prompt, mode, 24, grammar=grammar, temperature=0.9, seed=3)
        for mode in (AR, SPECULATION)
    ]

    def engine(runner: Any) -> Engine:
        return Engine(runner, config, language=Language.load(BUNDLED_CHECKPOINT, runner.info))

    def load(group: Group | None = None) -> NemotronLabsDiffusionModel:
        return load_model(BUNDLED_CHECKPOINT, torch.float64, group=group)

    models = [load(group) for group in groups_of(size)]
    with running(models, config) as runner:
        split = drain(engine(runner), requests)
    alone = drain(engine(TorchModelRunner(load(), config)), requests)
    for name, own in alone.items():
        assert split[name].token_ids == own.token_ids, name


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ranks run on Triton's kernels, in its interpreter, which runs one at a time."""
    turn = threading.Lock()

    def one_at_a_time(launcher: Callable[..., Any]) -> Callable[..., Any]:
        def launch(*args: Any, **kwargs: Any) -> Any:
            with turn:
                return launcher(*args, **kwargs)

        return launch

    for module, name, launcher in (
        (layers, "add_rms_norm", add_rms_norm_triton),
        (layers, "silu_mul", silu_mul_triton),
        (layers, "add_draft_adapter", add_draft_adapter_triton),
        (rank_runner, "rotate_and_write", rotate_and_write_triton),
        (rank_runner, "paged_attention", paged_attention_triton),
    ):
        monkeypatch.setattr(module, name, one_at_a_time(launcher))


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here")
def test_the_kernels_give_on_two_ranks_what_the_references_give_on_one(
    tiny_model: Any, make_request: Any, small_engine: Any, drain: Any, request: Any
) -> None:
    config, full = small_engine(), tiny_model(torch.float32)
    asked = [
        make_request(AR, 5, 2, "ar", ignore_eos=True),
        make_request(SPECULATION, 3, 3, "speculation", block_size=4, ignore_eos=True),
    ]
    alone = drain(Engine(TorchModelRunner(full, config), config), asked)
    models = [shard_of(full, group) for group in groups_of(2)]
    request.getfixturevalue("kernels")
    with running(models, config) as runner:
        split = drain(Engine(runner, config), asked)
    assert {name: own.token_ids for name, own in split.items()} == {
        name: own.token_ids for name, own in alone.items()
    }


def test_the_clock_tells_how_long_the_oldest_pass_has_been_under_way() -> None:
    now = 10.0
    clock = StepClock(lambda: now)
    assert clock.waiting_s == 0
    clock.launch()
    now = 12.0
    clock.launch()  # before the first was read
    now = 13.0
    assert clock.waiting_s == 3
    clock.read()
    assert clock.waiting_s == 1
    clock.read()
    assert clock.waiting_s == 0
    assert clock.num_steps == 2
