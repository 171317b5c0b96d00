"""The same weights and prompts through this engine and others, each in a process of its own, in turn."""

from __future__ import annotations

from collections.abc import Callable
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
from .peer_process import READS_GGUF, Peer, PeerSpec
from .report import WrongPath
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
WARM_UP = 1


@dataclass(frozen=True)
class PeersConfig:
    """repeats: questions that all peers answer, after one that warms up. threads: of each. gguf: the file for those
    that read nothing else; None makes one."""

    peers: tuple[PeerSpec, ...] = (PeerSpec("stockade"), PeerSpec("transformers"))
    repeats: int = 5
    prompt_tokens: int = 64
    answer_tokens: int = 64
    dtype: str = "bf16"
    threads: int = 2
    gguf: Path | None = None
    seed: int = 0


@dataclass
class PeersReport:
    """loaded: what each peer says of itself, by name. seconds: by peer and measure, one a question. ids, texts: its
    answers."""

    config: PeersConfig
    model: str
    loaded: dict[str, dict[str, Any]] = field(default_factory=dict)
    seconds: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    ids: dict[str, list[list[int] | None]] = field(default_factory=dict)
    texts: dict[str, list[str]] = field(default_factory=dict)

    def same(self, name: str) -> str:
        """How many of a peer's answers are the first one's, token by token; by text where it tells no tokens."""
        first = next(iter(self.loaded))
        if name == first:
            return ""
        pairs = list(zip(self.ids[first], self.ids[name], strict=True))
        if all(other is not None for _, other in pairs):
            agreeing = [sum(a == b for a, b in _paired(mine or [], other or [])) for mine, other in pairs]
            whole = sum(mine == other for mine, other in pairs)
            most = self.config.answer_tokens * len(pairs)
            return f"{whole} of {len(pairs)} answers, {100 * sum(agreeing) / most:.0f} % of the tokens"
        whole = sum(a == b for a, b in zip(self.texts[first], self.texts[name], strict=True))
        return f"{whole} of {len(pairs)} answers, by text"

    def rows(self) -> list[dict[str, Any]]:
        out = []
        for name, loaded in self.loaded.items():
            row: dict[str, Any] = {"peer": name, "version": loaded["version"], "dtype": loaded["dtype"]}
            for measure in MEASURES:
                values = self.seconds[name].get(measure)
                row[f"{measure}_ms"] = None if not values else Estimate.of(values).scaled(1e3).to_dict()
            row["same_as_first"] = self.same(name)
            row["not_done"] = loaded["cannot"]
            out.append(row)
        return out

    def to_dict(self) -> dict[str, Any]:
        config = {**asdict(self.config), "peers": list(self.loaded), "gguf": str(self.config.gguf or "")}
        del config["dtype"]
        return {
            "benchmark": "peers",
            "model": self.model,
            "dtype": self.config.dtype,
            "config": config,
            "rows": self.rows(),
            "seconds": self.seconds,
        }

    def table(self) -> Table:
        config = self.config
        table = Table(
            title=f"{self.model} {config.dtype}, {config.threads} threads: {config.prompt_tokens} tokens in, "
            f"{config.answer_tokens} out, n = {config.repeats}, medians",
            caption="; ".join(
                f"{name}: no {what}, {why}"
                for name, loaded in self.loaded.items()
                for what, why in loaded["cannot"].items()
            ),
        )
        table.add_column("peer", no_wrap=True)
        for words in MEASURES.values():
            table.add_column(words, justify="right")
        table.add_column("same as the first")
        for name in self.loaded:
            found = self.seconds[name]
            cells = [
                f"{1e3 * Estimate.of(found[key]).median:,.1f}" if found.get(key) else "not done" for key in MEASURES
            ]
            table.add_row(name, *cells, self.same(name))
        return table


def run_peers(
    sources: Sources, config: PeersConfig, told: Callable[[str, int, int], None] | None = None
) -> PeersReport:
    """Measure. Raises `BadInput` for peers of the same name, `MissingExtra` for a peer whose package is not there,
    `PeerFailed`, and `WrongPath` for an answer of another length."""
    names = [spec.url or spec.name for spec in config.peers]
    if len(set(names)) < len(names):
        raise BadInput(f"every peer once: {', '.join(names)}")
    tokenizer = AutoTokenizer.from_pretrained(sources.folder)
    gguf = config.gguf
    if gguf is None and any(spec.name in READS_GGUF for spec in config.peers):
        # bf16 values are fp16 values, too, but for the smallest; not every engine reads bf16 files
        gguf = save_gguf(sources.folder, sources.work / "model.gguf", "fp32" if config.dtype == "fp32" else "fp16")
    head = {"file": str(sources.detector)} if sources.detector.suffix == ".safetensors" else None
    report, random = PeersReport(config, sources.name), Random(config.seed)
    with ExitStack() as stack:
        peers: dict[str, Peer] = {}
        for name, spec in zip(names, config.peers, strict=True):
            peers[name] = stack.enter_context(Peer(spec, config.threads))
            report.loaded[name] = peers[name].ask(
                "load",
                model=str(sources.folder),
                gguf=None if gguf is None else str(gguf),
                dtype=config.dtype,
                threads=config.threads,
                head=head,
                url=spec.url,
            )
            report.seconds[name] = {measure: [] for measure in MEASURES}
            report.ids[name], report.texts[name] = [], []
        for number in range(-WARM_UP, config.repeats):
            text = question(tokenizer, config.prompt_tokens, random)
            for name in random.sample(names, len(names)):
                _ask(peers[name], name, report, tokenizer, text, keep=number >= 0)
            if told:
                told("peers", number + WARM_UP + 1, config.repeats + WARM_UP)
    return report


def _ask(peer: Peer, name: str, report: PeersReport, tokenizer: Any, text: str, keep: bool) -> None:
    """One question, its judge and its detector, to one peer."""
    new = report.config.answer_tokens
    ids, judge = (tokenizer(words, add_special_tokens=False)["input_ids"] for words in (text, JUDGE))
    said = peer.ask("run", ids=ids, text=text, new=new)
    times, answer = said["times"], said["ids"]
    if not times or (answer is not None and len(answer) != new):
        raise WrongPath(f"{name} gave {len(answer or times)} tokens where {new} were asked for")
    known = tokenizer(said["text"], add_special_tokens=False)["input_ids"] if answer is None else answer
    more = [*ids, *known, *judge]
    word = peer.ask("run", ids=more, text=text + said["text"] + JUDGE, new=1)
    scored = None
    if "score" not in report.loaded[name]["cannot"]:
        scored = peer.ask("score", ids=answer, text=said["text"])["seconds"]
    if not keep:
        return
    found = report.seconds[name]
    found["first_token"].append(times[0])
    if len(times) > 1:
        found["per_token"].append((times[-1] - times[0]) / (new - 1))
    found["answer"].append(times[-1])
    found["judge"].append(word["times"][-1])
    if scored is not None:
        found["score"].append(scored)
    report.ids[name].append(answer)
    report.texts[name].append(said["text"])


def _paired(mine: list[int], other: list[int]) -> list[tuple[int, int]]:
    """Tokens up to the first that differs: what comes behind it answers another beginning."""
    out = []
    for pair in zip(mine, other, strict=False):
        out.append(pair)
        if pair[0] != pair[1]:
            break
    return out
