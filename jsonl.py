"""Many requests from lines of JSON, many replies as lines of JSON: what `stockade generate` does with its files.

A line that is wrong becomes a line that says so; nothing stops the rest.
"""

from __future__ import annotations

import json
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from .engine.engine import Engine, Request
from .engine.errors import BadInput, InvalidSampling, StockadeError, UnsupportedImage
from .engine.guards import Guard
from .engine.request import FinishReason, Reply
from .engine.sampling import SamplingParams

MAX_LINE_BYTES = 64 << 20  # images come as data URLs
_KEYS = ("id", "messages", "prompt", "sampling")
_PATH_KEYS = ("image", "path", "url")


class BadLine(BadInput):
    """A line that is no request: not JSON, too long, or with keys that no request has."""


@dataclass
class _Slot:
    """A line's place in the output: a request under way, or what is to be written."""

    id: str | int
    request: Request | None = None
    record: dict[str, Any] | None = None

    def finished(self) -> dict[str, Any] | None:
        if self.record is None and self.request is not None and self.request.reply is not None:
            self.record = reply_record(self.id, self.request.reply)
        return self.record


def answer_lines(
    engine: Engine,
    lines: Iterable[bytes],
    *,
    guard: Guard,
    sampling: SamplingParams,
    ahead: int = 64,
    image_root: Path | None = None,
) -> Iterator[dict[str, Any]]:
    """Answer the requests of `lines` together and yield one record a line, in the order of the lines.

    Lines are read as places get free: at most `ahead` are held at a time, answered ones that wait for an earlier
    line included. Empty lines are left out. A request without an id gets its line's number, from 1. sampling: for
    what a line does not say itself. image_root: the folder that images named by a path must lie in; None: no
    image may be named by a path. Closing the generator aborts what is under way.
    """
    numbered = ((number, line) for number, line in enumerate(lines, 1) if line.strip())
    slots: deque[_Slot] = deque()
    more = True
    try:
        while more or slots:
            while more and len(slots) < ahead:
                number, line = next(numbered, (0, None))
                if line is None:
                    more = False
                else:
                    slots.append(_submit(engine, number, line, guard, sampling, image_root))
            while slots and (record := slots[0].finished()) is not None:
                slots.popleft()
                yield record
            if slots and slots[0].finished() is None:
                engine.step()
    finally:
        for slot in slots:
            if slot.request is not None and slot.request.reply is None:
                engine.abort(slot.request.id)


def read_lines(file: BinaryIO) -> Iterator[bytes]:
    """The lines of a file; one longer than `MAX_LINE_BYTES` comes cut to one byte more, its rest is skipped."""
    while line := file.readline(MAX_LINE_BYTES + 1):
        rest = line
        while len(rest) > MAX_LINE_BYTES and not rest.endswith(b"\n"):
            rest = file.readline(MAX_LINE_BYTES + 1)
        yield line


def count_lines(path: Path) -> int:
    """How many lines are not empty."""
    with open(path, "rb") as file:
        return sum(1 for line in read_lines(file) if line.strip())


@contextmanager
def reading(path: Path) -> Iterator[BinaryIO]:
    """The file, or stdin for "-"."""
    if str(path) == "-":
        yield sys.stdin.buffer
    else:
        with open(path, "rb") as file:
            yield file


@contextmanager
def writing(path: Path) -> Iterator[TextIO]:
    """The file, made anew, or stdout for "-"."""
    if str(path) == "-":
        yield sys.stdout
    else:
        with open(path, "w", encoding="utf-8") as file:
            yield file


def reply_record(number: str | int, reply: Reply) -> dict[str, Any]:
    """A reply as one line says it. `reason` says why it was refused, `error` what failed; null where nothing did."""
    told = reply.to_dict()
    for verdict, plain in zip(reply.verdicts, told["verdicts"], strict=True):
        plain["harmless"] = verdict.harmless
    failed = reply.finish_reason is FinishReason.ERROR
    return {
        "id": number,
        **{key: told[key] for key in ("text", "outcome", "finish_reason", "verdicts", "usage", "trace")},
        "reason": None if failed else reply.error,
        "error": {"type": "PassError", "message": reply.error} if failed else None,
    }


def _submit(
    engine: Engine, number: int, line: bytes, guard: Guard, sampling: SamplingParams, image_root: Path | None
) -> _Slot:
    slot = _Slot(number)
    try:
        asked = _parse(line)
        slot.id = asked.get("id", number)
        messages = asked["prompt"] if "prompt" in asked else _located(asked["messages"], image_root)
        params = _sampling(asked.get("sampling"), sampling)
        slot.request = engine.submit(messages, guard=guard, sampling=params)
    except StockadeError as error:
        slot.record = {"id": slot.id, "error": {"type": type(error).__name__, "message": str(error)}}
    return slot


def _parse(line: bytes) -> dict[str, Any]:
    if len(line) > MAX_LINE_BYTES:
        raise BadLine(f"the line has more than {MAX_LINE_BYTES:,} bytes, which is the limit")
    try:
        asked = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadLine(f"the line is not JSON: {error}") from None
    if not isinstance(asked, dict):
        raise BadLine(f"the line is a JSON {type(asked).__name__}; a request is an object")
    unknown = [key for key in asked if key not in _KEYS]
    if unknown:
        raise BadLine(f"the request has the key {unknown[0][:40]!r}; allowed: {', '.join(_KEYS)}")
    if ("prompt" in asked) == ("messages" in asked):
        raise BadLine("a request has either messages or a prompt")
    if "prompt" in asked and not isinstance(asked["prompt"], str):
        raise BadLine(f"prompt must be a string, not {type(asked['prompt']).__name__}")
    if isinstance(asked.get("id", 0), bool) or not isinstance(asked.get("id", 0), str | int):
        raise BadLine("id must be a string or a whole number")
    return asked


def _sampling(asked: Any, default: SamplingParams) -> SamplingParams:
    if asked is None:
        return default
    known = [field.name for field in fields(SamplingParams)]
    if not isinstance(asked, dict) or not all(key in known for key in asked):
        raise InvalidSampling(f"sampling must be an object with keys among {', '.join(known)}")
    try:
        return replace(default, **asked)
    except TypeError as error:  # a number where a list belongs
        raise InvalidSampling(f"sampling has a value of the wrong type: {error}") from None


def _located(messages: Any, root: Path | None) -> Any:
    """The messages with the paths of images made absolute. Raises `UnsupportedImage` for one outside of `root`."""
    if not isinstance(messages, list):
        return messages
    return [_located_message(message, root) for message in messages]


def _located_message(message: Any, root: Path | None) -> Any:
    if not isinstance(message, dict) or not isinstance(message.get("content"), list):
        return message
    return message | {"content": [_located_part(part, root) for part in message["content"]]}


def _located_part(part: Any, root: Path | None) -> Any:
    if not isinstance(part, dict) or part.get("type") != "image":
        return part
    return part | {key: _inside(part[key], root) for key in _PATH_KEYS if isinstance(part.get(key), str)}


def _inside(source: str, root: Path | None) -> str:
    if source[:5].lower() == "data:":
        return source
    if root is None:
        raise UnsupportedImage("images may not be named by a path here; send a data: URL")
    try:
        path = (root / source).resolve()
        inside = path.is_relative_to(root.resolve())
    except (OSError, ValueError, RuntimeError) as error:
        raise UnsupportedImage(f"{source[:80]!r} is not a path: {error}") from None
    if not inside:
        raise UnsupportedImage(f"{source[:80]!r} lies outside of the folder of images, {root}")
    return str(path)
