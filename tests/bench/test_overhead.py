"""The measurements measure what they say: the forced path, fixed lengths, cold caches, paired differences."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from pathlib import Path
from random import Random
from time import perf_counter, sleep
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from stockade.bench.commands import app
from stockade.bench.decode import weight_bytes
from stockade.bench.estimates import Estimate
from stockade.bench.overhead import OverheadPlan
from stockade.bench.overhead_report import Goal, Mixed, OverheadConfig, figures
from stockade.bench.published import Lengths
from stockade.bench.report import Spread, WrongPath
from stockade.bench.side_by_side import Run, Variant, Whole, together
from stockade.bench.variants import (
    DEFAULT,
    TRANSFORMERS,
    bench_models,
    check_path,
    counterpart,
    engine_variants,
    forced_guards,
    published_variants,
    wanted_outcome,
)
from stockade.bench.workload import Asked, picture, question, sources
from stockade.engine.engine import Engine
from stockade.engine.errors import BadInput
from stockade.engine.models.shapes import byte_tokenizer
from stockade.engine.request import Outcome
from stockade.engine.sampling import SamplingParams

LENGTHS = Lengths(answer=5, judge=2, caption=4, mended=3)
GUARDED = (
    "protector",
    "ecso",
    "ecso-continued",
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
    report = bench(
        "overhead", "--model", "tiny-llava", "--answer-tokens", "4", "--json", str(file), "--harmful", "0.5"
    )
    written = json.loads(file.read_text(encoding="utf-8"))
    assert list(written["units"]) == ["latency 0", "throughput 0", "mixed 0", "rewrites"]
    assert {**written, "units": {}} == report
    variants = report["variants"]
    assert set(variants) == {*DEFAULT, "off", "detector-alone", TRANSFORMERS, "published-protector", "published-ecso"}
    for name in DEFAULT:
        harmless, harmful = variants[name]["harmless"], variants[name]["harmful"]
        theirs = variants[counterpart(name)]
        for key in ("added_ms", "added_percent", "exposed_percent", "published_added_ms", "published_added_percent"):
            assert isinstance(harmless[key], float), (name, key)
        assert harmless["published_added_ms"] == theirs["harmless"]["added_ms"]
        assert harmful["published_total_ms"] == theirs["harmful"]["total_ms"]
        ratio = theirs["harmful"]["total_ms"] / harmful["total_ms"]
        assert harmful["speedup_over_published"] == pytest.approx(ratio, rel=1e-2)
        assert harmless["lost_throughput_percent"]["n"] == 1
    passes = {name: (variants[name]["harmless"]["passes"], variants[name]["harmful"]["passes"]) for name in DEFAULT}
    assert passes["probe"] == (["answer"], ["answer", "rewrite"])
    assert passes["protector-adapter"] == (["answer", "score"], ["answer", "score", "rewrite"])
    assert passes["protector-separate"][0] == ["answer", "screen"]
    assert passes["ecso-continued"] == (["answer", "judge"], ["answer", "judge", "caption", "eyes_closed"])
    found = [(row["guard"], row["path"]) for row in report["rows"] if row["guard"] in DEFAULT]
    assert found == [(name, path) for name in DEFAULT for path in ("harmless", "harmful", "mixed")]
    for row in report["rows"]:
        if row["path"] != "mixed":
            parts = [row[part]["median"] for part in ("hidden_ms", "added_exposed_ms")]
            assert sum(parts) == pytest.approx(row["added_ms"], abs=0.01)  # of one pair, the medians add up
    assert report["rewrites"]["kept_percent"] >= 60.0
    assert {target["met"] for target in report["targets"]} <= {True, False}
    assert report["versions"]["torch"] == torch.__version__


def test_a_guard_without_a_name_is_refused() -> None:
    with pytest.raises(BadInput, match="no guard 'nothing'"):
        bench("overhead", "--model", "tiny-llama", "--variant", "nothing")


def test_a_model_on_the_fallback_has_every_guard_but_attached_adapters(checkpoint: Callable[[str], Path]) -> None:
    config = OverheadConfig(
        ("probe", "protector-adapter", "ecso-continued"), 1, 1, 1, 8, LENGTHS, 2, 1, 4, mixed_pairs=1
    )
    with sources(str(checkpoint("olmo2")), "tiny-llama", "tiny-llama") as weights:
        plan = OverheadPlan(weights, config, torch.float32)
        measures = dict(plan.units({}))
        done = {name: measures[name]() for name in ("latency 0", "mixed 0")}
        with pytest.raises(BadInput, match="runs on the fallback: protector-adapter needs adapters attached"):
            OverheadPlan(weights, replace(config, variants=("protector-adapter",)), torch.float32)
    more = plan.more(done)
    assert {name for name in more["variants"] if name in DEFAULT} == {"probe", "ecso-continued"} == set(more["mixed"])
    assert more["variants"]["probe"]["harmful"]["passes"] == ["answer", "rewrite"]
    assert list(more["not_done"]) == ["protector-adapter"]
    console = Console(width=200, record=True, file=StringIO())
    console.print(plan.table(done))
    assert re.search("protector-adapter .*not done .*attached adapters need", console.export_text())


def test_the_engine_does_the_published_passes() -> None:
    """`-as-published` guards cost what they cost because of the engine, not because they do less."""
    with sources("tiny-llava") as weights:
        models = bench_models(weights, torch.float32)
        mllm, detoxifier = weights.speakers(torch.float32, models.device)
        scores = weights.scores(torch.float32, models.device)
        engine = Engine(models=models)
        ours = engine_variants(LENGTHS, ("protector-as-published", "ecso-as-published"))
        theirs = published_variants(mllm, scores, detoxifier, LENGTHS)
        asked = Asked("A question.", [picture(Random(1))])
        for variant in ours:
            if variant.name.startswith("off"):
                continue
            other = next(v for v in theirs if (v.name, v.path) == (counterpart(variant.name), variant.path))
            runs = together(
                {"ours": variant.begin(engine, [asked]), "theirs": other.begin(engine, [asked])}, Random(0)
            )
            mine, published = runs["ours"], runs["theirs"]
            assert mine.passes == published.passes
            assert mine.new_tokens == published.new_tokens


def test_a_clock_stands_still_while_others_step() -> None:
    class Slow:
        done, run = False, Run(0.0, (), 0, 0)
        steps = 0

        def step(self) -> None:
            sleep(0.05)
            self.steps += 1
            self.done = self.steps == 4

    with sources("tiny-llama") as weights:
        models = bench_models(weights, torch.float32)
        off, harmless, harmful = engine_variants(LENGTHS, ("protector-separate",))
        begun = {v.path: v.begin(Engine(models=models), [Asked("A question.", [])]) for v in (off, harmful)}
        began = perf_counter()
        runs = together({**begun, "slow": Slow()}, Random(0))
        wall = perf_counter() - began
        runs["screened"] = together(
            {"": harmless.begin(Engine(models=models), [Asked("A question.", [])])}, Random(0)
        )[""]
    plain, mended, screened = runs["harmless"], runs["harmful"], runs["screened"]
    assert plain.seconds + mended.seconds < wall - 0.15
    assert plain.passes == ("answer",) and len(plain.steps) >= LENGTHS.answer - 2
    assert plain.screened == 0 < screened.screened  # so short an answer is read at its end
    assert 0.0 < plain.exposed < mended.exposed < mended.seconds
    assert sum(plain.steps) + plain.before == pytest.approx(plain.seconds)  # it does nothing else
    for run in (mended, screened):
        assert sum(run.steps) + run.before < run.seconds
        assert 0.0 < run.steady < run.seconds


def test_added_latency_is_a_difference_of_pairs() -> None:
    def variant(name: str, baseline: str, path: str = "harmless") -> Variant:
        return Variant(name, baseline, path, lambda engine, asked: Whole(lambda: Run(0.0, (), 0, 0)))

    def runs(**seconds: float) -> dict[int, Run]:
        return {
            int(repeat[1:]): Run(value, ("answer",), 1, 1, 0.25, 0.5, (value / 4, value / 2, value / 8))
            for repeat, value in seconds.items()
        }

    variants = [variant("off", "off"), variant("guard", "off"), variant("guard", "off", "harmful")]
    measured = {
        ("off", "harmless"): runs(r0=2.0, r1=4.0, r2=9.0),
        ("guard", "harmless"): runs(r0=2.0, r1=4.0, r2=9.0),
        ("guard", "harmful"): runs(r1=5.0, r2=10.0),  # the rarer path ran in some repeats only
    }
    made = figures(variants, measured, {"guard": Estimate.of([0.25])})
    harmful = made["guard"]["harmful"]
    assert harmful.added_wall == Estimate(2, 1.0, 1.0, 1.0)  # whatever the questions cost
    assert harmful.added == Estimate(2, 0.875, 0.875, 0.875)  # 1/8 of all, and three times 1/4
    assert harmful.added_percent.median == pytest.approx(21.875)
    assert harmful.exposed_percent == pytest.approx(12.5)
    assert (harmful.added_step.n, harmful.added_step.median) == (6, 0.25)  # step by step
    assert harmful.lost is None and made["guard"]["harmless"].lost == Estimate.of([0.25])
    assert made["guard"]["harmless"].added.median == 0.0


def test_work_ahead_of_a_verdict_is_wasted_where_that_is_harmless() -> None:
    with sources("tiny-llama") as weights:
        models = bench_models(weights, torch.float32)
    runs = {}
    for variant in engine_variants(replace(LENGTHS, answer=80), ("protector-separate", "protector-alarmed")):
        begun = variant.begin(Engine(models=models), [Asked("A question.", [])])
        runs[variant.name, variant.path] = together({"": begun}, Random(0))[""]
    alarmed = runs["protector-alarmed", "harmless"]
    assert alarmed.wasted_tokens > 30 and 0.0 < alarmed.wasted < alarmed.seconds
    for key in (("protector-alarmed", "harmful"), ("protector-separate", "harmless")):
        assert (runs[key].wasted_tokens, runs[key].wasted) == (0, 0.0)
    assert Run.of(json.loads(json.dumps(alarmed))) == alarmed


def test_what_was_not_measured_yet_is_left_out() -> None:
    variants = [
        Variant(name, "off", "harmless", lambda engine, asked: Whole(lambda: Run(0.0, (), 0, 0))) for name in "ab"
    ]
    run = Run(1.0, ("answer",), 1, 1)
    measured = {("off", "harmless"): {0: run}, ("a", "harmless"): {0: run, 1: run}, ("b", "harmless"): {1: run}}
    made = figures(variants, measured, {})
    assert list(made) == ["a"] and made["a"]["harmless"].added.n == 1


def test_mixed_traffic_counts_by_how_often_an_answer_is_harmful() -> None:
    # nine pairs of two requests in which nothing happens, and one where a harmful one takes four seconds more
    mixed = Mixed.of([*[[0.0, 2.0, 0]] * 9, [4.0, 2.0, 1]], at_once=2)
    assert mixed.harmful == 0.05
    assert mixed.added.median == pytest.approx(0.2) and mixed.added.low == 0.0 < 0.2 < mixed.added.high
    assert mixed.lost.median == pytest.approx(4.0 / 24.0) and mixed.lost.high < 0.5
    with pytest.raises(ValueError, match="no values"):
        Estimate.of_mean([])


def test_an_estimate_has_the_median_and_its_interval() -> None:
    values = [float(value) for value in range(1, 40)]
    estimate = Estimate.of(values)
    assert (estimate.n, estimate.median) == (39, 20.0)
    assert 10.0 < estimate.low < 20.0 < estimate.high < 30.0
    assert Estimate.of(values) == estimate  # the same values, the same interval
    assert estimate.scaled(-1.0).low == -estimate.high
    with pytest.raises(ValueError, match="no values"):
        Estimate.of([])


def test_a_goal_is_met_at_its_bound() -> None:
    assert Goal("", True, 2.0, "%", 2.0).met and not Goal("", True, 2.0, "%", 2.1).met
    assert Goal("", False, 3.0, "x", 3.0).met and not Goal("", False, 3.0, "x", 2.9).met
    wide, narrow = Estimate(9, 3.1, 2.0, 4.0), Estimate(9, 3.1, 3.05, 4.0)
    assert Goal("", False, 3.0, "x", wide).met and not Goal("", False, 3.0, "x", wide).certain
    assert Goal("", False, 3.0, "x", narrow).certain


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


def test_spread_needs_values() -> None:
    assert Spread.of([1.0, 2.0, 3.0]).median == 2.0
    with pytest.raises(ValueError, match="no values"):
        Spread.of([])
