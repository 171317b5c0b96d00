"""The measurements measure what they say: the forced path, fixed lengths, cold caches, paired differences."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from stockade.bench.commands import app
from stockade.bench.decode import weight_bytes
from stockade.bench.machine import this_machine
from stockade.bench.overhead import Run, Variant, check_path, figures, forced_guards, wanted_outcome
from stockade.bench.published import Lengths
from stockade.bench.report import Spread, WrongPath
from stockade.bench.workload import picture, question, sources
from stockade.engine.errors import BadInput
from stockade.engine.models.shapes import byte_tokenizer
from stockade.engine.request import Outcome
from stockade.engine.sampling import SamplingParams

LENGTHS = Lengths(answer=5, judge=2, caption=4, mended=3)
GUARDED = (
    "protector",
    "ecso",
    "protector-rechecked",
    "ecso-rechecked",
    "protector-as-published",
    "ecso-as-published",
)


def bench(*arguments: str) -> Any:
    done = CliRunner().invoke(app, [*arguments, "--quick"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout.splitlines()[-1])


def test_overhead_reports_every_variant_on_both_paths(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    report = bench("overhead", "--model", "tiny-llava", "--answer-tokens", "3", "--json", str(file))
    assert json.loads(file.read_text(encoding="utf-8")) == report
    variants = report["variants"]
    assert set(variants) == {
        *("off", "off-as-published", "transformers-off", "published-protector", "published-ecso"),
        *GUARDED,
    }
    passes = {
        name: [len(paths[path]["passes"]) for path in ("harmless", "harmful")] for name, paths in variants.items()
    }
    for name in variants:
        rechecked = name.endswith("rechecked")
        want = [1, 1] if "off" in name else [2, 3 + rechecked] if "protector" in name else [2, 4 + rechecked]
        assert passes[name] == want, name
        for figure in variants[name].values():
            assert figure["total_ms"]["n"] == 1 and figure["total_ms"]["median"] > 0
    assert report["machine"]["torch"] == torch.__version__
    for system in ("protector", "ecso"):
        ours, theirs = variants[f"{system}-as-published"], variants[f"published-{system}"]
        for path in ("harmless", "harmful"):
            assert ours[path]["new_tokens"] == theirs[path]["new_tokens"]
            assert ours[path]["passes"] == theirs[path]["passes"]
            assert variants[system][path]["lost_throughput_percent"] is not None


def test_added_latency_is_a_difference_of_pairs() -> None:
    def runs(*seconds: float) -> list[Run]:
        return [Run(second, ("answer",), 1, 1) for second in seconds]

    def variant(name: str, baseline: str, path: str = "harmless") -> Variant:
        return Variant(name, baseline, path, lambda asked: runs(0.0)[0])

    variants = [variant("off", "off"), variant("slow-off", "slow-off"), variant("guard", "slow-off")]
    variants.append(variant("guard", "slow-off", "harmful"))
    measured = {
        ("off", "harmless"): runs(1.0, 1.0, 1.0),
        ("slow-off", "harmless"): runs(2.0, 4.0, 9.0),
        ("guard", "harmless"): runs(2.0, 4.0, 9.0),
        ("guard", "harmful"): runs(3.0, 5.0, 10.0),
    }
    made = figures(
        variants, measured, {("off", "harmless"): [8.0], ("slow-off", "harmless"): [4.0], ("guard", "harmful"): [3.0]}
    )
    figure = made["guard"]["harmful"]
    assert figure.added == Spread(3, 1.0, 1.0, 1.0)  # whatever the questions cost
    assert figure.added_percent == pytest.approx(25.0)
    assert figure.added_percent_of_engine == pytest.approx(100.0)
    assert figure.lost_throughput == pytest.approx(0.25)
    assert made["off"]["harmful"] == made["off"]["harmless"]


@pytest.mark.parametrize("path", ["harmless", "harmful"])
@pytest.mark.parametrize("name", GUARDED)
def test_a_forced_guard_takes_its_path_with_texts_of_fixed_length(name: str, path: str) -> None:
    with sources("tiny-llava") as weights:
        engine = weights.engine(torch.float32)
        guard = forced_guards(LENGTHS, path)[name]
        message = {"type": "image", "image": picture(Random(1))}, {"type": "text", "text": "A question."}
        sampling = SamplingParams(max_tokens=LENGTHS.answer, ignore_eos=True)
        (reply,) = engine.chat([[{"role": "user", "content": message}]], guard=guard, sampling=sampling)
        check_path(reply, wanted_outcome(guard, path), LENGTHS.answer)
        judge = LENGTHS.judge if name == "ecso-as-published" else 0
        lengths = {"answer": 5, "score": 0, "screen": 0, "judge": judge, "caption": 4, "rewrite": 3, "eyes_closed": 3}
        assert [len(record.token_ids) for record in reply.passes] == [lengths[p.label] for p in reply.passes]
        other = Outcome.CLEAN if path == "harmful" else Outcome.MENDED
        with pytest.raises(WrongPath, match="ended"):
            check_path(reply, other, LENGTHS.answer)
        with pytest.raises(WrongPath, match="after 5 tokens"):
            check_path(reply, reply.outcome, 6)


def test_decode_compares_the_same_work() -> None:
    report = bench("decode", "--model", "tiny-llama", "--new-tokens", "3", "--prefill", "40")
    assert set(report["workloads"]) == {"batch 1", "batch 4", "prefill 40"}
    for work in report["workloads"].values():
        rates = work["tokens_per_second"]
        assert work["ratio"] == pytest.approx(rates["stockade"]["median"] / rates["transformers"]["median"], rel=1e-2)
    assert report["memory"]["tokens_per_second_at_batch_1"] > 0


def test_concurrency_reports_ratio_and_shares() -> None:
    report = bench("concurrency", "--model", "tiny-llama", "--guard", "protector", "--answer-tokens", "3")
    figure = report["guards"]["protector"]["harmful"]
    assert figure["ratio"]["median"] > 0
    assert 0 < figure["guard_loop_percent"]["median"] < figure["outside_forward_percent"]["median"] < 100
    with pytest.raises(BadInput, match="no guard 'nothing'"):
        bench("concurrency", "--model", "tiny-llama", "--guard", "nothing")


def test_a_model_without_companions_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="--detector"), sources(str(tmp_path)):
        pass


def test_questions_have_their_length_and_differ() -> None:
    tokenizer, random = byte_tokenizer(384), Random(0)
    texts = {question(tokenizer, 40, random) for _ in range(20)}
    assert len(texts) == 20
    for text in texts:
        assert 38 <= len(tokenizer(text, add_special_tokens=False)["input_ids"]) <= 40


def test_step_reads_tied_embeddings_but_not_untied_ones() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {
        "vocab_size": 100,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
    }
    tied, untied = (LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=tie)) for tie in (True, False))
    assert weight_bytes(tied) == weight_bytes(untied) == sum(p.numel() for p in tied.parameters()) * 4


def test_a_busy_machine_is_named() -> None:
    machine = this_machine()
    assert machine.command.startswith("stockade")
    assert "load average 9.0 on 2 cores" in (replace(machine, cores=2, load_average=9.0).warning or "")
    assert replace(machine, cores=2, load_average=0.9).warning is None
    assert replace(machine, load_average=None).warning is None


def test_spread_needs_values() -> None:
    assert Spread.of([1.0, 2.0, 3.0]).median == 2.0
    with pytest.raises(ValueError, match="no values"):
        Spread.of([])
