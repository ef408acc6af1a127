"""A model in this process answers messages one after the other, and each leaves nothing behind."""

from contextlib import closing
from pathlib import Path

import pytest

from trimode.cluster.client import chat_request
from trimode.cluster.local_model import LocalModel
from trimode.proto import inference_pb2 as pb
from trimode.replicas.errors import InvalidRequest
from trimode.replicas.model.config import BUNDLED_CHECKPOINT

PROMPT = "    def close(self):\n        self._closed = True\n        self._file.close()\n"
SHORT = pb.GenerateRequest(stop=pb.StopConditions(max_tokens=12, ignore_eos=True))


@pytest.fixture(scope="module")
def model(chat_folder: Path) -> LocalModel:
    model = LocalModel(chat_folder, max_positions=256)
    model.load(dtype="float32", quiet=True)
    return model


def ask(model: LocalModel, *turns: tuple[str, str]) -> list[pb.GenerateResponse]:
    return list(model.generate(chat_request(turns, request=SHORT)))


def test_the_next_turn_of_a_conversation_finds_the_pages_of_the_one_before(
    model: LocalModel,
) -> None:
    first = ("user", PROMPT)
    replies = ask(model, first)
    answer = ("assistant", "".join(reply.text for reply in replies))
    num_prompt = replies[-1].finish.usage.prompt_tokens
    usage = ask(model, first, answer, ("user", "again"))[-1].finish.usage
    # All full pages of the first prompt, but for the mark of its thinking.
    assert usage.cached_tokens >= num_prompt - 2 - 16


def test_an_answer_that_is_not_read_to_its_end_is_in_nobody_s_way(model: LocalModel) -> None:
    asked = pb.GenerateRequest(stop=pb.StopConditions(max_tokens=150, ignore_eos=True))
    wanted = [reply.text for reply in ask(model, ("user", PROMPT))]
    for _ in range(3):
        with closing(model.generate(chat_request([("user", "def f(")], request=asked))) as replies:
            next(replies)
    assert [reply.text for reply in ask(model, ("user", PROMPT))] == wanted


def test_unset_an_answer_may_take_all_the_room_there_is(model: LocalModel) -> None:
    request = model.request(chat_request([("user", "hi")]))
    assert len(request.prompt_ids) + request.max_tokens == 256


def test_it_tells_what_it_can_read() -> None:
    model = LocalModel(BUNDLED_CHECKPOINT)
    assert model.has_tokenizer and not model.has_chat_template
    with pytest.raises(InvalidRequest, match="the model has no chat template"):
        model.request(chat_request([("user", "hi")]))
