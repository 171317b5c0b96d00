"""Drafts by prompt lookup: what followed the last words the last time they occurred is a guess of what follows now.

A draft costs nothing but its verification; it never changes what is generated.
"""

from __future__ import annotations

from collections.abc import Sequence

LONGEST, SHORTEST = 4, 2  # tokens that have to agree before a guess
_NEAR, _FEW = 12, 2  # behind the end of the last copy one token will do, for so many guesses
_PATIENCE = 6  # guesses in vain before a pause
_PAUSE = 24  # tokens


class PromptLookup:
    """Guesses for one sequence (Saxena 2023, Prompt Lookup Decoding), as long as they come true.

    Where a copy was left, a rewrite often returns after a few words of its own: close behind that place a single
    token is enough for a guess. most: tokens guessed at once. The index grows with the text: a token costs a few
    dictionary entries, once.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.proposed = 0
        self.accepted = 0
        self._last: dict[tuple[int, ...], int] = {}  # words -> where their last occurrence ends
        self._seen = 0
        self._length = most
        self._guess = 0  # where the last guess was taken from
        self._weak = False  # whether a single token was the reason for it
        self._left: int | None = None  # where the last copy ended
        self._in_vain = 0
        self._resume_at = 0

    def propose(self, tokens: Sequence[int], room: int) -> list[int]:
        """At most `room` guesses of what follows `tokens`, which only ever grow from call to call."""
        self._index(tokens)
        if len(tokens) < self._resume_at or room < 1:
            return []
        found = self._words(tokens)
        self._weak = found is None
        if found is None:
            found = self._return(tokens)
        if found is None:
            return []
        self._guess = found
        return list(tokens[found : found + min(self._length, room, _FEW if self._weak else self.most)])

    def learn(self, proposed: int, accepted: int, tokens: int) -> None:
        """How many of the guesses came true; `tokens`: how long the text is now."""
        self.proposed += proposed
        self.accepted += accepted
        if accepted:
            self._left = self._guess + accepted
            self._in_vain = 0
            self._length = min(self.most, 2 * self._length) if accepted == proposed else self._length
        elif not self._weak:
            self._in_vain += 1
            self._length = max(1, self._length // 2)
        if self._in_vain >= _PATIENCE:
            self._in_vain = 0
            self._length = 1
            self._resume_at = tokens + _PAUSE

    def _words(self, tokens: Sequence[int]) -> int | None:
        """Behind the last occurrence of the longest known end."""
        for size in range(LONGEST, SHORTEST - 1, -1):
            at = self._last.get(tuple(tokens[-size:]))
            if at is not None:
                return at
        return None

    def _return(self, tokens: Sequence[int]) -> int | None:
        """Behind the last token, where that occurs close to where the last copy was left."""
        if self._left is None:
            return None
        for at in range(self._left, min(self._left + _NEAR, len(tokens) - 1)):
            if tokens[at] == tokens[-1]:
                return at + 1
        return None

    def _index(self, tokens: Sequence[int]) -> None:
        """Enter what ended before the last token: the end itself has no continuation yet."""
        for end in range(max(self._seen, SHORTEST), len(tokens)):
            for size in range(SHORTEST, min(LONGEST, end) + 1):
                self._last[tuple(tokens[end - size : end])] = end
        self._seen = max(self._seen, len(tokens))
