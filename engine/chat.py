"""Chats as the engine sees them, parsed from the message formats of OpenAI and of `transformers`.

Roles, shapes and images are checked here; templates and tokens are the codec's business.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .errors import EmptyChat, InvalidMessage, TooManyImages, UnknownRole, UnsupportedImage
from .images import ImageLimits, LoadedImage, decode_base64, load_image

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Message:
    """One turn. `role` is one of `ROLES`; texts and images stand in `parts` in their order."""

    role: str
    parts: tuple[str | LoadedImage, ...]

    @property
    def text(self) -> str:
        """The text parts joined, nothing between them (as chat templates of `transformers` do)."""
        return "".join(part for part in self.parts if isinstance(part, str))

    @property
    def images(self) -> tuple[LoadedImage, ...]:
        return tuple(part for part in self.parts if isinstance(part, LoadedImage))


@dataclass(frozen=True)
class Chat:
    """An immutable chat; equal to any other with the same roles, texts and pixels."""

    messages: tuple[Message, ...]

    @classmethod
    def parse(cls, messages: Any, limits: ImageLimits | None = None) -> Chat:
        """A chat from a string (one user turn), a `Chat`, or a list of message dicts.

        A message is `{"role": system | developer | user | assistant, "content": str | list of parts}`; a part is
        `{"type": "text", "text": str}`, `{"type": "image_url", "image_url": {"url": "data:…"}}` or
        `{"type": "image", "image" | "url" | "path" | "base64": …}`. Raises `EmptyChat`, `UnknownRole`,
        `InvalidMessage`, `TooManyImages` and whatever `load_image` raises.
        """
        limits = limits or ImageLimits()
        if isinstance(messages, Chat):
            chat = messages
        elif isinstance(messages, str):
            chat = cls.single(messages)
        elif isinstance(messages, list | tuple):
            budget = _ImageBudget(limits)
            chat = cls(tuple(_message(message, index, budget) for index, message in enumerate(messages)))
        else:
            raise InvalidMessage(
                f"a chat is a string or a list of messages with 'role' and 'content', not {_name(messages)}"
            )
        chat._check()
        return chat

    @classmethod
    def single(cls, text: str, images: tuple[LoadedImage, ...] = ()) -> Chat:
        """One user turn: the images, then the text."""
        return cls((Message("user", (*images, text)),))

    @property
    def query(self) -> str:
        """The text of the last user turn; "" if there is none."""
        return next((message.text for message in reversed(self.messages) if message.role == "user"), "")

    @property
    def images(self) -> tuple[LoadedImage, ...]:
        """All images of the chat, in order."""
        return tuple(image for message in self.messages for image in message.images)

    def without_images(self) -> Chat:
        """The same turns with their texts only."""
        return Chat(
            tuple(
                Message(message.role, tuple(part for part in message.parts if isinstance(part, str)))
                for message in self.messages
            )
        )

    def _check(self) -> None:
        if not self.messages:
            raise EmptyChat("the chat has no messages; send at least one user message")
        for index, message in enumerate(self.messages):
            if message.role not in ROLES:
                raise UnknownRole(f"message {index} has an unknown role; allowed: {', '.join(ROLES)}")
            if message.role == "system" and index:
                raise InvalidMessage(f"message {index} is a system message; only the first message may be one")
            if message.role != "user" and message.images:
                raise InvalidMessage(f"message {index} ({message.role}) has an image; only user messages may")
        last = self.messages[-1]
        if last.role != "user":
            raise EmptyChat(f"the last message is the {last.role}'s; it must be a user message to answer")
        if not last.images and not last.text.strip():
            raise EmptyChat("the last user message is empty; it needs a text or an image")


class _ImageBudget:
    """Loads the images of one chat and stops before there are too many of them."""

    def __init__(self, limits: ImageLimits) -> None:
        self.limits = limits
        self.count = 0

    def load(self, source: Any) -> LoadedImage:
        self.count += 1
        if self.count > self.limits.max_images:
            raise TooManyImages(f"the chat has more than {self.limits.max_images} images, which is the limit")
        return load_image(source, self.limits)


# What a message or a part may carry besides its content without changing what is asked.
_HARMLESS = frozenset({"name", "id", "index", "detail", "cache_control", "annotations", "mime_type", "media_type"})
_IMAGE_KEYS = ("image", "url", "path", "base64")


def _message(message: Any, index: int, budget: _ImageBudget) -> Message:
    where = f"message {index}"
    if not isinstance(message, Mapping):
        raise InvalidMessage(f"{where} is {_name(message)}; a message is a dict with 'role' and 'content'")
    role = message.get("role")
    if role == "developer":
        role = "system"
    if not isinstance(role, str) or role not in ROLES:
        shown = repr(role[:40]) if isinstance(role, str) else _name(role)
        raise UnknownRole(f"{where} has the role {shown}; allowed: {', '.join(ROLES)} (developer means system)")
    _only(message, where, "role", "content")
    content = message.get("content")
    if isinstance(content, str):
        return Message(role, (content,))
    if not isinstance(content, list | tuple):
        raise InvalidMessage(f"{where} has {_name(content)} as content; allowed: a string or a list of parts")
    return Message(role, tuple(_part(part, f"{where}, part {n}", budget) for n, part in enumerate(content)))


def _part(part: Any, where: str, budget: _ImageBudget) -> str | LoadedImage:
    if not isinstance(part, Mapping):
        raise InvalidMessage(f"{where} is {_name(part)}; a part is a dict with 'type'")
    kind = part.get("type")
    if kind == "text":
        _only(part, where, "type", "text")
        text = part.get("text")
        if not isinstance(text, str):
            raise InvalidMessage(f"{where} has {_name(text)} as text; allowed: a string")
        return text
    if kind == "image_url":
        _only(part, where, "type", "image_url")
        url = part.get("image_url")
        if isinstance(url, Mapping):
            _only(url, where, "url")
            url = url.get("url")
        if not isinstance(url, str):
            raise InvalidMessage(f"{where} has {_name(url)} as image_url; allowed: a data: URL")
        # In this format a path or an address would come from a remote client: never open either.
        if url[:5].lower() != "data:":
            raise UnsupportedImage(f"{where}: image_url takes data: URLs only; nothing is fetched")
        return budget.load(url)
    if kind == "image":
        _only(part, where, "type", *_IMAGE_KEYS)
        given = [key for key in _IMAGE_KEYS if part.get(key) is not None]
        if len(given) != 1:
            raise InvalidMessage(f"{where} is an image with {len(given)} of {', '.join(_IMAGE_KEYS)}; give one")
        source = part[given[0]]
        if given[0] == "base64":
            if not isinstance(source, str):
                raise InvalidMessage(f"{where} has {_name(source)} as base64; allowed: a string")
            source = source if source[:5].lower() == "data:" else decode_base64(source, budget.limits)
        return budget.load(source)
    shown = repr(kind[:40]) if isinstance(kind, str) else _name(kind)
    raise InvalidMessage(f"{where} has the type {shown}; allowed: text, image_url, image")


def _only(given: Mapping[Any, Any], where: str, *allowed: str) -> None:
    """Refuse keys whose content would be dropped silently; empty ones and harmless ones are ignored."""
    for key, value in given.items():
        empty = value is None or (isinstance(value, list | dict) and not value)
        if key not in allowed and key not in _HARMLESS and not empty:
            raise InvalidMessage(f"{where} has the key {str(key)[:40]!r}; allowed: {', '.join(allowed)}")


def _name(value: Any) -> str:
    return "nothing" if value is None else type(value).__name__
