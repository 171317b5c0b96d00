"""From a pass to a sequence: encode its prompt, place its images, and check that it can run at all."""

from __future__ import annotations

from time import perf_counter
from typing import NamedTuple

from .chat import Chat
from .drafts import PromptLookup
from .errors import (
    BadInput,
    ImagesNotSupported,
    InvalidMessage,
    PromptTooLong,
    TooManyImages,
    TooManyImageTokens,
)
from .images import LoadedImage
from .kv_pages import PagePool
from .models.model import Model
from .outside import OutsideDetector
from .passes import Choose, Continue, Generate, Pass, Prompt, Score
from .request import PassRecord
from .sampling import SamplingParams
from .sequence import BlockTable, PlacedImage, Sequence
from .text import Codec, ImageSegment, Segment, Trusted, segments_text


class Identity(NamedTuple):
    """Of which request, the how-manieth pass of it and which part of that; what its random numbers (draw: the
    how-manieth generation it is) and its cache depend on."""

    request: int
    number: int
    part: int
    draw: int
    seed: int
    salt: str | None


class Encoded(NamedTuple):
    tokens: list[int]
    content: list[int]
    images: tuple[PlacedImage, ...]


def make_sequence(
    step: Pass,
    model: Model,
    who: Identity,
    sampling: SamplingParams,
    record: PassRecord,
    pool: PagePool,
    page_size: int,
) -> Sequence:
    """The sequence of a pass. Raises a `BadInput` when its prompt cannot be run by this model."""
    encoded = encode(model, step.prompt)
    if isinstance(step, Score) and isinstance(step.prompt, Chat):
        # `transformers` reads a classifier's score from the last token that is not the pad's, which may be the EOS's
        while encoded.tokens and encoded.tokens[-1] == model.pad_id:
            encoded = Encoded(encoded.tokens[:-1], encoded.content[:-1], encoded.images)
    count = len(encoded.tokens)
    if not count:
        raise BadInput(f"the {step.label} pass has an empty prompt")
    decoder = model.backbone.decoder
    if max(encoded.tokens) >= decoder.config.vocab_size:
        raise BadInput(
            f"the {step.label} prompt has token {max(encoded.tokens)}; {model.name} has weights for ids below "
            f"{decoder.config.vocab_size}"
        )
    if not isinstance(step, Score) and (decoder.head is None or model.depth < decoder.depth):
        raise BadInput(f"{model.name} gives scores only; a {step.label} pass needs a language model")
    generates = isinstance(step, Generate)
    if count + generates > model.context:
        room = " and must have room to answer" if generates else ""
        raise PromptTooLong(
            f"the {step.label} prompt has {count:,} tokens; {model.name} takes at most "
            f"{model.context - generates:,}{room}"
        )
    sequence = new_sequence(model, who, encoded, record, pool, page_size)
    if isinstance(step, Generate):
        bounds = [model.context]
        bounds += [] if sampling.max_tokens is None else [count + sampling.max_tokens]
        # a prompt as long as max_length still gets one token, as in `transformers`
        bounds += [] if sampling.max_length is None else [max(sampling.max_length, count + 1)]
        sequence.limit = min(bounds)
        sequence.sampling = sampling
        drafts = sampling.draft_tokens if step.draft_tokens is None else step.draft_tokens
        if drafts and not (step.screen is not None and step.screen.before is None):  # a tap pools what is final only
            sequence.drafter = PromptLookup(drafts)
    elif isinstance(step, Choose):
        sequence.words = _words(model, step)
    elif model.head is None:
        raise BadInput(f"{model.name} has no head to score with")
    else:
        sequence.scored = True
        if model.head.spec.pooling == "mean":
            sequence.pool_from = _scored_from(model, step, encoded.tokens)
    if step.timeout is not None:
        sequence.deadline = perf_counter() + step.timeout
    return sequence


def outside_tokens(model: OutsideDetector, step: Score) -> tuple[list[int], int]:
    """The tokens of a text that a detector outside the engine scores, and the first one that a mean is over. Raises a
    `BadInput` for what it cannot read."""
    if isinstance(step.prompt, Continue | Chat) or any(isinstance(item, ImageSegment) for item in step.prompt):
        raise BadInput(f"{model.name} runs outside the engine and reads text only")
    check_characters(model, sum(len(item.text) for item in step.prompt if not isinstance(item, ImageSegment)))
    tokens = model.codec.encode(step.prompt, add_special_tokens=True)
    if not tokens:
        raise BadInput(f"the {step.label} pass has an empty prompt")
    if len(tokens) > model.context:
        raise PromptTooLong(
            f"the {step.label} prompt has {len(tokens):,} tokens; {model.name} takes {model.context:,}"
        )
    return tokens, first_pooled(model.codec, step.prompt, step.pool_from, tokens)


def new_sequence(
    model: Model, who: Identity, encoded: Encoded, record: PassRecord, pool: PagePool, page_size: int
) -> Sequence:
    """A sequence that begins with these tokens and wants nothing yet; behind them it may have none."""
    layout = model.layout(page_size)
    sequence = Sequence(
        order=(who.request, who.number, who.part),
        model=model,
        record=record,
        root=pool.root(layout, model.backbone.cache_key, who.salt),
        table=BlockTable(layout),
        tokens=encoded.tokens,
        content=encoded.content,
        prompt_tokens=len(encoded.tokens),
        limit=len(encoded.tokens),
        images=encoded.images,
        seed=who.seed,
        draw=who.draw,
    )
    if model.adapter is not None:
        sequence.adapted_from = len(encoded.tokens) - len(model.invocation) if model.invocation else 0
        sequence.content = [sequence.content_of(item, at) for at, item in enumerate(encoded.content)]
    return sequence


def check_characters(model: Model | OutsideDetector, count: int) -> None:
    """Raise `PromptTooLong` for so many characters that no tokenizer could make them fit: before one tries."""
    most = model.context * model.codec.longest_token
    if count > most:
        raise PromptTooLong(
            f"the prompt has {count:,} characters; {model.name} takes at most {model.context:,} tokens, which are "
            f"never more than {most:,} characters"
        )


def _words(model: Model, step: Choose) -> tuple[tuple[int, ...], ...]:
    """The tokens that stand for each word and each beginning. Raises `BadInput` where one has none of its own."""
    words = [_variants(model, word) for word in step.words]
    if not all(words):
        raise BadInput(f"{model.name} has no single token for each of {', '.join(step.words)}")
    words += [_variants(model, word) or _first_tokens(model, word) for word in step.beginnings]
    if sum(map(len, words)) > len({id for ids in words for id in ids}):
        raise BadInput(f"{model.name} begins two of {', '.join((*step.words, *step.beginnings))} with one token")
    return tuple(words)


def _first_tokens(model: Model, word: str) -> tuple[int, ...]:
    """The first token of a word, at the beginning of a text and behind a space."""
    spelled = (model.codec.encode((Trusted(text),), add_special_tokens=False) for text in (word, f" {word}"))
    return tuple({ids[0] for ids in spelled})


def _variants(model: Model, word: str) -> tuple[int, ...]:
    """Tokens that spell a word; a tokenizer may have more ids than the model has rows."""
    return tuple(id for id in model.codec.variants(word) if id < model.backbone.decoder.config.vocab_size)


def _scored_from(model: Model, step: Score, tokens: list[int]) -> int:
    """The first token that a mean is over."""
    if isinstance(step.prompt, Chat):
        raise BadInput(f"the head of {model.name} pools the mean of an answer, and cannot read a chat")
    if not isinstance(step.prompt, Continue):
        return first_pooled(model.codec, step.prompt, step.pool_from, tokens)
    stream = step.prompt.answer.stream
    assert stream is not None
    return stream.prompt_tokens


def first_pooled(codec: Codec, segments: tuple[Segment, ...], pooled: int, tokens: list[int]) -> int:
    """The first token that holds a character of the segments from `pooled` on: behind the longest common beginning of
    the text with and without them."""
    if pooled == 0:
        return 0
    common = 0
    for left, right in zip(codec.encode(segments[:pooled], add_special_tokens=True), tokens, strict=False):
        if left != right:
            break
        common += 1
    return min(common, len(tokens) - 1)


def encode(model: Model, prompt: Prompt) -> Encoded:
    """Token ids with all those of an image, and what they stand for in the prefix index; the invocation of
    an activated adapter stands at the end."""
    if isinstance(prompt, Continue):
        encoded = _continued(model, prompt)
    else:
        encoded = _encode(model, prompt)
    if not model.invocation:
        return encoded
    return Encoded([*encoded.tokens, *model.invocation], [*encoded.content, *model.invocation], encoded.images)


def _continued(model: Model, prompt: Continue) -> Encoded:
    stream = prompt.answer.stream
    if stream is None:
        raise BadInput("only an answer that a model of this engine has just given can be continued")
    if stream.backbone != model.backbone.cache_key:
        raise BadInput(f"{model.name} cannot continue an answer of {stream.model}: they have different weights")
    tail = model.codec.encode(prompt.segments, add_special_tokens=False) if prompt.segments else []
    if prompt.message is not None:
        tail += model.codec.encode_next_turn(prompt.message)
    tokens, content = list(stream.tokens), list(stream.content)
    if (
        tail and tokens[-1] in model.codec.eos_ids and tokens[-1] == tail[0]
    ):  # the answer's end is the template's, too
        del tail[0]
    return Encoded(tokens + tail, content + tail, stream.images)


def _encode(model: Model, prompt: Chat | tuple[Segment, ...] | tuple[int, ...]) -> Encoded:
    if isinstance(prompt, Chat):
        images = prompt.images
        _check_images(model, images)
        check_characters(model, sum(len(message.text) for message in prompt.messages))
        ids = model.codec.encode_chat(prompt)
    else:
        segments = [item for item in prompt if not isinstance(item, int)]
        if not segments:
            ids = [item for item in prompt if isinstance(item, int)]
            if model.image_token_id in ids:
                raise InvalidMessage(
                    f"token {model.image_token_id} ({model.codec.image_token}) stands for an image; a raw prompt is "
                    "text only, send images in a chat"
                )
            return Encoded(ids, ids, ())
        images = tuple(item.image for item in segments if isinstance(item, ImageSegment))
        _check_images(model, images)
        check_characters(model, sum(len(item.text) for item in segments if not isinstance(item, ImageSegment)))
        ids = model.codec.encode(segments, add_special_tokens=True)
    if not images:
        return Encoded(ids, ids, ())
    vision = model.backbone.vision
    assert vision is not None
    tokens: list[int] = []
    content: list[int] = []
    placed: list[PlacedImage] = []
    text = ""
    if vision.reads_prompt:
        parts = model.codec.segments(prompt) if isinstance(prompt, Chat) else segments
        text = segments_text(parts, "")
    waiting = iter(vision.prepare(images, text))
    position = 0  # rotary, of the next token
    for token in ids:
        if token != model.image_token_id:
            tokens.append(token)
            content.append(token)
            position += 1
            continue
        prepared = next(waiting)
        placed.append(PlacedImage(len(tokens), prepared, position))
        tokens += prepared.place.ids
        position += prepared.place.advance
        # below every token id, and different for every row of every image
        base = -(int.from_bytes(prepared.key, "big") << 32) - 1
        content += range(base, base - prepared.tokens, -1)
    return Encoded(tokens, content, tuple(placed))


def _check_images(model: Model, images: tuple[LoadedImage, ...]) -> None:
    """Refuse what cannot fit before any image is processed: sizes say how many tokens images become."""
    vision = model.backbone.vision
    if not images:
        return
    if vision is None:
        raise ImagesNotSupported(f"{model.name} reads text only; send no images")
    if len(images) > model.max_images:
        raise TooManyImages(f"{len(images)} images in one chat; {model.name} takes at most {model.max_images}")
    tokens = sum(vision.tokens(image.pixels.size, len(images)) for image in images)
    if tokens >= model.context:
        raise TooManyImageTokens(
            f"the images become {tokens:,} tokens; {model.name} takes at most {model.context - 1:,} in all: send "
            "fewer or smaller images"
        )
