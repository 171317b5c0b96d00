"""Decoding and prefill against `transformers`: the same weights and prompts, in turn by a few tokens, no guard."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from random import Random
from time import perf_counter
from typing import Any, NamedTuple

import torch
from rich.console import RenderableType
from rich.table import Table

from ..engine.engine import Engine
from ..engine.running import Request, Run
from ..engine.sampling import SamplingParams
from .paired import Contest, Enough, Round, interval, play, shortfall, take_turns
from .published import Speaker
from .report import Spread, WrongPath
from .units import Unit
from .workload import Sources

SIDES = ("stockade", "transformers")
READ = 8  # prompts in a round of a prefill, which would be over in one short piece
BUFFER_BYTES = 512 << 20  # far more than any cache


@dataclass(frozen=True)
class DecodeConfig:
    """batches: prompts at once, one workload each. prefill: tokens of the prompt whose reading is timed. piece:
    tokens that each side decodes before it is the other's turn."""

    batches: tuple[int, ...] = (1, 16)
    prompt_tokens: int = 64
    new_tokens: int = 128
    prefill: int = 640
    piece: int = 16
    enough: Enough = field(default_factory=Enough)
    seed: int = 0


class Workload(NamedTuple):
    """rows prompts of `prompt` tokens, `new` tokens each; `counted` of all of them are what a rate counts.
    times: that a round does it, with other prompts each time."""

    name: str
    rows: int
    prompt: int
    new: int
    counted: int
    times: int = 1


class DecodePlan:
    """A piece of work is one round of one workload on both sides; the last one is the machine's memory."""

    kind = "decode"

    def __init__(self, sources: Sources, config: DecodeConfig, dtype: torch.dtype | None = None) -> None:
        self.config, self.seed, self.limit = config, config.seed, config.enough.limit
        self._engine = sources.engine(dtype)
        model = self._engine.models["mllm"]
        own = model.backbone.decoder.dtype
        self._speaker = Speaker(sources.folder, own, self._engine.device, ignore_eos=True)
        self._ordinary = torch.tensor(
            [token for token in range(model.codec.vocab_size) if token not in model.codec.special_ids]
        )
        self.settings = {"model": sources.name, "dtype": str(own).removeprefix("torch."), **asdict(config)}
        works = [
            Workload(f"batch {rows}", rows, config.prompt_tokens, config.new_tokens, rows * config.new_tokens)
            for rows in config.batches
        ]
        works.append(Workload(f"prefill {config.prefill}", 1, config.prefill, 1, READ * config.prefill, READ))
        self._contests = {work: Contest(work.name, [SIDES[::-1]], partial(self._round, work)) for work in works}

    def warm_up(self) -> None:
        for contest in self._contests.values():
            contest.play(-1)

    def units(self, done: dict[str, Any]) -> Iterator[Unit]:
        yield from play(list(self._contests.values()), self.config.enough, done)
        yield "memory", partial(read_bandwidth, self._engine.device)

    def _round(self, work: Workload, number: int) -> Round:
        """Both sides answer the same prompts. Raises `WrongPath` if one stopped short."""
        random = Random(f"{self.seed} {work.name} {number}")
        generator = torch.Generator().manual_seed(random.getrandbits(63))
        found: Round = {side: [] for side in SIDES}
        for _ in range(work.times):
            picked = torch.randint(len(self._ordinary), (work.rows, work.prompt), generator=generator)
            # no two begin alike: nothing of one is found in the pages of another
            picked[:, 0] = torch.randperm(len(self._ordinary), generator=generator)[: work.rows]
            prompts = self._ordinary[picked]
            ours = Answering(self._engine, prompts, work, self.config.piece)
            theirs = Generating(self._speaker.model, prompts, work, self.config.piece)
            take_turns(dict(zip(SIDES, (ours, theirs), strict=True)), random)
            ours.check()
            theirs.check()
            for side, pieces in zip(SIDES, (ours.pieces, theirs.pieces), strict=True):
                found[side] += pieces
        return found

    def rows(self, done: dict[str, Any]) -> list[dict[str, Any]]:
        """Rates count new tokens over the whole time, the prompt's reading included; those of a prefill count the
        prompt's tokens over the time to its first new token. ratio: of the rounds' own ratios."""
        return [row for work, contest in self._contests.items() for row in contest.rows(done, work.counted)]

    def more(self, done: dict[str, Any]) -> dict[str, Any]:
        """weight_bytes: read in one step. The bound is what a step allows that costs nothing but reading them."""
        if "memory" not in done:
            return {}
        weights, bandwidth = weight_bytes(self._speaker.model), done["memory"]
        bound = round(bandwidth / weights, 2)
        return {
            "memory": {
                "weight_bytes": weights,
                "bytes_per_second": round(bandwidth),
                "tokens_per_second_at_batch_1": bound,
            }
        }

    def _notes(self, done: dict[str, Any]) -> list[str]:
        memory = self.more(done).get("memory")
        notes = (
            [
                f"memory: {memory['bytes_per_second'] / 1e9:.1f} GB/s, {memory['weight_bytes'] / 1e6:,.0f} MB of "
                f"weights a step: at most {memory['tokens_per_second_at_batch_1']:.1f} tokens/s at batch 1"
            ]
            if memory
            else []
        )
        return [*notes, shortfall(list(self._contests.values()), self.config.enough, done)]

    def table(self, done: dict[str, Any]) -> RenderableType:
        config = self.config
        table = Table(
            title=f"{self.settings['model']} {self.settings['dtype']}: {config.prompt_tokens} tokens in, "
            f"{config.new_tokens} out, tokens/s: median (p10-p90); ratio: median (95 % interval)",
            caption="\n".join(filter(None, self._notes(done))),
        )
        table.add_column("workload")
        for heading in ("n", *SIDES, "ratio"):
            table.add_column(heading, justify="right")
        for row in self.rows(done):
            rates = (str(Spread(**row["tokens_per_s"][side])) for side in SIDES)
            table.add_row(row["workload"], str(row["n"]), *rates, interval(row["ratio"]))
        return table


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of weights that one step of a `transformers` language model reads: all but eyes and embedding rows.

    An embedding that is the output head too is read in full.
    """
    head = model.get_output_embeddings().weight  # type: ignore[operator]
    left_out = {
        id(parameter) for name, parameter in model.named_parameters() if "vision" in name or "projector" in name
    }
    embedding = model.get_input_embeddings().weight  # type: ignore[operator]
    if embedding is not head:
        left_out.add(id(embedding))
    return sum(p.numel() * p.element_size() for p in model.parameters() if id(p) not in left_out)


def read_bandwidth(device: torch.device, repeats: int = 7) -> float:
    """Bytes/s at which a buffer far larger than the caches is read or copied, whichever is faster; the best run."""
    count = BUFFER_BYTES // 4
    source, target = torch.ones(count, device=device), torch.empty(count, device=device)
    ways: list[tuple[Callable[[], object], int]] = [
        (lambda: float(source.sum()), BUFFER_BYTES),
        (lambda: float(target.copy_(source)[0]), 2 * BUFFER_BYTES),
    ]
    best = 0.0
    for _ in range(repeats):
        for way, moved in ways:
            began = perf_counter()
            way()
            best = max(best, moved / (perf_counter() - began))
    return best


class Answering:
    """The engine's side: all prompts at once, from an empty cache, `piece` tokens of each a step."""

    def __init__(self, engine: Engine, prompts: torch.Tensor, work: Workload, piece: int) -> None:
        self.pieces: list[float] = []
        self._engine, self._work, self._piece = engine, work, piece
        engine.pool.clear_cache()
        sampling = SamplingParams(max_tokens=work.new, ignore_eos=True)
        began = perf_counter()
        self._requests = [engine.submit_prompt(ids, sampling) for ids in prompts.tolist()]
        self._taken = perf_counter() - began  # in the first piece

    @property
    def done(self) -> bool:
        return all(request.reply is not None for request in self._requests)

    def step(self) -> None:
        wanted = self._piece * (len(self.pieces) + 1)
        began = perf_counter() - self._taken
        while any(_made(request) < wanted for request in self._requests if request.reply is None):
            self._engine.step()
        self.pieces.append(perf_counter() - began)
        self._taken = 0.0

    def check(self) -> None:
        replies = [request.reply for request in self._requests if request.reply is not None]
        if any(len(reply.token_ids) != self._work.new or reply.passes[0].cached_tokens for reply in replies):
            raise WrongPath(
                f"{self._work.name}: the engine did not decode {self._work.new} tokens from scratch for each prompt"
            )


def _made(request: Request) -> int:
    """Tokens of its answer so far."""
    (run,) = request.runs.values()
    assert isinstance(run, Run)
    return run.sequence.num_tokens - run.sequence.prompt_tokens


class Generating:
    """The side of `transformers`: `generate`, called again with what it said and its own cache for every piece. A
    call of it costs a few milliseconds, far less than the tokens of a piece."""

    def __init__(self, model: Any, prompts: torch.Tensor, work: Workload, piece: int) -> None:
        self.pieces: list[float] = []
        self.ids = prompts.to(model.device)
        self._model, self._work, self._piece, self._cache = model, work, piece, None

    @property
    def done(self) -> bool:
        return len(self.pieces) * self._piece >= self._work.new

    @torch.inference_mode()
    def step(self) -> None:
        left = self._work.new - len(self.pieces) * self._piece
        began = perf_counter()
        out = self._model.generate(
            self.ids,
            attention_mask=torch.ones_like(self.ids),
            past_key_values=self._cache,
            max_new_tokens=min(self._piece, left),
            do_sample=False,
            use_cache=True,
            return_dict_in_generate=True,
        )
        self.ids, self._cache = out.sequences, out.past_key_values
        self.ids.cpu()
        self.pieces.append(perf_counter() - began)

    def check(self) -> None:
        if self.ids.shape[1] != self._work.prompt + self._work.new:
            raise WrongPath(f"{self._work.name}: transformers did not decode {self._work.new} tokens for each prompt")
