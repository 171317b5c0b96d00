"""What a server does for its clients: a guard within the operator's bounds, the engine, and who is told of it.

How a reply leaves is an `Exchange`'s business; HTTP begins one file further up.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from time import monotonic, time
from typing import Any

from ..async_engine import AsyncEngine
from ..chat import Chat
from ..engine import Engine
from ..errors import BadInput, PromptTooLong, UnknownModel, UnsupportedImage
from ..guards import Detector, GenerativeGuard, HarmHead
from ..images import ImageLimits
from ..request import Verdict
from ..running import Request
from ..sampling import SamplingParams
from . import protocol as wire
from .audit import AuditLog
from .exchange import Exchange
from .forms import About, Form, verdict_report
from .limits import Tenant
from .metrics import Metrics
from .policy import Policy
from .raw_prompts import continued, given, moderated
from .remote_images import RemoteImages
from .spans import Spans

MODERATED_AT_ONCE = 32  # texts of one request


@dataclass(frozen=True)
class Settings:
    """What an operator sets. model: the name under which it is served. deadline: seconds of a request at most.
    max_tokens: of an answer, at most and if the client names none. reveal: whether replies tell the texts of passes
    that did not go out. images: None where nothing is fetched.
    """

    model: str
    policy: Policy
    deadline: float = 120.0
    max_tokens: int = 1024
    reveal: bool = False
    images: RemoteImages | None = None
    image_limits: ImageLimits = field(default_factory=lambda: ImageLimits(max_bytes=12 << 20))


class Service:
    """One engine under one operator's settings. spans: None where nothing is traced.

    Raises `InvalidGuard` for a policy that the engine cannot run.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        settings: Settings,
        audit: AuditLog | None = None,
        metrics: Metrics | None = None,
        spans: Spans | None = None,
    ) -> None:
        inner = engine.engine
        self.engine = engine
        self.settings = replace(settings, policy=settings.policy.bound(inner.traits))
        self.audit = audit
        self.metrics = metrics or Metrics(engine)
        self.spans = spans
        self.created = int(time())
        self.context = inner.models["mllm"].context
        self.image_limits = replace(settings.image_limits, local_files=False)
        self.detector = self._moderator()

    @property
    def ready(self) -> bool:
        return self.engine.ready and (self.audit is None or self.audit.writable)

    def check_model(self, name: str) -> None:
        """Raises `UnknownModel` for any name but the served one."""
        if name != self.settings.model:
            raise UnknownModel(f"there is no such model here; there is {self.settings.model!r}")

    def offer(self) -> wire.Offer:
        inner, policy = self.engine.engine, self.settings.policy
        return wire.Offer(
            model=self.settings.model,
            images=inner.models["mllm"].max_images > 0,
            default_policy=policy.default,
            default_release=policy.release,
            guards=policy.offered(inner.traits),
            texts_revealed=self.settings.reveal,
        )

    async def chat(self, body: wire.ChatRequest, tenant: Tenant, form: Form, parent: str | None = None) -> Exchange:
        """Begin a chat. Raises what the engine and the policy raise, before anything was answered."""
        self.check_model(body.model)
        self.engine.check_room()  # before the work of reading the request
        chosen = self.settings.policy.choose(body.guard, self.engine.engine.traits)
        sampling = self._sampling(body, body.max_completion_tokens or body.max_tokens)
        began = monotonic()
        chat = await self.parse(body.messages)
        answer = None if body.guard is None else body.guard.answer
        if answer is not None:
            chosen = chosen._replace(release="verdict")  # all of it is there, and none of it was read along

        def submit(engine: Engine) -> Request:
            options: dict[str, Any] = {"sampling": sampling, "salt": tenant.salt, "streaming": bool(body.stream)}
            if answer is None:
                return engine.submit(chat, guard=chosen.guard, release=chosen.release, **options)
            loop = given(answer, chosen.guard.run(chat, engine.traits, chosen.release))
            return engine.driver.submit(loop, guarded=True, **options)

        exchange = Exchange(self, form, chosen, tenant, chat, self._about("chatcmpl"), parent)
        await exchange.begin(body, began, submit)
        return exchange

    async def complete(
        self, body: wire.CompletionRequest, tenant: Tenant, form: Form, parent: str | None = None
    ) -> Exchange:
        """Begin the continuation of a raw prompt; its text is the question that a guard knows of.

        Raises as `chat`.
        """
        self.check_model(body.model)
        self.engine.check_room()  # before the work of reading the request
        chosen = self.settings.policy.choose(body.guard, self.engine.engine.traits)
        sampling = self._sampling(body, body.max_tokens)
        prompt = body.prompt[0] if isinstance(body.prompt, list) and isinstance(body.prompt[0], str) else body.prompt
        ids = await self.engine.call(lambda engine: engine.encode_prompt(prompt))
        text = prompt if isinstance(prompt, str) else self.engine.engine.models["mllm"].codec.decode(ids)
        chat = Chat.single(text)
        exchange = Exchange(self, form, chosen, tenant, chat, self._about("cmpl"), parent)
        await exchange.begin(
            body,
            monotonic(),
            lambda engine: engine.driver.submit(
                continued(ids, chosen.guard.run(chat, engine.traits, chosen.release)),
                sampling,
                tenant.salt,
                bool(body.stream),
                guarded=True,
            ),
        )
        return exchange

    async def moderate(self, body: wire.ModerationRequest, tenant: Tenant) -> wire.Moderation:
        """Verdicts on texts, in their order. Raises as `chat`, and `UnknownModel` where there is no detector."""
        if self.detector is None:
            raise UnknownModel("there is no harm detector here")
        if isinstance(body.input, str):
            texts = [body.input]
        else:
            texts = [one if isinstance(one, str) else one.text for one in body.input]
        ends, slots = monotonic() + self.settings.deadline, asyncio.Semaphore(MODERATED_AT_ONCE)
        tasks = [asyncio.create_task(self._moderate(text, self.detector, tenant, ends, slots)) for text in texts]
        try:
            results = [_moderation(verdict) for verdict in await asyncio.gather(*tasks)]
        finally:
            for task in tasks:
                task.cancel()
        about = self._about("modr")
        if self.audit is not None:
            for text, result in zip(texts, results, strict=True):
                facts = {"request": about.id, "endpoint": "moderations", "key": tenant.name}
                score = result.category_scores["harmful"]
                self.audit.write(
                    "decision", **facts, **self.audit.said("text", text), flagged=result.flagged, p_harmful=score
                )
        return wire.Moderation(id=about.id, model=self.detector.name, results=results)

    async def tokenize(self, body: wire.TokenizeText | wire.TokenizeChat) -> wire.Tokenized:
        """Raises `BadInput` for a text that is too long to be a prompt, and as `chat` does."""
        if body.model is not None:
            self.check_model(body.model)
        if isinstance(body, wire.TokenizeText):
            text = body.prompt
            if len(text) > self.context * 64:
                raise BadInput(f"the text has {len(text)} characters, more than {self.context} tokens could hold")
            ids = await self.engine.call(lambda engine: engine.models["mllm"].codec.encode_text(text))
        else:
            chat = await self.parse(body.messages)
            ids = await self.engine.call(lambda engine: engine.models["mllm"].codec.encode_chat(chat))
        return wire.Tokenized(tokens=ids, count=len(ids), max_model_len=self.context)

    async def parse(self, messages: Sequence[wire.Message | wire.TextMessage]) -> Chat:
        """The engine's chat; images are fetched where that is allowed, and decoded, in threads."""
        plain = [_plain(message) for message in messages]
        if not _has_images(messages):
            return Chat.parse(plain, self.image_limits)
        return await asyncio.to_thread(self._parse_images, plain)

    # Inside.

    def _parse_images(self, messages: list[dict[str, Any]]) -> Chat:
        count = 0
        for message in messages:
            parts = message["content"] if isinstance(message["content"], list) else []
            for number, part in enumerate(parts):
                if part["type"] != "image_url":
                    continue
                count += 1
                if count <= self.image_limits.max_images and part["image_url"]["url"][:5].lower() != "data:":
                    if self.settings.images is None:
                        raise UnsupportedImage("images are not fetched here; send a data: URL")
                    data = self.settings.images.fetch(part["image_url"]["url"])
                    parts[number] = {"type": "image", "image": data}
        return Chat.parse(messages, self.image_limits)

    def _sampling(self, body: wire.Sampled, max_tokens: int | None) -> SamplingParams:
        most = self.settings.max_tokens
        given = {
            name: value
            for name in ("top_p", "top_k", "min_p", "repetition_penalty", "seed", "stop_token_ids", "ignore_eos")
            if (value := getattr(body, name)) is not None
        }
        return SamplingParams(
            temperature=1.0 if body.temperature is None else body.temperature,
            max_tokens=most if max_tokens is None else min(max_tokens, most),
            stop=(body.stop,) if isinstance(body.stop, str) and body.stop else tuple(body.stop or ()),
            **given,
        )

    async def _moderate(
        self, text: str, detector: Detector, tenant: Tenant, ends: float, slots: asyncio.Semaphore
    ) -> Verdict:
        async with slots:
            try:
                request = await self.engine.begin(
                    lambda engine: engine.driver.submit(
                        moderated(text, detector), None, tenant.salt, False, guarded=True
                    ),
                    timeout=max(0.001, ends - monotonic()),
                )
            except PromptTooLong:
                return Verdict.failed(detector.name, "too_long")
            try:
                reply = await request.reply()
            finally:
                request.abort()
        self.metrics.replied("moderations", "moderation", reply)
        if not reply.verdicts:
            return Verdict.failed(detector.name, "failed")
        return reply.verdicts[0]

    def _moderator(self) -> Detector | None:
        """The harm detector of the default guard, or the engine's own."""
        inner = self.engine.engine
        guards = self.settings.policy.guards
        for name in sorted(guards, key=lambda name: name != self.settings.policy.default):
            detector = guards[name].detector
            if isinstance(detector, HarmHead | GenerativeGuard):
                return detector
        traits = inner.traits.get("detector")
        if traits is None or traits.template is None or traits.in_context:
            return None
        return HarmHead().bind(inner.traits)

    def _about(self, kind: str) -> About:
        return About(f"{kind}-{secrets.token_hex(12)}", int(time()), self.settings.model)


def _plain(message: wire.Message | wire.TextMessage) -> dict[str, Any]:
    """A message as the engine reads it; what an assistant refused with is what it said."""
    content: Any = message.content
    if content is None and message.role == "assistant":
        content = message.refusal or ""
    if isinstance(content, list):
        content = [part.model_dump() for part in content]
    return {"role": message.role, "content": content}


def _has_images(messages: Sequence[wire.Message | wire.TextMessage]) -> bool:
    return any(
        isinstance(part, wire.ImagePart)
        for message in messages
        if isinstance(message.content, list)
        for part in message.content
    )


def _moderation(verdict: Verdict) -> wire.ModerationResult:
    """Moderation endpoints report P(harmful); a verdict that failed is a flag."""
    report = verdict_report(verdict)
    return wire.ModerationResult(
        flagged=verdict.harmful,
        categories={"harmful": verdict.harmful},
        category_scores={"harmful": 1.0 if report.score is None else 1.0 - report.score},
        category_applied_input_types={"harmful": ["text"]},
        error=report.error,
    )
