"""The conversation of `stockade chat`: questions from a terminal or a pipe, answers as their guard lets them out."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.text import Text

from .console import printable, reply_line
from .engine.engine import Engine
from .engine.errors import StockadeError
from .engine.guards import Guard
from .engine.images import load_image
from .engine.passes import ReleaseMode
from .engine.request import FinishReason, Replaced, Reply
from .engine.sampling import SamplingParams

HELP = "/image PATH adds an image to the next question, /guard NAME changes the guard, /reset forgets, /exit ends"


class Talk:
    """A multi-turn chat with an engine. A question that cannot be answered is told and forgotten."""

    def __init__(
        self,
        engine: Engine,
        console: Console,
        guard: Guard,
        sampling: SamplingParams,
        release: ReleaseMode = "verdict",
    ) -> None:
        self.engine = engine
        self.console = console
        self.guard = guard
        self.sampling = sampling
        self.release = release
        self.messages: list[dict[str, Any]] = []
        self.images: list[Any] = []

    def run(self, guard_named: Callable[[str], Guard]) -> None:
        """Until /exit or the end of the input."""
        self.console.print(f"guard {self.guard.name}. {HELP}.", style="dim")
        while (line := self._read()) is not None:
            command, _, rest = line.partition(" ")
            try:
                match command:
                    case "":
                        continue
                    case "/exit" | "/quit":
                        return
                    case "/reset":
                        self.messages.clear()
                        self.images.clear()
                    case "/image":
                        self.add_image(rest.strip())
                    case "/guard":
                        self.guard = guard_named(rest.strip())
                    case _ if command.startswith("/"):
                        self.console.print(f"unknown command. {HELP}.", style="yellow")
                    case _:
                        self.ask(line)
            except StockadeError as error:
                self.console.print(Text(f"{printable(str(error))}  [{type(error).__name__}]", style="red"))

    def add_image(self, path: str) -> None:
        """Load an image for the next question; raises a `BadImage`."""
        self.images.append(load_image(path, self.engine.image_limits))

    def ask(self, question: str) -> Reply:
        """Answer a question in the light of what was said before, and print the answer as it may be shown."""
        parts = [{"type": "image", "image": image} for image in self.images]
        turn = {"role": "user", "content": [*parts, {"type": "text", "text": question}]}
        self.images.clear()
        chat = [*self.messages, turn]
        texts = self.engine.stream(chat, guard=self.guard, sampling=self.sampling, release=self.release)
        reply = self._print(texts)
        self.console.print(reply_line(reply), style="dim")
        if reply.finish_reason is not FinishReason.ERROR:
            self.messages += [turn, {"role": "assistant", "content": reply.text}]
        return reply

    def _print(self, texts: Any) -> Reply:
        while True:
            try:
                piece = next(texts)
                if isinstance(piece, Replaced):
                    self.console.print()
                    self.console.print(Text(f"(withdrawn: {printable(piece.reason)})", style="yellow"))
                    piece = piece.text
                self.console.out(printable(piece), end="", highlight=False)
            except StopIteration as end:
                self.console.print()
                return end.value

    def _read(self) -> str | None:
        """The next line; None at the end of the input. A pipe's line is shown, as a terminal's is anyway."""
        if sys.stdin.isatty():
            try:
                return self.console.input("[bold]> [/bold]").strip()
            except EOFError:
                self.console.print()
                return None
        line = sys.stdin.readline()
        if not line:
            return None
        self.console.print(Text(f"> {printable(line.strip())}", style="bold"))
        return line.strip()
