"""The audit log: one JSON line a decision, each chained to the one before, so that a missing or altered line shows.

Texts and images stand in it as keyed hashes. The chain is keyed, too: whoever has the log but not its key can neither
mend a chain nor guess a text.
"""

from __future__ import annotations

import hmac
import json
import os
import secrets
import threading
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from ..chat import Chat
from ..errors import AuditBroken, AuditFailed, BadInput

START = "0" * 64  # what the first line is chained to
KEY_BYTES = 32
_TAIL = 1 << 16  # bytes from the end in which the last two lines are looked for first


class AuditLog:
    """Appends to a log; one process at a time. texts: whether the texts themselves are written, too.

    Raises `BadInput` where another process writes the log, and `AuditBroken` where its end is not what this key left.
    """

    def __init__(self, file: Path, key: bytes, texts: bool = False) -> None:
        self.file = file
        self.texts = texts
        self._key = key
        self._lock = threading.Lock()
        self._failed = False
        self._fd = os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            _lock_file(self._fd, file)
            self._number, self._last = self._end()
        except BaseException:
            os.close(self._fd)
            raise
        self.write("open")

    def write(self, event: str, **facts: Any) -> None:
        """Append one line; when this returns the system has it. Raises `AuditFailed`, from then on always."""
        with self._lock:
            if self._failed:
                raise AuditFailed("the audit log cannot be written")
            line = {"number": self._number + 1, "time": datetime.now(UTC).isoformat(), "event": event, **facts}
            chained = _chained(self._key, self._last, line)
            data = (_json({**line, "chain": chained}) + "\n").encode()
            try:
                if os.write(self._fd, data) != len(data):
                    raise OSError("the line was cut")
            except OSError as error:
                self._failed = True  # half a line may stand there: nothing can be chained to it
                raise AuditFailed(f"the audit log cannot be written: {error.strerror or error}") from None
            self._number, self._last = line["number"], chained

    @property
    def writable(self) -> bool:
        return not self._failed

    def hashed(self, text: str) -> str:
        """A keyed hash of a text: equal texts have equal hashes, and without the key nobody can guess."""
        return self._hash(b"text", text.encode("utf-8", "surrogatepass"))

    def asked(self, chat: Chat) -> dict[str, Any]:
        """What stands in the log of a chat."""
        turns = "".join(f"{message.role}\0{message.text}\0" for message in chat.messages)
        facts: dict[str, Any] = {
            "chat": self.hashed(turns),
            "query": self.hashed(chat.query),
            "images": [self._hash(b"image", image.key) for image in chat.images],
        }
        if self.texts:
            facts["messages"] = [{"role": message.role, "text": message.text} for message in chat.messages]
        return facts

    def said(self, name: str, text: str) -> dict[str, Any]:
        """What stands in the log of a text that went out, or did not."""
        facts: dict[str, Any] = {name: self.hashed(text), f"{name}_characters": len(text)}
        return {**facts, f"{name}_text": text} if self.texts else facts

    def close(self) -> None:
        """Write the closing line, without which the log was cut, or its writer died."""
        try:
            self.write("close")
        except AuditFailed:
            pass  # it was told already
        finally:
            os.close(self._fd)

    def _hash(self, kind: bytes, data: bytes) -> str:
        return hmac.digest(self._key, kind + b"\0" + data, "sha256").hex()

    def _end(self) -> tuple[int, str]:
        """Number and chain of the last line."""
        size = os.fstat(self._fd).st_size
        if not size:
            return 0, START
        tail = _TAIL
        while (data := os.pread(self._fd, min(size, tail), max(0, size - tail))).count(b"\n") < 3 and tail < size:
            tail *= 8
        last = data.splitlines()[-1]
        previous = data.splitlines()[-2] if data.count(b"\n") > 1 else None
        try:
            if not data.endswith(b"\n"):
                raise ValueError("its last line is cut")
            line = json.loads(last)
            before = START if previous is None else json.loads(previous)["chain"]
            chain = line.pop("chain")
            if not hmac.compare_digest(_chained(self._key, before, line), chain):
                raise ValueError("its last line was altered, or it has another key")
            return int(line["number"]), str(chain)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            why = error if type(error) is ValueError else "its last line is none of an audit log"
            raise AuditBroken(
                f"{self.file}: {why}; see `stockade audit verify`, and move the file away to begin another"
            ) from None


class Verified(NamedTuple):
    """An audit log whose every line is in place. closed: its last line says that nothing follows."""

    lines: int
    decisions: int
    closed: bool
    last: str


def verify(lines: Iterable[bytes], key: bytes, expected: str | None = None) -> Verified:
    """Check a log's chain. Raises `AuditBroken` with the first line that is not what was written there.

    That lines are missing at the end shows by `closed`, or by `expected`, the last one's chain value.
    """
    last, count, decisions, event = START, 0, 0, ""
    for number, data in enumerate(lines, 1):
        try:
            line = json.loads(data)
            chain = line.pop("chain")
            event = line["event"]
            sound = data.endswith(b"\n") and hmac.compare_digest(_chained(key, last, line), chain)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            sound = False
        if not sound or line["number"] != number:
            raise AuditBroken(f"line {number} is not what was written there, or the line before it is missing")
        last, count = chain, number
        decisions += event == "decision"
    if expected is not None and not hmac.compare_digest(last.encode(), expected.encode()):
        raise AuditBroken("the log ends with another line than expected: lines are missing at its end, or were added")
    return Verified(count, decisions, event == "close", last)


def read_key(file: Path, create: bool = False) -> bytes:
    """The key of a log, in hexadecimal digits in a file of its own. create: make one where there is none.

    Raises `BadInput` where it is none.
    """
    if create and not file.exists():
        with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="ascii") as out:
            out.write(secrets.token_hex(KEY_BYTES) + "\n")
    try:
        key = bytes.fromhex(file.read_text(encoding="ascii").strip())
    except (ValueError, FileNotFoundError):
        key = b""
    if len(key) < KEY_BYTES:
        raise BadInput(f"{file} holds no key of an audit log: {2 * KEY_BYTES} hexadecimal digits")
    return key


def _lock_file(fd: int, file: Path) -> None:
    try:
        import fcntl  # not on Windows
    except ImportError:
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise BadInput(f"{file} is written by another process") from None


def _json(value: Any) -> str:
    # ASCII only: a line has no line ends in it, whatever the texts
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _chained(key: bytes, last: str, line: dict[str, Any]) -> str:
    return hmac.digest(key, f"line\0{last}\0{_json(line)}".encode(), "sha256").hex()
