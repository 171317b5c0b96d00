"""A soak of the server: thousands of guarded requests of mixed kinds, clients that leave, deadlines, faults in the
detectors. It judges; a run without complaints is what the README claims.

Every text that a client was shown is looked up in what the detectors' own tokens say that they have read and cleared.
"""

from __future__ import annotations

import asyncio
import base64
import bisect
import gc
import io
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image
from rich.table import Table

from ..console import plain_table
from ..engine.engine import Engine
from ..engine.guards import Detector, Detoxify, EyesClosed, Guard, HarmHead, Refuse, SelfJudge
from ..engine.models.loader import load_models
from ..engine.runner import StepResult
from ..engine.sampling import SamplingParams
from ..engine.scheduler import Lane, Work
from ..engine.serving.policy import Policy
from .http_client import Exchanged, exchange
from .serving import NAME, served

CHAT, TEXT, MODERATION = "/v1/chat/completions", "/v1/completions", "/v1/moderations"
GUARD_TIMEOUT = 3.0  # seconds of a guard's pass; a hang is longer
HANG = 3.2
TRIES = 20  # of a request that is told to come again


@dataclass(frozen=True)
class SoakConfig:
    """requests: in all. at_once: clients. faults: probability that a batch fails, hangs, or gives scores that are
    none. pages: of the pool, few enough that requests stand back for each other."""

    requests: int = 5000
    at_once: int = 32
    faults: float = 0.01
    pages: int = 160
    seed: int = 0


@dataclass
class SoakReport:
    config: SoakConfig
    seconds: float
    endings: Counter[str]
    injected: Counter[str]
    complaints: list[str]
    checked_characters: int
    unscreened_characters: int
    memory_mib: list[float]  # after each quarter of the requests
    steps: int

    def table(self) -> Table:
        table = plain_table(f"Soak: {self.config.requests:,} requests in {self.seconds:.0f} s", ["", ""], right=[""])
        for ending, count in sorted(self.endings.items()):
            table.add_row(ending, f"{count:,}")
        table.add_section()
        for fault, count in sorted(self.injected.items()):
            table.add_row(f"injected: {fault}", f"{count:,}")
        table.add_section()
        table.add_row("characters shown under a guard, looked up", f"{self.checked_characters:,}")
        table.add_row("of them unscreened", f"{self.unscreened_characters:,}")
        table.add_row("memory after each quarter", " → ".join(f"{mib:,.0f} MiB" for mib in self.memory_mib))
        table.add_row("complaints", f"{len(self.complaints):,}")
        for complaint in self.complaints[:20]:
            table.add_row("", complaint)
        return table

    def to_dict(self) -> dict[str, Any]:
        return {
            "benchmark": "soak",
            "requests": self.config.requests,
            "seconds": round(self.seconds, 1),
            "endings": dict(self.endings),
            "injected": dict(self.injected),
            "complaints": self.complaints,
            "checked_characters": self.checked_characters,
            "unscreened_characters": self.unscreened_characters,
            "memory_mib": [round(mib, 1) for mib in self.memory_mib],
            "steps": self.steps,
        }


@dataclass
class Witness:
    """Stands between engine and model: notes what detectors read and cleared, and makes batches fail.

    notes: a file for what detectors read: the texts of sequences that scored at least `threshold`, and those that the
    model judged itself. A file, because the memory that is measured has to be the server's.
    """

    engine: Engine
    threshold: float
    faults: float
    random: random.Random
    notes: Path
    injected: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._run: Callable[[Lane, list[Work]], StepResult] = self.engine.runner.run
        self.engine.runner.run = self.run  # type: ignore[method-assign]

    def run(self, lane: Lane, works: list[Work]) -> StepResult:
        fault = None
        if self.random.random() < self.faults:
            detecting = any(work.sequence.scored or work.sequence.words for work in works)
            # an answer that fails ends its request: detectors fail more often
            kinds = ["exception"] * 8 + ["nan"] * 11 + ["hang"] if detecting else ["exception", *["none"] * 7]
            fault = self.random.choice(kinds)
        if fault == "exception":
            self.injected[fault] += 1
            raise RuntimeError("injected")
        if fault == "hang":
            self.injected[fault] += 1
            time.sleep(HANG)
        result = self._run(lane, works)
        if fault == "nan":
            self.injected[fault] += 1
            if result.logits is not None and all(work.sequence.words for work in result.works):
                result.logits.fill_(float("nan"))
            result = replace(result, scores=[(sequence, float("nan")) for sequence, _ in result.scores])
        read = [("cleared", sequence) for sequence, score in result.scores if score >= self.threshold]
        read += [("judged", work.sequence) for work in result.works if work.sequence.words]
        with self.notes.open("a", encoding="utf-8") as file:
            for how, sequence in read:
                file.write(json.dumps([how, sequence.model.codec.decode(sequence.tokens)]) + "\n")
        return result

    def unscreened(self, shown: set[str]) -> list[str]:
        """Texts that no detector has read to their end."""
        read: dict[str, set[str]] = {"cleared": set(), "judged": set()}
        for line in self.notes.read_text(encoding="utf-8").splitlines():
            how, text = json.loads(line)
            read[how].add(text)
        known = sorted(read["cleared"])
        left = []
        for text in shown:
            at = bisect.bisect_left(known, text)
            if not (at < len(known) and known[at].startswith(text)) and not any(
                text in prompt for prompt in read["judged"]
            ):
                left.append(text)
        return left


def run_soak(config: SoakConfig, told: Callable[[str, int, int], None], folder: Path) -> SoakReport:
    """Run it on tiny random models. folder: for the audit log, and for what is noted to judge by."""
    models = load_models("tiny-llava", "tiny-llama", "tiny-llama", device="cpu")
    largest = max(model.layout(16).page_bytes for model in models.models.values())
    engine = Engine(models=models, tokens_per_page=16, kv_bytes=largest * config.pages, max_sequences=24)
    threshold = quantile(engine, HarmHead(template="response", threshold=0.0), 0.15)
    judged = quantile(engine, SelfJudge(threshold=0.0, min_mass=1e-9), 0.15)
    witness = Witness(engine, threshold, config.faults, random.Random(config.seed), folder / "read.jsonl")
    clients = Clients(config, told)
    began, threads = time.perf_counter(), threading.active_count()
    audit = folder / "audit.jsonl"
    with served(
        engine, soak_policy(threshold, judged), max_requests=config.at_once, max_tokens=96, audit=audit
    ) as server:
        asyncio.run(clients.run(server.port))
        _check_rest(server, clients.complaints)
    seconds = time.perf_counter() - began
    if threading.active_count() > threads:
        clients.complaints.append("threads are left")
    engine.step()
    engine.check_integrity()
    if engine.pool.owned_pages or engine.has_work:
        clients.complaints.append(f"{engine.pool.owned_pages} pages are left")
    left = witness.unscreened(clients.shown)
    clients.complaints += [f"no detector has read {text!r}" for text in left]
    unscreened = sum(map(len, left)) + engine.driver.unscreened_characters
    return SoakReport(
        config,
        seconds,
        clients.endings,
        witness.injected,
        clients.complaints,
        sum(map(len, clients.shown)),
        unscreened,
        clients.memory,
        engine.steps,
    )


def soak_policy(threshold: float, judged: float) -> Policy:
    limits: dict[str, Any] = {"timeout": GUARD_TIMEOUT}
    head = HarmHead(template="response", threshold=threshold, prefix_threshold=threshold, chunk=8, **limits)
    judge = SelfJudge(threshold=judged, min_mass=1e-9, **limits)
    guards = {
        "protector": Guard(head, Detoxify(timeout=GUARD_TIMEOUT), 2, speculate=True),
        "detector": Guard(head, Refuse()),
        "ecso": Guard(judge, EyesClosed(timeout=GUARD_TIMEOUT), 1),
        "off": Guard.off(),
    }
    return Policy(guards, "protector", loosest="window")


def quantile(engine: Engine, detector: Detector, share: float) -> float:
    """A threshold under which about this share of random answers lies."""
    guard, scores = Guard(detector, Refuse()), []
    for number in range(24):
        sampling = SamplingParams(temperature=1.0, seed=number, max_tokens=24)
        reply = engine.chat([f"question {number}"], guard=guard, sampling=sampling)[0]
        scores.append(reply.verdicts[0].score)
    scores.sort()
    return scores[int(len(scores) * share)]


class Clients:
    """Sends the requests and judges what comes back."""

    def __init__(self, config: SoakConfig, told: Callable[[str, int, int], None]) -> None:
        self.config = config
        self.endings: Counter[str] = Counter()
        self.complaints: list[str] = []
        self.shown: set[str] = set()
        self.memory: list[float] = []
        self._told = told
        self._random = random.Random(config.seed + 1)
        self._pictures = [_picture(color) for color in ("red", "green", "blue")]

    async def run(self, port: int) -> None:
        numbers = iter(range(self.config.requests))

        async def client() -> None:
            for number in numbers:
                await self._one(port, number)
                if number % -(-self.config.requests // 4) == 0 and number:
                    gc.collect()
                    self.memory.append(_memory_mib())
                self._told("soak", number + 1, self.config.requests)

        await asyncio.gather(*(client() for _ in range(self.config.at_once)))
        gc.collect()
        self.memory.append(_memory_mib())

    async def _one(self, port: int, number: int) -> None:
        pick = self._random
        kind = pick.choices(["chat", "stream", "text", "moderation", "wrong", "deadline"], [4, 6, 2, 1, 1, 1])[0]
        policy = pick.choices(["protector", "detector", "ecso", "off"], [6, 4, 2, 1])[0]
        release = pick.choice(["verdict", "window"]) if policy in ("protector", "detector") else "verdict"
        common = {
            "model": NAME,
            "guard": {"policy": policy, "release": release},
            "seed": number,
            "max_tokens": pick.randint(1, 32),
            "temperature": 1.0,
            "ignore_eos": pick.random() < 0.7,
            "stream": kind == "stream",
        }
        leaving: dict[str, Any] = {}
        if pick.random() < 0.12:
            leaving = (
                {"leave_after": pick.random() * 0.3}
                if pick.random() < 0.5
                else {"leave_at_event": pick.randint(0, 6)}
            )
        path, body = CHAT, {**common, "messages": self._messages(number)}
        if kind == "text":
            path, body = TEXT, {**common, "stream": pick.random() < 0.5, "prompt": f"text {number}"}
        elif kind == "moderation":
            path, body = MODERATION, {"input": [f"text {number} {part}" for part in range(pick.randint(1, 12))]}
        elif kind == "wrong":
            body = {**body, **pick.choice([{"model": "other"}, {"max_tokens": -1}, {"messages": []}, {"n": 3}])}
            body["messages"] = body["messages"] or [{"role": "user", "content": "x" * 100_000}]
        elif kind == "deadline":
            body["timeout"] = pick.choice([0.001, 0.02, 0.1])
        if pick.random() < 0.02:
            leaving["pause"] = 0.05
        for _ in range(TRIES):
            got = await exchange(port, path, body, **leaving)
            if got.status != 429 or "retry-after" not in got.headers:
                break
            self.endings["429, sent again"] += 1
            await asyncio.sleep(pick.random())
        self._judge(number, got, body, path)

    def _messages(self, number: int) -> list[Any]:
        text = f"question {number} " + "more " * self._random.choice([0, 0, 3, 10])
        parts: list[Any] = [{"type": "text", "text": text}]
        if self._random.random() < 0.25:
            parts.insert(0, {"type": "image_url", "image_url": {"url": self._random.choice(self._pictures)}})
        turns = [{"role": "user", "content": "before"}, {"role": "assistant", "content": "yes"}]
        return [*(turns * self._random.choice([0, 0, 0, 1])), {"role": "user", "content": parts}]

    def _judge(self, number: int, got: Exchanged, body: Any, path: str) -> None:
        """Note how it ended; a request has to end in a reply or in a typed error."""
        if got.left:
            self.endings["client left"] += 1
            if path != MODERATION and body["guard"]["policy"] != "off":
                self._note(_text_of(got.events))
            return
        last = got.events[-1] if got.events else got.body
        if not got.whole or not last:
            self.complaints.append(f"request {number}: the reply has no end (status {got.status})")
        elif isinstance(last, dict) and "error" in last:
            error = last["error"]
            self.endings[f"error: {error['code']}"] += 1
            if got.status not in (200, 400, 404, 429, 500, 503, 504) or error["code"] == "internal_error":
                self.complaints.append(f"request {number}: {got.status} {error}")
            if body.get("guard", {}).get("policy") not in (None, "off"):
                self._note(_text_of(got.events))
        elif path == MODERATION:
            self.endings["moderated"] += 1
        else:
            self._judge_reply(number, got)

    def _judge_reply(self, number: int, got: Exchanged) -> None:
        whole = got.events[-2] if got.events else got.body
        guard, reason = whole["guard"], whole["choices"][0]["finish_reason"]
        failed = next((verdict["error"] for verdict in guard["verdicts"] if verdict["error"]), None)
        self.endings[guard["outcome"] + (f", for the detector failed: {failed}" if failed else "")] += 1
        text = _text_of(got.events) if got.events else _whole_text(got.body)
        refused = guard["outcome"] == "refused"
        if refused and (reason != "content_filter" or (text and not guard["replaced"])):
            self.complaints.append(f"request {number}: refused, and yet it has a text, or not the refusal's reason")
        if guard["unscreened_characters"]:
            self.complaints.append(f"request {number}: {guard['unscreened_characters']} unscreened characters")
        if guard["outcome"] in ("clean", "mended") and not guard["verdicts"]:
            self.complaints.append(f"request {number}: {guard['outcome']} without a verdict")
        if guard["policy"] != "off":
            self._note(text)

    def _note(self, text: str) -> None:
        if text:
            self.shown.add(text)


def _text_of(events: list[Any]) -> str:
    out = ""
    for event in events:
        for choice in event.get("choices", ()) if isinstance(event, dict) else ():
            out += (choice["delta"]["content"] if "delta" in choice else choice["text"]) or ""
    return out


def _whole_text(body: Any) -> str:
    choice = body["choices"][0]
    return (choice["message"]["content"] if "message" in choice else choice["text"]) or ""


def _check_rest(server: Any, complaints: list[str]) -> None:
    """Nothing may be under way when the last client has what it wanted."""
    state = server.server.server_state
    ends = time.monotonic() + 10
    # tasks last: asking what is under way is one for a moment, too
    while (_under_way(server.port) or state.tasks) and time.monotonic() < ends:
        time.sleep(0.02)
    if state.tasks:
        stacks = [task.get_stack(limit=4) for task in list(state.tasks)]
        where = "; ".join(
            " > ".join(f"{frame.f_code.co_name}:{frame.f_lineno}" for frame in stack) for stack in stacks
        )
        complaints.append(f"{len(stacks)} tasks are left: {where}")
    if _under_way(server.port):
        complaints.append("requests are left in the engine")


def _under_way(port: int) -> float:
    text = asyncio.run(exchange(port, "/metrics")).body.decode()
    return next(
        float(line.split()[1]) for line in text.splitlines() if line.startswith("stockade_requests_under_way ")
    )


def _picture(color: str) -> str:
    out = io.BytesIO()
    Image.new("RGB", (16, 16), color).save(out, "PNG")
    return f"data:image/png;base64,{base64.b64encode(out.getvalue()).decode()}"


def _memory_mib() -> float:
    """Resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * 4096 / (1 << 20)
