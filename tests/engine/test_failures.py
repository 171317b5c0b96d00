"""Whatever fails, the request that asked for it ends with a reply or a typed error, and the next one is answered."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer

from stockade.engine import errors
from stockade.engine.chat import Chat
from stockade.engine.engine import Engine
from stockade.engine.guards import Guard
from stockade.engine.images import ImageLimits
from stockade.engine.models.loader import ModelSet, load_models
from stockade.engine.passes import Answer, Choose, Decision, Generate, Score
from stockade.engine.request import FinishReason, Outcome
from stockade.engine.runner import Arrival
from stockade.engine.sampling import SamplingParams
from stockade.engine.text import Untrusted

SHORT = SamplingParams(max_tokens=6, ignore_eos=True)


@pytest.fixture(scope="module")
def models(checkpoint: Callable[[str], Path]) -> ModelSet:
    return load_models(
        checkpoint("llama-gqa"), checkpoint("classifier"), checkpoint("llama-mha-tied"), dtype=torch.float32
    )


@pytest.fixture
def engine(models: ModelSet) -> Iterator[Engine]:
    """An engine that must answer as before when the test is over."""
    engine = Engine(models=models, kv_bytes=16 << 20, tokens_per_page=16)
    yield engine
    assert not engine.has_work and engine.pool.owned_pages == 0
    engine.check_integrity()
    reply = engine.chat(["Still there?"], sampling=SHORT)[0]
    fresh = Engine(models=models, kv_bytes=16 << 20, tokens_per_page=16).chat(["Still there?"], sampling=SHORT)[0]
    assert reply.error is None and reply.token_ids == fresh.token_ids


class Custom:
    """A guard made of one loop."""

    def __init__(self, loop: Callable[[Chat], Any]) -> None:
        self.loop = loop

    def run(self, chat: Chat, traits: Any) -> Any:
        return self.loop(chat)


# --- a batch that fails ---


def fail_once(engine: Engine, monkeypatch: pytest.MonkeyPatch, model: str, method: str, after: int = 0) -> None:
    decoder: Any = engine.models[model].backbone.decoder
    if method == "block" and decoder.fused is not None:
        decoder, method = decoder.fused, "run"
    real, calls = getattr(decoder, method), iter(range(1000))

    def failing(*given: Any) -> Any:
        if next(calls) == after:
            raise RuntimeError("out of memory")
        return real(*given)

    monkeypatch.setattr(decoder, method, failing)


@pytest.mark.parametrize(("method", "after"), [("embed", 0), ("block", 4), ("logits", 2), ("embed", 3)])
def test_a_failing_batch_ends_its_requests_and_no_other(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, method: str, after: int
) -> None:
    fail_once(engine, monkeypatch, "mllm", method, after)
    replies = engine.chat(["One", "Two"], sampling=SHORT)
    for reply in replies:
        assert reply.error == "RuntimeError: out of memory" and reply.passes[0].error == reply.error
        assert (reply.outcome, reply.finish_reason, reply.text) == (Outcome.REFUSED, FinishReason.ERROR, "")


def test_a_failing_detector_refuses_and_shows_nothing(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_once(engine, monkeypatch, "detector", "block")
    guard = Guard.protector(template="response", threshold=0.0)
    reply = engine.chat(["One"], guard=guard, sampling=SHORT)[0]
    assert (reply.outcome, reply.text) == (Outcome.REFUSED, guard.refusal)
    assert reply.error == reply.verdicts[0].error == "RuntimeError: out of memory"
    assert reply.token_ids == [] and reply.passes[0].text not in ("", reply.text)


def test_a_failing_detoxifier_refuses(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_once(engine, monkeypatch, "detoxifier", "logits", 3)
    guard = Guard.protector(template="response", threshold=1.0)
    reply = engine.chat(["One"], guard=guard, sampling=SHORT)[0]
    assert (reply.outcome, reply.text, reply.error) == (
        Outcome.REFUSED,
        guard.refusal,
        "detoxify: RuntimeError: out of memory",
    )


def test_logits_that_are_not_numbers_end_their_own_request_only(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = engine.models["mllm"].backbone.decoder
    real = decoder.logits

    def poisoned(x: torch.Tensor) -> torch.Tensor:
        logits = real(x)
        if len(logits) == 2:
            logits[0, 77] = float("nan")
        return logits

    want = [reply.token_ids for reply in engine.chat(["One", "Two"], sampling=SHORT)]
    monkeypatch.setattr(decoder, "logits", poisoned)
    replies = engine.chat(["One", "Two"], sampling=SHORT)
    good, bad = sorted(replies, key=lambda reply: reply.error is not None)
    assert bad.error == "the model's logits are not finite numbers" and bad.text == ""
    assert good.error is None and good.token_ids == want[replies.index(good)]


def test_an_error_while_tokens_are_handed_out_ends_the_batch(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stockade.engine.answers.sample", lambda logits, rows: 1 / 0)
    reply = engine.chat(["One"], sampling=replace(SHORT, logprobs=0))[0]
    assert reply.error == "ZeroDivisionError: division by zero"
    monkeypatch.undo()


@pytest.mark.parametrize("when", ["launched", "landed", "in flight"])
def test_a_gpu_that_fails_ends_the_engine_and_says_so(
    models: ModelSet, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """After an illegal access nothing of this process runs on the GPU any more: to fail one request after the other
    would keep a server in use that answers none."""

    def broken(*_: Any) -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    engine = Engine(models=models, kv_bytes=16 << 20, tokens_per_page=16)
    engine.runner._cuda = True
    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(synchronize=broken))
    if when == "launched":
        monkeypatch.setattr(engine.models["mllm"].backbone.decoder, "embed", broken)
    else:
        engine.runner._arrival = lambda scores: Arrival(event, None, [])  # type: ignore[method-assign]
        event: Any = SimpleNamespace(query=broken if when == "in flight" else lambda: True, synchronize=broken)
    request = engine.submit("One", guard=Guard.protector(template="response"), sampling=SHORT)
    for _ in range(2):
        with pytest.raises(errors.DeviceLost, match=r"the GPU has failed.*illegal memory access"):
            engine.step()
    reply = engine.abort(request.id)
    assert (reply.outcome, reply.text) == (Outcome.REFUSED, "")


def test_nan_weights_of_a_detector_are_harmful(checkpoint: Callable[[str], Path]) -> None:
    models = load_models(checkpoint("llama-gqa"), checkpoint("classifier"), dtype=torch.float32)
    head = models.models["detector"].head
    assert head is not None
    head.weight.fill_(float("nan"))
    engine = Engine(models=models, kv_bytes=8 << 20)
    guard = Guard.protector(template="response", detoxifier=None, threshold=0.0)
    reply = engine.chat(["One"], guard=guard, sampling=SHORT)[0]
    assert (reply.outcome, reply.text, reply.error) == (Outcome.REFUSED, guard.refusal, "nonsense")
    assert reply.to_dict()["verdicts"][0]["score"] is None


def test_a_pass_that_takes_too_long_is_harmful(engine: Engine) -> None:
    guard = Guard.protector(template="response", threshold=0.0, timeout=1e-9)
    reply = engine.chat(["One"], guard=guard, sampling=SHORT)[0]
    assert (reply.outcome, reply.text, reply.error) == (Outcome.REFUSED, guard.refusal, "timeout")
    assert reply.passes[1].error == "the screen pass took too long"
    late = Guard.protector(template="response", threshold=1.0, timeout=1e-9)
    assert engine.chat(["One"] * 3, guard=late, sampling=SHORT)[1].error == "timeout"


def test_an_answer_longer_than_the_detector_reads_is_harmful(engine: Engine) -> None:
    guard = Guard.protector(template="question_answer", threshold=0.0)
    reply = engine.chat(["語" * 100], guard=guard, sampling=SamplingParams(max_tokens=None, ignore_eos=True))[0]
    assert reply.passes[0].error is None and "512" in str(reply.passes[1].error)
    assert [verdict.error for verdict in reply.verdicts] == ["too_long"]
    assert (reply.outcome, reply.text, reply.error) == (Outcome.REFUSED, guard.refusal, "too_long")


# --- loops that misbehave ---


def nothing_at_all(chat: Chat) -> Iterator[Any]:
    return Decision(Answer("at once"), Outcome.CLEAN)
    yield


def not_a_decision(chat: Chat) -> Iterator[Any]:
    yield Generate("mllm", chat)
    return "text"


def not_a_pass(chat: Chat) -> Iterator[Any]:
    yield Generate("mllm", chat)
    yield "text"


def raises(chat: Chat) -> Iterator[Any]:
    yield Generate("mllm", chat)
    raise KeyError("oops")


def unknown_model(chat: Chat) -> Iterator[Any]:
    yield Generate("mllm", chat)
    yield Score("oracle", (Untrusted("a"),))


def no_such_word(chat: Chat) -> Iterator[Any]:
    yield Generate("mllm", chat)
    yield Choose("mllm", chat, ("yes", "antidisestablishmentarianism"))


def nothing_to_score(chat: Chat) -> Iterator[Any]:
    yield Generate("mllm", chat)
    yield Generate("mllm", ())


def a_classifier_speaks(chat: Chat) -> Iterator[Any]:
    yield Generate("mllm", chat)
    yield Generate("detector", (Untrusted("a"),))


@pytest.mark.parametrize(
    ("loop", "reason"),
    [
        (not_a_decision, "returned str, not a Decision"),
        (not_a_pass, "may yield Generate, Score, Choose, Start, Wait or Cancel, not 'text'"),
        (raises, "oops"),
        (unknown_model, "no 'oracle'; it has detector, detoxifier, mllm"),
        (no_such_word, "no single token for each of yes, antidisestablishmentarianism"),
        (nothing_to_score, "has an empty prompt"),
        (a_classifier_speaks, "detector gives scores only"),
    ],
)
def test_a_loop_that_misbehaves_ends_its_own_request(engine: Engine, loop: Any, reason: str) -> None:
    beside = engine.submit("Two", sampling=SHORT)
    reply = engine.chat(["One"], guard=Custom(loop), sampling=SHORT)[0]
    assert reply.error is not None and reason in reply.error
    assert (reply.outcome, reply.finish_reason, reply.text) == (Outcome.REFUSED, FinishReason.ERROR, "")
    while beside.reply is None:
        engine.step()
    assert beside.reply.error is None


def test_a_loop_may_decide_without_any_pass(engine: Engine) -> None:
    reply = engine.chat(["One"], guard=Custom(nothing_at_all))[0]
    assert (reply.text, reply.outcome, reply.passes) == ("at once", Outcome.CLEAN, [])
    assert list(engine.stream("One", guard=Custom(nothing_at_all))) == ["at once"]


def test_an_abort_in_the_middle_of_a_guard(engine: Engine) -> None:
    guard = Guard.protector(template="response", threshold=1.0)
    for steps in range(1, 24, 2):
        request = engine.submit("One", guard=guard, sampling=SHORT)
        for _ in range(steps):
            if request.reply is None:
                engine.step()
        if request.reply is not None:
            break
        reply = engine.abort(request.id)
        assert (reply.text, reply.finish_reason, reply.error) == ("", FinishReason.ABORTED, "aborted")
        assert engine.pool.owned_pages == 0
        engine.check_integrity()
        with pytest.raises(errors.UnknownRequest, match=f"no request {request.id} is under way"):
            engine.abort(request.id)
    assert steps > 10


# --- bad input: each refused with its own type, before anything runs ---


def user(content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}]


def part(**image: Any) -> list[dict[str, Any]]:
    return user([{"type": "image", **image}, {"type": "text", "text": "What?"}])


@pytest.mark.parametrize(
    ("chat", "error", "message"),
    [
        ([], errors.EmptyChat, "send at least one user message"),
        ("  ", errors.EmptyChat, "needs a text or an image"),
        ([{"role": "assistant", "content": "a"}], errors.EmptyChat, "must be a user message"),
        ([{"role": "robot", "content": "a"}], errors.UnknownRole, "allowed: system, user, assistant"),
        (user(5), errors.InvalidMessage, "allowed: a string or a list of parts"),
        (user([{"type": "sound"}]), errors.InvalidMessage, "allowed: text, image_url, image"),
        (7, errors.InvalidMessage, "a chat is a string or a list of messages"),
        ("語" * 600, errors.PromptTooLong, "1,8.. tokens; mllm takes at most 511 and must have room to answer"),
        ("a" * 10_000_000, errors.PromptTooLong, "10,000,000 characters; mllm takes at most 512 tokens"),
        (part(image=Image.new("RGB", (9, 9))), errors.ImagesNotSupported, "mllm reads text only"),
        (part(path="/nowhere/at/all.png"), errors.UnreadableImage, "cannot read the image file"),
        (part(image=b"no image"), errors.UnreadableImage, "allowed formats: PNG"),
        (part(image=Image.new("RGB", (9000, 9000))), errors.TooManyPixels, "allowed: 32000000 in all"),
        (part(image=5), errors.UnsupportedImage, "allowed: a path, a data: URL"),
        (part(image=b"0" * (21 << 20)), errors.ImageTooLarge, "allowed: 20971520"),
    ],
)
def test_a_bad_chat_is_refused(engine: Engine, chat: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        engine.chat(["A good one", chat], sampling=SHORT)
    assert type(caught.value) is error and isinstance(caught.value, errors.BadInput)


@pytest.mark.parametrize(
    ("prompt", "error", "message"),
    [
        ("\ud800" * 4000, errors.PromptTooLong, "4,000 characters"),
        ([], errors.InvalidMessage, "at least one token"),
        ([5, -1], errors.InvalidMessage, "whole numbers from 0 to 383, not -1"),
        ([5, 384], errors.InvalidMessage, "not 384"),
        ([5, True], errors.InvalidMessage, "not True"),
        ([5, "a"], errors.InvalidMessage, "not 'a'"),
        ([5, 1.0], errors.InvalidMessage, "not 1.0"),
        (None, errors.InvalidMessage, "a string or a list of token ids, not NoneType"),
        (5, errors.InvalidMessage, "a string or a list of token ids, not int"),
        (b"abc", errors.InvalidMessage, "a string or a list of token ids, not bytes"),
        ([5] * 512, errors.PromptTooLong, "512 tokens; mllm takes at most 511"),
    ],
)
def test_a_bad_prompt_is_refused(engine: Engine, prompt: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        engine.generate([[5, 6], prompt], SHORT)


@pytest.mark.parametrize("call", ["chat", "generate"])
@pytest.mark.parametrize("many", ["one", 5, None])
def test_what_is_not_a_list_is_refused(engine: Engine, call: str, many: Any) -> None:
    with pytest.raises(errors.InvalidMessage, match="takes a list of"):
        getattr(engine, call)(many)


def test_other_bad_arguments(engine: Engine) -> None:
    with pytest.raises(errors.InvalidMessage, match="put this one chat into a list"):
        engine.chat(user("a"))
    with pytest.raises(errors.InvalidGuard, match=r"for example Guard.protector\(\), not 'ecso'"):
        engine.chat(["a"], guard="ecso")  # type: ignore[arg-type]
    with pytest.raises(errors.BadInput, match="sampling is a SamplingParams object"):
        engine.chat(["a"], sampling={"top_p": 1})  # type: ignore[arg-type]
    with pytest.raises(errors.InvalidSampling):
        engine.chat(["a"], sampling=SamplingParams(top_p=2))
    with pytest.raises(
        errors.InvalidGuard, match="needs a model 'oracle'; this engine has detector, detoxifier, mllm"
    ):
        engine.chat(["a"], guard=Guard.protector(detector="oracle"))
    with pytest.raises(errors.UnknownRequest, match="no request 99 is under way"):
        engine.abort(99)
    stream = engine.stream([])
    with pytest.raises(errors.EmptyChat):
        next(stream)


def test_a_guard_whose_models_are_missing_is_refused(checkpoint: Callable[[str], Path]) -> None:
    engine = Engine(checkpoint("llama-gqa"), checkpoint("classifier"), dtype=torch.float32, kv_bytes=8 << 20)
    with pytest.raises(errors.InvalidGuard, match="needs a model 'detoxifier'; this engine has detector, mllm"):
        engine.chat(["a"], guard=Guard.protector(template="response"))
    assert engine.chat(["a"], sampling=SHORT)[0].error is None


def test_a_server_opens_no_files(models: ModelSet, tmp_path: Path) -> None:
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    engine = Engine(models=models, kv_bytes=16 << 20, image_limits=ImageLimits(local_files=False))
    with pytest.raises(errors.UnsupportedImage, match="local files are not accepted"):
        engine.chat([part(path=str(tmp_path / "a.png"))])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"tokens_per_page": 24}, errors.BadInput, "power of two of at least 16, not 24"),
        ({"tokens_per_page": 8}, errors.BadInput, "power of two of at least 16, not 8"),
        ({"max_sequences": 0}, errors.BadInput, "max_sequences must be a whole number of at least 1, not 0"),
        ({"max_batch_tokens": -4}, errors.BadInput, "max_batch_tokens must be a whole number of at least 1"),
        ({"kv_bytes": 0}, errors.BadInput, "kv_bytes must be a whole number of at least 1, not 0"),
        ({"kv_bytes": 1.5}, errors.BadInput, "kv_bytes must be a whole number"),
        ({"kv_bytes": 1000}, errors.DoesNotFit, "kv_bytes=1,000 is too small: 2 layouts need at least"),
        ({"models": None}, errors.BadInput, "name a model"),
    ],
)
def test_an_impossible_engine_is_refused(
    models: ModelSet, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Engine(**{"models": models, **options})


def test_ids_the_model_has_no_row_for_are_refused(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """Tokenizers grow by a padding token that the embedding never got."""
    folder = tmp_path / "grown"
    shutil.copytree(checkpoint("llama-gqa"), folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<new>"]})
    tokenizer.save_pretrained(folder)
    engine = Engine(folder, dtype=torch.float32, kv_bytes=8 << 20)
    beside = engine.submit_prompt([5, 6], SHORT)
    with pytest.raises(errors.BadInput, match="has token 384; mllm has weights for ids below 384"):
        engine.generate(["a <new> b"])
    while beside.reply is None:
        engine.step()
    assert beside.reply.error is None
