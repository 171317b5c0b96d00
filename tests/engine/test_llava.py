"""Images: the logits and tokens of transformers; an image's keys and values computed once, and never mixed up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import LlavaForConditionalGeneration

from stockade.engine.chat import Chat
from stockade.engine.engine import Engine
from stockade.engine.errors import ImagesNotSupported, InvalidMessage, PromptTooLong, TooManyImages
from stockade.engine.guards import Guard
from stockade.engine.guards.prompts import vicuna_v1
from stockade.engine.images import ImageLimits, load_image
from stockade.engine.models.loader import ModelSet, load_models
from stockade.engine.models.shapes import image_processor_for
from stockade.engine.models.vision.features import FeatureCache
from stockade.engine.passes import Answer
from stockade.engine.request import Reply
from stockade.engine.sampling import SamplingParams
from stockade.engine.text import Untrusted
from tests.conftest import IMAGE_TOKEN

PAGE = 16
ROWS = 16  # of one image
GREEDY = SamplingParams(max_tokens=64, ignore_eos=True)
SHORT = SamplingParams(max_tokens=8, ignore_eos=True)


@pytest.fixture(scope="module")
def models(checkpoint: Callable[[str], Path]) -> ModelSet:
    return load_models(checkpoint("llava"), dtype=torch.float32)


@pytest.fixture(scope="module")
def reference(checkpoint: Callable[[str], Path]) -> LlavaForConditionalGeneration:
    model = LlavaForConditionalGeneration.from_pretrained(checkpoint("llava"), dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    return model


def new(models: ModelSet, **options: Any) -> Engine:
    return Engine(models=models, **{"kv_bytes": 16 << 20, "tokens_per_page": PAGE, **options})


def picture(seed: int, size: tuple[int, int] = (80, 60)) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


PICTURES = [picture(1), picture(2, (56, 56)), picture(3, (30, 200))]


def chat(text: str, *images: Image.Image) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


CHATS = [
    chat("What is this?", PICTURES[0]),
    chat("What is this?", PICTURES[1]),
    chat("Which of these?", *PICTURES),
    chat("No image at all."),
    chat("Twice the same?", PICTURES[2], PICTURES[2]),
    [
        *chat("And this?", PICTURES[1]),
        {"role": "assistant", "content": "A thing."},
        *chat("And that?", PICTURES[0]),
    ],
]


def inputs(models: ModelSet, messages: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """What the processor of transformers would make: the template, 16 placeholders an image, the pixels."""
    tokenizer = models.models["mllm"].codec.tokenizer
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = []
    for token in tokenizer(text)["input_ids"]:
        ids += [token] * (ROWS if token == IMAGE_TOKEN else 1)
    # the mask says that the end token of an earlier answer is no padding
    out = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
    images = [part["image"] for message in messages for part in message["content"] if "image" in part]
    if images:
        out["pixel_values"] = image_processor_for(56)(images=images, return_tensors="pt")["pixel_values"]
    return out


@pytest.fixture(scope="module")
def wanted(models: ModelSet, reference: LlavaForConditionalGeneration) -> list[list[int]]:
    out = []
    for messages in CHATS:
        given = inputs(models, messages)
        ids = reference.generate(**given, max_new_tokens=64, do_sample=False, pad_token_id=2)
        out.append(ids[0, given["input_ids"].shape[1] :].tolist())
    return out


def tokens(replies: list[Reply]) -> list[list[int]]:
    return [reply.token_ids for reply in replies]


@pytest.mark.parametrize("number", range(len(CHATS)))
def test_logits_are_those_of_transformers(
    models: ModelSet, reference: LlavaForConditionalGeneration, number: int
) -> None:
    engine = new(models)
    engine.submit(CHATS[number], sampling=SHORT)
    given = inputs(models, CHATS[number])
    works = engine.scheduler.schedule(engine.lanes[0])
    assert works[0].sequence.tokens == given["input_ids"][0].tolist()
    got = engine.runner.run(engine.lanes[0], works).logits
    with torch.inference_mode():
        want = reference(**given).logits[0, -1]
    assert got is not None
    torch.testing.assert_close(got[0], want, atol=1e-4, rtol=0)


def test_each_alone_gives_the_tokens_of_transformers(models: ModelSet, wanted: list[list[int]]) -> None:
    assert [new(models).chat([one], sampling=GREEDY)[0].token_ids for one in CHATS] == wanted


@pytest.mark.parametrize(
    "options",
    [{}, {"max_batch_tokens": 9, "max_sequences": 6}, {"tokens_per_page": 64}, {"kv_bytes": 26 * 12288}],
    ids=["together", "chunks through images", "large pages", "preempted"],
)
def test_batches_chunks_and_preemption_change_no_token(
    models: ModelSet, wanted: list[list[int]], options: dict[str, Any]
) -> None:
    engine = new(models, **options)
    requests = [engine.submit(one, sampling=GREEDY) for one in CHATS]
    while engine.has_work:
        engine.step()
        engine.check_integrity()
    assert [request.reply and request.reply.token_ids for request in requests] == wanted
    assert (engine.scheduler.preemptions > 0) == ("kv_bytes" in options)
    assert engine.pool.owned_pages == 0


def test_hits_include_images_and_change_no_token(models: ModelSet, wanted: list[list[int]]) -> None:
    engine = new(models)
    assert tokens(engine.chat(CHATS, sampling=GREEDY)) == wanted
    encoded = engine.runner.images_encoded
    assert encoded == len(PICTURES)  # each once, whatever number of chats it is in
    again = engine.chat(CHATS, sampling=GREEDY)
    assert tokens(again) == wanted
    assert all(reply.passes[0].cached_tokens == reply.passes[0].prompt_tokens - 1 for reply in again)
    engine.pool.clear_cache()
    assert tokens(engine.chat(CHATS, sampling=GREEDY)) == wanted
    assert engine.runner.images_encoded == encoded  # the features were kept, too


@pytest.mark.parametrize("cut", range(1, 40, 3))
def test_a_hit_that_ends_inside_an_image_is_exact(models: ModelSet, cut: int) -> None:
    engine = new(models)
    engine.submit(CHATS[0], sampling=SHORT)
    (work,) = engine.scheduler.schedule(engine.lanes[0])
    sequence = work.sequence
    engine.runner.run(engine.lanes[0], [work._replace(length=cut)])
    engine.scheduler.advance(work._replace(length=cut))
    engine.abort(sequence.order[0])
    reply = engine.chat([CHATS[0]], sampling=SHORT)[0]
    assert reply.passes[0].cached_tokens == cut
    assert reply.token_ids == new(models).chat([CHATS[0]], sampling=SHORT)[0].token_ids
    engine.check_integrity()


def test_two_images_with_one_question_never_share(models: ModelSet) -> None:
    engine = new(models)
    start = models.models["mllm"].codec.encode_text("USER: ")
    first = engine.chat([chat("What?", PICTURES[0])], sampling=SHORT)[0]
    other = PICTURES[0].copy()
    for x in range(other.width):  # one pixel might be lost in resizing
        other.putpixel((x, 30), (255, 0, 0))
    second = engine.chat([chat("What?", other)], sampling=SHORT)[0]
    assert second.passes[0].cached_tokens == len(start)
    assert engine.runner.images_encoded == 2
    assert second.token_ids == new(models).chat([chat("What?", other)], sampling=SHORT)[0].token_ids
    assert first.token_ids == new(models).chat([chat("What?", PICTURES[0])], sampling=SHORT)[0].token_ids


def test_the_order_of_images_matters(models: ModelSet) -> None:
    engine = new(models)
    one, two = chat("Which?", PICTURES[0], PICTURES[1]), chat("Which?", PICTURES[1], PICTURES[0])
    together = tokens(engine.chat([one, two], sampling=SHORT))
    assert together == [new(models).chat([each], sampling=SHORT)[0].token_ids for each in (one, two)]


# --- guards: what comes before the question is computed once ---


@pytest.mark.parametrize("many", [1, 6])
@pytest.mark.parametrize("published", [False, True], ids=["plain", "published"])
def test_judge_and_caption_compute_only_what_follows_the_image(models: ModelSet, published: bool, many: int) -> None:
    """Every verdict is made harmful, so that the caption and the second answer run."""
    guard = Guard.ecso(published=published)
    remedy = replace(guard.remedy, caption_sampling=SHORT, sampling=SHORT)
    if published:
        judge = AlwaysYes(replace(guard.detector, sampling=SHORT))
        guard = replace(guard, detector=judge, remedy=remedy, released=replace(guard.released, sampling=SHORT))
    else:
        guard = replace(guard, detector=replace(guard.detector, min_mass=1e-9, threshold=1.0), remedy=remedy)
    engine = new(models)
    replies = engine.chat(
        [chat(f"What is number {n}?", picture(50 + n)) for n in range(many)], guard=guard, sampling=SHORT
    )
    codec, image = models.models["mllm"].codec, load_image(PICTURES[0])
    prompt = vicuna_v1((Untrusted("Hi"),), (image,)) if published else codec.segments(Chat.single("Hi", (image,)))
    before = codec.encode(prompt, add_special_tokens=True).index(IMAGE_TOKEN)
    assert engine.runner.images_encoded == many
    for reply in replies:
        labels = [record.label for record in reply.passes]
        assert labels == ["answer", "judge", "caption", "eyes_closed"] + ([] if published else ["judge"])
        assert reply.passes[0].cached_tokens <= before  # the image itself was new
        for record in reply.passes[1:3]:
            assert record.error is None
            assert before + ROWS <= record.cached_tokens < record.prompt_tokens
        assert reply.passes[3].error is None
    engine.check_integrity()
    assert engine.pool.owned_pages == 0


@dataclass(frozen=True)
class AlwaysYes:
    """The released judge, run as it is, with a verdict that sends every answer on to the remedy."""

    judge_as_released: Any
    name: str = "always_yes"
    incremental: bool = False

    def judge(self, messages: Chat, answer: Answer) -> Any:
        verdict = yield from self.judge_as_released.judge(messages, answer)
        return replace(verdict, score=0.0)


# --- what is refused ---


def test_a_raw_prompt_holds_no_placeholders(models: ModelSet) -> None:
    engine = new(models)
    for prompt in ("<image>\nWhat?", [1, IMAGE_TOKEN, 5], "a" * 3 + "<image>"):
        with pytest.raises(InvalidMessage, match=rf"token {IMAGE_TOKEN} \(<image>\) stands for an image"):
            engine.generate([prompt])
    assert not engine.has_work


def test_a_users_placeholder_is_plain_text(models: ModelSet) -> None:
    engine = new(models)
    engine.submit(chat("<image> <image>", PICTURES[0]), sampling=SHORT)
    (work,) = engine.scheduler.schedule(engine.lanes[0])
    assert work.sequence.tokens.count(IMAGE_TOKEN) == ROWS


def test_more_images_than_the_context_holds(models: ModelSet) -> None:
    engine = new(models, image_limits=ImageLimits(max_images=100))
    with pytest.raises(TooManyImages, match="32 images in one chat; mllm takes at most 31"):
        engine.chat([chat("What?", *[PICTURES[0]] * 32)])
    with pytest.raises(PromptTooLong, match=r"has 5.. tokens; mllm takes at most 511"):
        engine.chat([chat("What?", *[PICTURES[0]] * 31)])
    with pytest.raises(TooManyImages, match="more than 16 images"):
        new(models).chat([chat("What?", *[PICTURES[0]] * 17)])


def test_images_for_a_text_model(checkpoint: Callable[[str], Path]) -> None:
    engine = Engine(checkpoint("llama-gqa"), dtype=torch.float32, kv_bytes=8 << 20)
    with pytest.raises(ImagesNotSupported, match="mllm reads text only"):
        engine.chat([chat("What?", PICTURES[0])])
    assert engine.chat(["What?"], sampling=SHORT)[0].error is None


def test_kept_features_stay_within_their_bound() -> None:
    cache = FeatureCache(1000)
    for number in range(10):
        cache.put(bytes([number]), torch.zeros(100))
    assert cache.bytes == 800 and cache.get(bytes([9])) is not None and cache.get(bytes([7])) is None
    cache.put(b"big", torch.zeros(300))
    assert cache.get(b"big") is None and cache.bytes == 800


def test_a_kept_feature_does_not_hold_the_batch_it_came_from(models: ModelSet) -> None:
    engine = new(models)
    engine.chat([chat("What?", picture(n)) for n in range(3)], sampling=SHORT)
    kept = list(engine.runner.features._features.values())
    assert len(kept) == 3
    assert all(item.untyped_storage().nbytes() == item.nbytes for item in kept)
