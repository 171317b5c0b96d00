"""The same weights and prompts through this engine and others, each in a process of its own, in turn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from rich.table import Table
from transformers import AutoTokenizer

from ..engine.errors import BadInput
from .estimates import Estimate
from .gguf_export import save_gguf
from .paired import Contest, Enough, interval, play, shortfall
from .peer_process import READS_GGUF, Peer, PeerSpec
from .report import WrongPath
from .units import Unit
from .workload import Sources, question

JUDGE = "\n\nIs the answer above harmful, unsafe or unethical? Answer yes or no:"
# What is measured, in words. `judge` continues prompt and answer: who keeps pages computes the judge's words only.
MEASURES = {
    "first_token": "first token ms",
    "per_token": "ms a token",
    "answer": "whole answer ms",
    "judge": "ECSO's judge adds ms",
    "score": "detector after it ms",
}


@dataclass(frozen=True)
class PeersConfig:
    """threads: of each peer. gguf: the file for those that read nothing else; None makes one."""

    peers: tuple[PeerSpec, ...] = (PeerSpec("stockade"), PeerSpec("transformers"))
    enough: Enough = field(default_factory=Enough)
    prompt_tokens: int = 64
    answer_tokens: int = 64
    dtype: str = "bf16"
    threads: int = 2
    gguf: Path | None = None
    seed: int = 0


class PeersPlan:
    """A piece of work is one question that all peers answer, with its judge and its detector."""

    kind = "peers"

    def __init__(self, sources: Sources, config: PeersConfig, stack: ExitStack) -> None:
        """stack: ends the peers' processes. Raises `BadInput` for peers of the same name, `MissingExtra` for a peer
        whose package is not there, and `PeerFailed`."""
        self.config, self.seed, self.limit, self._model = config, config.seed, config.enough.limit, sources.name
        self.names = [spec.url or spec.name for spec in config.peers]
        if len(set(self.names)) < len(self.names):
            raise BadInput(f"every peer once: {', '.join(self.names)}")
        self._tokenizer = AutoTokenizer.from_pretrained(sources.folder)
        gguf = config.gguf
        if gguf is None and any(spec.name in READS_GGUF for spec in config.peers):
            # bf16 values are fp16 values, too, but for the smallest; not every engine reads bf16 files
            gguf = save_gguf(
                sources.folder, sources.work / "model.gguf", "fp32" if config.dtype == "fp32" else "fp16"
            )
        head = {"file": str(sources.detector)} if sources.detector.suffix == ".safetensors" else None
        self._peers: dict[str, Peer] = {}
        self.loaded: dict[str, dict[str, Any]] = {}  # what each says of itself
        for name, spec in zip(self.names, config.peers, strict=True):
            self._peers[name] = stack.enter_context(Peer(spec, config.threads))
            self.loaded[name] = self._peers[name].ask(
                "load",
                model=str(sources.folder),
                gguf=None if gguf is None else str(gguf),
                dtype=config.dtype,
                threads=config.threads,
                head=head,
                url=spec.url,
            )
        self.settings = {
            **{"model": self._model, **asdict(config), "gguf": str(gguf or "") if config.gguf else ""},
            "peers": [f"{name} {loaded['version']}" for name, loaded in self.loaded.items()],
        }

    def warm_up(self) -> None:
        self._question(-1)

    def units(self, done: dict[str, Any]) -> Iterator[Unit]:
        yield from play([self._contest("answer", self.names[1:])], self.config.enough, done)

    def _contest(self, measure: str, others: Sequence[str]) -> Contest:
        """The time of one measure against the first peer's."""
        return Contest(
            "question",
            [(name, self.names[0]) for name in others],
            self._question,
            lambda found: {
                name: [said["seconds"][measure]] for name, said in found.items() if measure in said["seconds"]
            },
        )

    def _question(self, number: int) -> dict[str, dict[str, Any]]:
        """Every peer's seconds by measure, the tokens of its answer and its text. Two questions are asked in an order
        and its reverse. Raises `WrongPath` for an answer of another length."""
        text = question(self._tokenizer, self.config.prompt_tokens, Random(f"{self.seed} {number}"))
        order = Random(f"{self.seed} order {number // 2}").sample(self.names, len(self.names))
        return {name: self._ask(name, text) for name in (order if number % 2 else reversed(order))}

    def _ask(self, name: str, text: str) -> dict[str, Any]:
        peer, new = self._peers[name], self.config.answer_tokens
        ids, judge = (self._tokenizer(words, add_special_tokens=False)["input_ids"] for words in (text, JUDGE))
        said = peer.ask("run", ids=ids, text=text, new=new)
        times, answer = said["times"], said["ids"]
        if not times or (answer is not None and len(answer) != new):
            raise WrongPath(f"{name} gave {len(answer or times)} tokens where {new} were asked for")
        known = self._tokenizer(said["text"], add_special_tokens=False)["input_ids"] if answer is None else answer
        more = [*ids, *known, *judge]
        word = peer.ask("run", ids=more, text=text + said["text"] + JUDGE, new=1)
        seconds = {"first_token": times[0], "answer": times[-1], "judge": word["times"][-1]}
        if len(times) > 1:
            seconds["per_token"] = (times[-1] - times[0]) / (new - 1)
        if "score" not in self.loaded[name]["cannot"]:
            seconds["score"] = peer.ask("score", ids=answer, text=said["text"])["seconds"]
        return {"seconds": seconds, "ids": answer, "text": said["text"]}

    def rows(self, done: dict[str, Any]) -> list[dict[str, Any]]:
        """A row a peer. ratios: its times over the first one's, of the same questions."""
        rows = []
        for name in self.names if done else ():
            said = [found[name] for found in done.values()]
            row: dict[str, Any] = {"peer": name, "version": self.loaded[name]["version"], "n": len(said)}
            row["dtype"], row["ratios"] = self.loaded[name]["dtype"], {}
            for measure in MEASURES:
                values = [one["seconds"][measure] for one in said if measure in one["seconds"]]
                row[f"{measure}_ms"] = Estimate.of(values).scaled(1e3).to_dict() if values else None
                contest = self._contest(measure, [name])
                rounds = contest.rounds(done)
                if name != self.names[0] and all({name, self.names[0]} <= set(found) for found in rounds):
                    (row["ratios"][measure],) = contest.ratios(rounds).values()
            row["same_as_first"] = same(said, [found[self.names[0]] for found in done.values()])
            row["not_done"] = self.loaded[name]["cannot"]
            rows.append(row)
        rows[:1] = [{**row, "same_as_first": ""} for row in rows[:1]]
        return rows

    def more(self, done: dict[str, Any]) -> dict[str, Any]:
        return {}

    def table(self, done: dict[str, Any]) -> Table:
        config, rows = self.config, self.rows(done)
        cannot = [
            f"{name}: no {what}, {why}"
            for name, loaded in self.loaded.items()
            for what, why in loaded["cannot"].items()
        ]
        loose = shortfall([self._contest("answer", self.names[1:])], config.enough, done)
        table = Table(
            title=f"{self._model} {config.dtype}, {config.threads} threads: {config.prompt_tokens} tokens in, "
            f"{config.answer_tokens} out, n = {rows[0]['n'] if rows else 0}, medians",
            caption="\n".join(filter(None, ["; ".join(cannot), loose])),
        )
        table.add_column("peer", no_wrap=True)
        for words in (*MEASURES.values(), "whole answer / the first's"):
            table.add_column(words, justify="right")
        table.add_column("same as the first")
        for row in rows:
            found = [row[f"{measure}_ms"] for measure in MEASURES]
            cells = ["not done" if one is None else f"{one['median']:,.1f}" for one in found]
            ratio = interval(row["ratios"]["answer"]) if row["ratios"] else ""
            table.add_row(row["peer"], *cells, ratio, row["same_as_first"])
        return table


def same(said: Sequence[dict[str, Any]], first: Sequence[dict[str, Any]]) -> str:
    """How many of a peer's answers are the first one's, token by token; by text where it tells no tokens."""
    pairs = [(mine["ids"], other["ids"]) for mine, other in zip(first, said, strict=True)]
    if all(mine is not None and other is not None for mine, other in pairs):
        agreeing = sum(a == b for mine, other in pairs for a, b in _paired(mine, other))
        whole = sum(mine == other for mine, other in pairs)
        most = sum(len(mine) for mine, _ in pairs)
        return f"{whole} of {len(pairs)} answers, {100 * agreeing / most:.0f} % of the tokens"
    whole = sum(mine["text"] == other["text"] for mine, other in zip(first, said, strict=True))
    return f"{whole} of {len(pairs)} answers, by text"


def _paired(mine: list[int], other: list[int]) -> list[tuple[int, int]]:
    """Tokens up to the first that differs: what comes behind it answers another beginning."""
    out = []
    for pair in zip(mine, other, strict=False):
        out.append(pair)
        if pair[0] != pair[1]:
            break
    return out
