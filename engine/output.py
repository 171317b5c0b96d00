"""The text of a sequence while it is decoded: pieces as they become certain, and where stop strings cut it."""

from __future__ import annotations

from .detokenizer import Detokenizer


class OutputText:
    """Feed it tokens; `text` is what may be shown, without the stop string that ended it.

    Text that could be the beginning of a stop string is held back until the next tokens decide.
    """

    def __init__(self, detokenizer: Detokenizer, stop: tuple[str, ...]) -> None:
        self._detokenizer = detokenizer
        self._stop = stop
        self._held = ""
        self.text = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that this token made certain."""
        return self._release(self._detokenizer.push(token))

    def flush(self) -> str:
        """What was held back; call once, when no token follows."""
        if self.stopped:
            return ""
        piece = self._release(self._detokenizer.flush())
        held, self._held = self._held, ""
        self.text += held
        return piece + held

    def _release(self, piece: str) -> str:
        if self.stopped or not piece:
            return ""
        self._held += piece
        found = [at for at in (self._held.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.stopped = True
            out, self._held = self._held[: min(found)], ""
        else:
            keep = max((_overlap(self._held, stop) for stop in self._stop), default=0)
            out = self._held[: len(self._held) - keep]
            self._held = self._held[len(self._held) - keep :]
        self.text += out
        return out


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
