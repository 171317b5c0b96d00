"""Token ids to text while they come: only text that later ids cannot change leaves.

Two decoders with one contract; a codec knows which of them its tokenizer needs.
"""

from __future__ import annotations

import codecs
from typing import Protocol

from tokenizers import Tokenizer


class Detokenizer(Protocol):
    """Text of a growing list of ids: what `push` and `flush` return, joined, equals `decode` of all ids."""

    def push(self, id: int) -> str:
        """The text that became final with this id; "" while a character may still be incomplete."""

    def flush(self) -> str:
        """The text still held back. Call it once, after the last id."""


class ByteStream:
    """Byte-level tokens are bytes; an incremental UTF-8 decoder replaces what is invalid as the tokenizer does."""

    def __init__(self, backend: Tokenizer, skipped: frozenset[int]) -> None:
        self._backend = backend
        self._skipped = skipped
        self._bytes = _byte_values()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, id: int) -> str:
        token = None if id in self._skipped else self._backend.id_to_token(id)
        if token is None:
            return ""
        try:
            return self._utf8.decode(bytes([self._bytes[char] for char in token]))
        except KeyError:  # an added token, written as it is
            return self._utf8.decode(token.encode())

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


class WindowStream:
    """Decodes the ids since the last but one time that text became final, and returns what the last ids add."""

    def __init__(self, backend: Tokenizer, skipped: frozenset[int], byte_ids: frozenset[int]) -> None:
        self._backend = backend
        self._skipped = skipped
        self._byte_ids = byte_ids
        self._ids: list[int] = []  # context already returned, then what is held back
        self._read = 0  # how many of them are context

    def push(self, id: int) -> str:
        if id in self._skipped or self._backend.id_to_token(id) is None:
            return ""
        self._ids.append(id)
        # One bad byte token turns its whole run into replacement characters: wait for the run's end.
        if id in self._byte_ids:
            return ""
        return self._advance(hold=not self._byte_ids)

    def flush(self) -> str:
        return self._advance(hold=False)

    def _advance(self, hold: bool) -> str:
        before = self._backend.decode(self._ids[: self._read], skip_special_tokens=False)
        text = self._backend.decode(self._ids, skip_special_tokens=False)
        if len(text) <= len(before) or (hold and text.endswith("\ufffd")):
            return ""
        self._ids, self._read = self._ids[self._read :], len(self._ids) - self._read
        return text[len(before) :]


def _byte_values() -> dict[str, int]:
    """GPT-2's table: the printable characters are their own bytes, the rest stand from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}
