"""Token ids of a prompt whose last text grows while another model writes it. Not a detokenizer: text in, ids out."""

from __future__ import annotations

import re

from .text import Codec, Segment, Token, Untrusted, encodable

_WINDOW = 16  # handed-out tokens encoded again with new text
_AGREE = 4  # tokens in a row that must come out as before for what follows them to be believed
_LONGEST_TAIL = 24  # characters held back for want of a word's end ...
_SHORTEST_TAIL = 8  # ... and those that still are when the tail grew longer than that
_WORD_ENDS = re.compile(r".*(?:\S(?= )|\w(?=\s))", re.DOTALL)  # in "so.\n" a token may hold the end and the blank


class GrowingPrompt:
    """Token ids of fixed segments followed by a text that grows.

    `text` is the growing text so far and `ids` what has been handed out of its prompt. The last word, a run of
    blanks or an unfinished token is held back, since more text may change its tokens. `covers` counts the
    characters of `text` that `ids` hold completely; `pool_from` is the index of the first id that holds any
    (`len(ids)` while there is none). What `append` hands out was the tokenizer's own encoding at the time and
    may be rolled back; only `close` vouches for it.

    An append encodes the new text and a window of a few tokens before it, which must come out as they did in
    the text: a token boundary of BPE and of Unigram splits a text into two that are encoded independently, and
    the window absorbs what a cut changes in normalizers and pre-tokenizers. Where the two do not meet, the whole
    prompt is encoded anew, but only once it has grown by a quarter since the last time; until then the ids wait.

    Raises `ImagesNotSupported` and `InvalidMessage`, here and later, as `Codec.encode` does.
    """

    def __init__(self, codec: Codec, before: tuple[Segment, ...]) -> None:
        self.text = ""
        self.ids: list[int] = []
        self.covers = 0
        self.pool_from = 0
        self._codec = codec
        self._before = before
        self._context = codec.encode(before, add_special_tokens=True)
        self._fixed, self._untrusted = codec.join(before)
        self._tokens: list[Token] = []  # those of `ids`, with characters of the joined text
        self._apart = False  # the text spells special tokens: it stays encoded apart until `close`
        self._encode_at = 0  # length of the joined text below which nothing is encoded
        self._encode_all_at = 0  # the same for the whole of it

    def append(self, piece: str) -> tuple[int, list[int]]:
        """Grow the text by a piece, complete characters only: (keep, new) leaves `ids[:keep] + new`.

        An empty piece hands out what it can of the fixed segments.
        """
        self.text += encodable(piece)
        size = len(self._fixed) + len(self.text)
        if size < self._encode_at:
            return len(self.ids), []
        stable = self._stable()
        if stable <= self._done:
            return len(self.ids), []
        changed = self._encode_again(size)
        if changed is None:
            self._encode_at = self._encode_all_at
            return len(self.ids), []
        first, tokens = changed
        change = self._replace(first, tokens[: _complete(tokens, stable)])
        self.covers = max(self._done - len(self._fixed), 0)
        # the next window costs so much: let the text grow by a part of it, so that the cost is linear in the text
        self._encode_at = size + (size - self._window()[1]) // 16
        return change

    def close(self) -> tuple[int, list[int]]:
        """End the text: (keep, new), after which `ids` are the codec's own of the whole prompt."""
        final = self._codec.encode((*self._before, Untrusted(self.text)), add_special_tokens=True)
        self.covers = len(self.text)
        change = self._replace(0, [Token(id, 0, 0) for id in final])
        self.pool_from = min(self.pool_from, len(final) - 1)
        return change

    @property
    def _done(self) -> int:
        """How many characters of the joined text are handed out."""
        return self._tokens[-1].end if self._tokens else 0

    def _stable(self) -> int:
        """How far the joined text is unlikely to change its tokens; not less than what is handed out."""
        tail = self._since(self._done)
        match = _WORD_ENDS.match(tail)
        end = match.end() if match else 0
        return self._done + (end if len(tail) - end <= _LONGEST_TAIL else len(tail) - _SHORTEST_TAIL)

    def _encode_again(self, size: int) -> tuple[int, list[Token]] | None:
        """(first, tokens): the tokens of the text so far after `first` handed-out ones; None: wait for more."""
        apart = self._apart
        first, start = self._window()
        if first > 0:
            tokens = self._encode(start)
            met = _meet(self._tokens[first:], tokens)
            if met is not None and self._apart == apart:
                return first + met[0], tokens[met[1] :]
        if self._apart == apart and size < self._encode_all_at:
            return None
        self._encode_all_at = size + size // 4
        added = [Token(id, 0, 0) for id in self._codec.frame[0]]
        return 0, added + self._encode(0)

    def _window(self) -> tuple[int, int]:
        """The first token to be encoded again, and the character where it begins."""
        first = len(self._tokens) - _WINDOW
        while first > 0 and self._tokens[first].start < self._tokens[first - 1].end:  # inside a character
            first -= 1
        return (first, self._tokens[first - 1].end) if first > 0 else (0, 0)

    def _encode(self, start: int) -> list[Token]:
        """The tokens of the joined text from a character on."""
        text = self._since(start)
        untrusted = self._untrusted[start:]
        untrusted += b"\1" * (len(text) - len(untrusted))
        tokens, self._apart = self._codec.tokens(text, untrusted, start == 0, self._apart)
        placed, last = [], start
        for id, left, right in tokens:
            last = max(last, start + right)  # whatever a tokenizer reports, ends never go back
            placed.append(Token(id, start + left, last))
        return placed

    def _since(self, start: int) -> str:
        """The joined text from a character on."""
        inside = start - len(self._fixed)
        return self.text[inside:] if inside >= 0 else self._fixed[start:] + self.text

    def _replace(self, first: int, tokens: list[Token]) -> tuple[int, list[int]]:
        keep = first
        for old, new in zip(self._tokens[first:], tokens, strict=False):
            if old.id != new.id:
                break
            keep += 1
        ids = [token.id for token in tokens[keep - first :]]
        self._tokens[first:] = tokens
        self.ids[keep:] = ids
        common = min(self.pool_from, keep)
        most = min(len(self._context), len(self.ids)) if self._before else 0
        while common < most and self.ids[common] == self._context[common]:
            common += 1
        self.pool_from = common
        return keep, ids


def _complete(tokens: list[Token], end: int) -> int:
    """How many of the tokens end by a character and share none with the next."""
    count = 0
    for index, token in enumerate(tokens):
        if token.end > end:
            break
        if index + 1 == len(tokens) or tokens[index + 1].start >= token.end:
            count = index + 1
    return count


def _meet(old: list[Token], new: list[Token]) -> tuple[int, int] | None:
    """Where in each the first few equal tokens in a row begin."""
    places = {token: index for index, token in enumerate(old)}
    for j, token in enumerate(new):
        i = places.get(token)
        if i is not None and i + _AGREE <= len(old) and old[i : i + _AGREE] == new[j : j + _AGREE]:
            return i, j
    return None
