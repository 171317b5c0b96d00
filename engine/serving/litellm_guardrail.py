"""A guardrail for LiteLLM's proxy: answers of any model go through a stockade server's guard, or an engine's here.

It lets an answer out when the guard has cleared it, in its words or the guard's; where it gets no verdict, it raises.
Nothing of the engine is imported unless an engine is asked for: the proxy may live in an environment of its own.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any, Protocol

import httpx
from litellm.exceptions import GuardrailRaisedException
from litellm.integrations.custom_guardrail import CustomGuardrail
from litellm.types.guardrails import GuardrailEventHooks
from litellm.types.utils import Delta, Message, ModelResponse, ModelResponseStream, StreamingChoices

ROLES = frozenset({"system", "developer", "user", "assistant"})
SECONDS = 60.0  # for a verdict, and what takes an answer's place
_UNSAID = ("role", "content")  # what else a message has may be text, too


class Guard(Protocol):
    async def __call__(self, body: dict[str, Any]) -> dict[str, Any]:
        """The chat completion of a request to `/v1/chat/completions`. Raises where there is none."""


class StockadeGuardrail(CustomGuardrail):
    """`guardrail: stockade.engine.serving.litellm_guardrail.StockadeGuardrail` in the proxy's configuration.

    api_base: a stockade server, as in http://127.0.0.1:8000; api_key: for it. engine: in place of a server, what
    `stockade serve --model` takes: an engine in this process, under the guard `policy` (protector). model: the
    name that the server serves. policy: one of its guards; None: its default. seconds: for one answer.

    Works for chat completions, whole and streamed; a stream is held back until all of it is cleared. Answers of
    another shape are refused. Without the images and tools of a chat: the guard reads its texts.
    """

    def __init__(
        self,
        api_base: str | None = None,
        api_key: str | None = None,
        engine: str | None = None,
        model: str = "smol",
        policy: str | None = None,
        seconds: float = SECONDS,
        **options: Any,
    ) -> None:
        if (api_base is None) == (engine is None):
            raise ValueError("name either api_base, a stockade server, or engine, one in this process")
        options.setdefault("supported_event_hooks", [GuardrailEventHooks.post_call])
        super().__init__(**options)
        self._model = engine or model
        self._policy = policy
        self._guard: Guard
        if api_base is not None:
            self._guard = _Server(api_base, api_key, seconds)
        else:
            self._guard = _engine_here(self._model, policy or "protector", seconds)

    async def async_post_call_success_hook(self, data: dict, user_api_key_dict: Any, response: Any) -> Any:
        """Raises `GuardrailRaisedException` where there is no verdict."""
        if not isinstance(response, ModelResponse):
            raise self._refusal(f"answers of the type {type(response).__name__} are not judged")
        for choice in response.choices:
            message: Any = choice.message
            said = await self._judged(data, _said(message.model_dump(exclude_none=True)))
            if said is not None:
                choice.message = Message(role="assistant", content=said["text"])
                choice.finish_reason = said["finish_reason"]
        return response

    async def async_post_call_streaming_iterator_hook(
        self, user_api_key_dict: Any, response: Any, request_data: dict
    ) -> AsyncIterator[ModelResponseStream]:
        """All pieces once all are cleared, or what the guard says instead. Raises as the hook for whole answers."""
        pieces: list[ModelResponseStream] = []
        parts: dict[int, dict[str, str]] = {}
        async for piece in response:
            if not isinstance(piece, ModelResponseStream):
                raise self._refusal(f"pieces of the type {type(piece).__name__} are not judged")
            pieces.append(piece)
            for choice in piece.choices:
                said = parts.setdefault(choice.index, {})
                for name, value in choice.delta.model_dump(exclude_none=True).items():
                    said[name] = said.get(name, "") + (value if isinstance(value, str) else _json(value))
        instead = {index: await self._judged(request_data, _said(said)) for index, said in parts.items()}
        if not any(instead.values()):
            for piece in pieces:
                yield piece
            return
        for index, mended in instead.items():
            text = parts[index].get("content", "") if mended is None else mended["text"]
            reason = "stop" if mended is None else mended["finish_reason"]
            for delta, end in ((Delta(content=text, role="assistant"), None), (Delta(), reason)):
                choices = [StreamingChoices(index=index, delta=delta, finish_reason=end)]
                yield ModelResponseStream(
                    id=pieces[0].id, created=pieces[0].created, model=pieces[0].model, choices=choices
                )

    async def _judged(self, data: dict, text: str) -> dict[str, str] | None:
        """None where the text may go out as it is, else what takes its place."""
        if not text:
            return None
        wanted = {"answer": text} if self._policy is None else {"answer": text, "policy": self._policy}
        body = {"model": self._model, "messages": _texts(data.get("messages")), "guard": wanted}
        try:
            reply = await self._guard(body)
            message, reason = reply["choices"][0]["message"], reply["choices"][0]["finish_reason"]
            outcome, verdicts = reply["guard"]["outcome"], reply["guard"]["verdicts"]
            if not verdicts:
                raise ValueError("the guard gave no verdict")
            said = message["refusal"] if outcome == "refused" else message["content"]
            if outcome == "clean" and said == text:
                return None
            if outcome not in ("mended", "refused") or not isinstance(said, str):
                raise ValueError(f"the guard's outcome is {outcome}")
        except Exception as error:  # whatever it is: nothing goes out that was not cleared
            raise self._refusal(f"no verdict: {type(error).__name__}") from error
        return {"text": said, "finish_reason": str(reason)}

    def _refusal(self, why: str) -> GuardrailRaisedException:
        return GuardrailRaisedException(guardrail_name=self.guardrail_name, message=why, status_code=503)


class _Server:
    """A stockade server."""

    def __init__(self, url: str, key: str | None, seconds: float) -> None:
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        self._url = url.rstrip("/").removesuffix("/v1") + "/v1/chat/completions"
        self._client = httpx.AsyncClient(headers=headers, timeout=seconds)

    async def __call__(self, body: dict[str, Any]) -> dict[str, Any]:
        reply = await self._client.post(self._url, json=body)
        reply.raise_for_status()
        return reply.json()


def _engine_here(model: str, policy: str, seconds: float) -> Guard:
    """An engine in this process, in place of a server."""
    from ..async_engine import AsyncEngine
    from ..named import EngineNames, guard_named
    from .forms import ChatForm
    from .limits import ANONYMOUS, KeyLimits, Tenant
    from .policy import Policy
    from .protocol import ChatRequest
    from .service import Service, Settings

    settings = Settings(model, Policy({policy: guard_named(policy)}, policy), deadline=seconds)
    service = Service(AsyncEngine(EngineNames(model).engine()), settings)
    tenant = Tenant(ANONYMOUS, KeyLimits())

    async def ask(body: dict[str, Any]) -> dict[str, Any]:
        exchange = await service.chat(ChatRequest.model_validate(body), tenant, ChatForm())
        return json.loads(await exchange.whole())

    return ask


def _said(message: dict[str, Any]) -> str:
    """All that a message says: its content, and after it whatever else stands in it."""
    content = message.get("content") or ""
    said = [content if isinstance(content, str) else _json(content)]
    said += [
        value if isinstance(value, str) else _json(value)
        for name, value in message.items()
        if name not in _UNSAID and value
    ]
    return "\n".join(part for part in said if part)


def _texts(messages: Any) -> list[dict[str, Any]]:
    """A chat's turns as far as they are texts; the last one is a user's."""
    turns: list[dict[str, Any]] = []
    for message in messages if isinstance(messages, list) else ():
        content = message.get("content")
        if isinstance(content, list):
            content = "\n".join(str(part["text"]) for part in content if isinstance(part, dict) and "text" in part)
        if message.get("role") in ROLES and isinstance(content, str) and content:
            turns.append({"role": message["role"], "content": content})
    while turns and turns[-1]["role"] != "user":
        turns.pop()
    return turns or [{"role": "user", "content": "(no question)"}]


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)
