"""What goes over the wire: OpenAI's requests and replies, and the guard's part in both. Nothing here runs anything.

A field that would change the answer and is not supported is refused unless its value is neutral; nothing is dropped
silently.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field

from ..passes import ReleaseMode

MAX_MESSAGES = 1024
MAX_INPUTS = 256  # texts of one moderation request
MAX_PARTS = 256  # of one message
MAX_SEED = 2**63 - 1024  # of 64 bits; descriptions hold limits as floats, and this one is exact

Zero = Annotated[float, Field(ge=0, le=0)]
Text = Annotated[str, Field(max_length=4_000_000)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


# What a client sends.


class ImageUrl(Strict):
    url: str = Field(description="A data: URL; https: only where the operator allows the host.")
    detail: Literal["auto", "low", "high"] | None = None


class ImagePart(Strict):
    type: Literal["image_url"]
    image_url: ImageUrl


class TextPart(Strict):
    type: Literal["text"]
    text: Text


Part: TypeAlias = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class Turn(Strict):
    """What every message has. `refusal` of an assistant's is what it said instead of `content`."""

    role: Literal["system", "developer", "user", "assistant"]
    refusal: Text | None = None
    name: Annotated[str, Field(max_length=256)] | None = None
    # In messages that a client got from here and sends back.
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    audio: None = None
    function_call: None = None
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None


class Message(Turn):
    content: Text | Annotated[list[Part], Field(max_length=MAX_PARTS)] | None = None


class TextMessage(Turn):
    """A turn without images, whose tokens hang on their pixels."""

    content: Text | Annotated[list[TextPart], Field(max_length=MAX_PARTS)] | None = None


class GuardChoice(Strict):
    """What a client wants of the guard, within what the operator allows."""

    policy: Annotated[str, Field(max_length=64)] | None = None
    release: ReleaseMode | None = None
    threshold: Annotated[
        Annotated[float, Field(ge=0, le=1)] | None,
        Field(description="Harmful is a score below it; it may be raised."),
    ] = None
    progress: Annotated[bool, Field(description="In a stream: tell of the passes while they run.")] = False
    answer: Annotated[
        Text | None,
        Field(description="What another model has answered to the chat: it is judged and mended, none is made here."),
    ] = None


class StreamOptions(Strict):
    """continuous_usage_stats: load generators ask for it; the usage is told once, at the end."""

    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: Literal[False] | None = None


class Sampled(Strict):
    """What chat and text completions have in common."""

    model: Annotated[str, Field(max_length=256)]
    guard: GuardChoice | None = None
    timeout: Annotated[
        Annotated[float, Field(gt=0, le=86400)] | None,
        Field(description="Seconds until the request is given up, at most the server's own."),
    ] = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    seed: Annotated[int, Field(ge=-MAX_SEED, le=MAX_SEED)] | None = None
    stop: (
        Annotated[str, Field(max_length=256)]
        | Annotated[list[Annotated[str, Field(min_length=1, max_length=256)]], Field(max_length=16)]
        | None
    ) = None
    stop_token_ids: Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=64)] | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # Neutral values only.
    n: Literal[1] | None = None
    frequency_penalty: Zero | None = None
    presence_penalty: Zero | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    # Without any effect on the answer.
    user: Annotated[str, Field(max_length=1024)] | None = None


class ResponseFormat(Strict):
    type: Literal["text"]


class ChatRequest(Sampled):
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    # Neutral values only.
    logprobs: Literal[False] | None = None
    top_logprobs: Literal[0] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    response_format: ResponseFormat | None = None
    # Without any effect on the answer.
    metadata: dict[str, str] | None = None
    store: bool | None = None
    parallel_tool_calls: bool | None = None
    service_tier: Annotated[str, Field(max_length=64)] | None = None
    safety_identifier: Annotated[str, Field(max_length=1024)] | None = None
    prompt_cache_key: Annotated[str, Field(max_length=1024)] | None = None


Tokens: TypeAlias = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, max_length=1_000_000)]


class CompletionRequest(Sampled):
    """A raw prompt, one a request: a text, or token ids where no guard has to read them."""

    prompt: Text | Tokens | Annotated[list[Text], Field(min_length=1, max_length=1)]
    # Neutral values only.
    best_of: Literal[1] | None = None
    echo: Literal[False] | None = None
    logprobs: Literal[0] | None = None
    suffix: Literal[""] | None = None


class ModerationRequest(Strict):
    input: Text | Annotated[list[Text], Field(min_length=1, max_length=MAX_INPUTS)] | list[TextPart]
    model: Annotated[str, Field(max_length=256)] | None = None


class TokenizeText(Strict):
    prompt: Text
    model: Annotated[str, Field(max_length=256)] | None = None


class TokenizeChat(Strict):
    messages: Annotated[list[TextMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
    model: Annotated[str, Field(max_length=256)] | None = None


# What it gets.


class VerdictReport(BaseModel):
    """score: P(harmless) in [0, 1]; harmful below the threshold. No score where the detector gave none."""

    detector: str
    score: float | None
    threshold: float
    harmful: bool
    error: str | None = None


class PassReport(BaseModel):
    """One piece of model work. Times are milliseconds since the request was queued. text: only where the operator
    reveals what did not go out."""

    label: str
    model: str
    began_ms: float
    ended_ms: float | None
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    verdict: VerdictReport | None = None
    failed: bool = False
    text: str | None = None


class Replacement(BaseModel):
    """A beginning was shown that is not the answer; `text` takes its place."""

    text: str
    released_characters: int


class GuardReport(BaseModel):
    """What the guard did. added_ms: what the reply waited for it after the first answer was decoded."""

    policy: str
    release: ReleaseMode
    outcome: Literal["clean", "mended", "refused", "unguarded", "flagged"]
    reason: str | None
    rounds: int
    verdicts: list[VerdictReport]
    added_ms: float
    total_ms: float
    first_token_ms: float | None
    unscreened_characters: int
    passes: list[PassReport]
    replaced: Replacement | None = None


class PassProgress(BaseModel):
    label: str
    model: str
    tokens: int
    score: float | None
    ended: bool


class CachedTokens(BaseModel):
    cached_tokens: int


class UsageReport(BaseModel):
    """Of the model that answers; the guard's tokens are in its report."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class ReplyMessage(BaseModel):
    """content: None where the guard refused; `refusal` then says so."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: str | None = None


FinishReason: TypeAlias = Literal["stop", "length", "content_filter"]


class ChatChoice(BaseModel):
    index: int = 0
    message: ReplyMessage
    logprobs: None = None
    finish_reason: FinishReason


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: UsageReport
    guard: GuardReport


class Delta(BaseModel):
    role: Literal["assistant"] | None = None
    content: str | None = None
    refusal: str | None = None


class ChunkChoice(BaseModel):
    index: int = 0
    delta: Delta
    logprobs: None = None
    finish_reason: FinishReason | None = None


class ChatChunk(BaseModel):
    """progress: of the guard's passes, where it was asked for; such a chunk has no choices."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: UsageReport | None = None
    guard: GuardReport | None = None
    progress: list[PassProgress] | None = None


class TextChoice(BaseModel):
    """refusal: what the guard says instead; `text` is then empty, or in a stream not the answer."""

    index: int = 0
    text: str
    refusal: str | None = None
    logprobs: None = None
    finish_reason: FinishReason | None


class Completion(BaseModel):
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[TextChoice]
    usage: UsageReport | None = None
    guard: GuardReport | None = None
    progress: list[PassProgress] | None = None


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "stockade"
    max_model_len: int


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class ModerationResult(BaseModel):
    """One detector, hence one category. Its score is P(harmful), 1 - the detector's own; a text that the detector
    could not judge is flagged, with the reason."""

    flagged: bool
    categories: dict[Literal["harmful"], bool]
    category_scores: dict[Literal["harmful"], float]
    category_applied_input_types: dict[Literal["harmful"], list[Literal["text"]]]
    error: str | None = None


class Moderation(BaseModel):
    id: str
    model: str
    results: list[ModerationResult]


class Tokenized(BaseModel):
    tokens: list[int]
    count: int
    max_model_len: int


class Health(BaseModel):
    status: str


class Version(BaseModel):
    version: str


class OfferedGuard(BaseModel):
    """threshold: the least that a client may ask for; None where it has none."""

    policy: str
    threshold: float | None
    releases: list[ReleaseMode]


class Offer(BaseModel):
    """What a client may choose."""

    model: str
    images: bool
    default_policy: str
    default_release: ReleaseMode
    guards: list[OfferedGuard]
    texts_revealed: bool


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    error: ErrorDetail
