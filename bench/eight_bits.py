"""What int8 weights change of a model on a CPU: the time of its steps, its next tokens, its detector's AUROC.

`python -m stockade.bench.eight_bits --data DIR`: DIR has alpaca-eval and gptfuzz, as `stockade data` takes them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from random import Random
from statistics import median
from time import perf_counter

import torch
from torch import Tensor

from ..engine.engine import Engine
from ..engine.models.decoder import Decoder
from ..engine.models.dense import dense
from ..engine.models.model import Model
from ..engine.sampling import SamplingParams
from ..train.data import Part, Source, at_most, read_set
from ..train.features import passage, pooled_states
from ..train.fit import auroc
from .machine import this_machine, versions

STEPS, PREFILL, FORCED = 24, 512, 64


def ratios(plain: Engine, narrow: Engine, rounds: int) -> dict[str, dict[str, float]]:
    """ms of steps that decode 1 and 16 texts, and of a prompt, in turn; the ratio is the median of the rounds'."""
    measured: dict[str, Callable[[Engine, Random], float]] = {
        "decode, batch 1": lambda engine, random: _step(engine, 1, random),
        "decode, batch 16": lambda engine, random: _step(engine, 16, random),
        f"prompt of {PREFILL}": _prompt,
    }
    found = {}
    for what, measure in measured.items():
        pairs = [(measure(plain, Random(round)), measure(narrow, Random(round))) for round in range(rounds + 1)][1:]
        found[what] = {
            "bf16 ms": round(median(pair[0] for pair in pairs), 2),
            "int8 ms": round(median(pair[1] for pair in pairs), 2),
            "times as fast": round(median(first / second for first, second in pairs), 2),
        }
    return found


def _step(engine: Engine, batch: int, random: Random) -> float:
    for _ in range(batch):
        engine.submit_prompt(_ids(random, 64), SamplingParams(max_tokens=STEPS + 2, ignore_eos=True))
    took = []
    while engine.has_work:
        began = perf_counter()
        engine.step()
        took.append(1e3 * (perf_counter() - began))
    return median(took[2:])


def _prompt(engine: Engine, random: Random) -> float:
    began = perf_counter()
    engine.generate([_ids(random, PREFILL)], SamplingParams(max_tokens=1))
    return 1e3 * (perf_counter() - began)


def _ids(random: Random, count: int) -> list[int]:
    return [random.randrange(1000, 40000) for _ in range(count)]


@torch.inference_mode()
def next_tokens(model: Model, ids: list[int]) -> Tensor:
    """The likeliest token after each of the last FORCED of `ids`."""
    decoder = model.backbone.decoder
    assert isinstance(decoder, Decoder)
    return decoder.logits(dense(decoder, ids)[-FORCED:]).argmax(1)


def agreement(plain: Engine, narrow: Engine, data: Path, answers: int) -> tuple[float, int]:
    """The share of next tokens that both choose, over the first FORCED of real answers, and of how many."""
    models = plain.models["mllm"], narrow.models["mllm"]
    same: list[Tensor] = []
    with open(data / "alpaca-eval" / "answers.jsonl", encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            question, answer = (models[0].codec.encode_text(row[part]) for part in ("question", "response"))
            if len(answer) > FORCED and len(same) < answers:
                first, second = (next_tokens(model, question + answer[:FORCED]) for model in models)
                same.append(first == second)
    both = torch.cat(same)
    return float(both.double().mean()), len(both)


def detector_auroc(engine: Engine, data: Path, limit: int) -> float:
    """Of the engine's detector, on held-out answers of GPTFuzz, at most `limit` of a kind."""
    examples = at_most(limit, [item for item in read_set(data, Source.GPTFUZZ, 0) if item.part is Part.TEST])
    model = engine.models["detector"]
    assert model.head is not None
    spec = model.head.spec
    passages = [passage(model, spec.template, item.question, item.text) for item in examples]
    scores = model.head.score(pooled_states(model, passages, [spec.layer]).of(spec.layer, spec.pooling))
    harmless = torch.tensor([item.harmless for item in examples])
    return auroc(scores[harmless], scores[~harmless])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="smol")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--answers", type=int, default=50)
    parser.add_argument("--limit", type=int, default=200)
    options = parser.parse_args()
    plain, narrow = (
        Engine(options.model, device="cpu", dtype=torch.bfloat16, weights=weights, kv_bytes=256 << 20)
        for weights in (None, "int8")
    )
    share, tokens = agreement(plain, narrow, options.data, options.answers)
    found = {
        "machine": asdict(this_machine()),
        "versions": versions(),
        "same next token": {"share": round(share, 4), "tokens": tokens},
        "detector AUROC": {
            name: round(detector_auroc(engine, options.data, options.limit), 4)
            for name, engine in (("bf16", plain), ("int8", narrow))
        },
        **ratios(plain, narrow, options.rounds),
    }
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
