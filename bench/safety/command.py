"""`stockade bench safety`. What takes seconds to import is imported where it is used."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from ...engine.errors import BadInput, CheckpointMissing, InvalidGuard
from ..options import DtypeOption, JsonOption, ModelOption, ResumeOption, SeedOption, run_plan

if TYPE_CHECKING:
    from ...engine.engine import Engine
    from ...engine.named import EngineNames
    from .asked import Keep
    from .judges import Judge


def safety(
    data: Annotated[
        Path,
        typer.Option(
            exists=True, file_okay=False, help="Folder with the sets, each in a folder: see bench/README.md."
        ),
    ],
    model: ModelOption = "smol",
    guard: Annotated[
        list[str] | None, typer.Option("--guard", help="Repeatable; off is always there. (default: protector, ecso)")
    ] = None,
    detector: Annotated[str | None, typer.Option(help="The guards', as `stockade chat --detector` takes it.")] = None,
    detoxifier: Annotated[
        str | None, typer.Option(help="The guards', as `stockade chat --detoxifier` takes it.")
    ] = None,
    judge: Annotated[
        list[str] | None,
        typer.Option(
            "--judge",
            help="keywords (VLGuard's rule), a detector as --detector takes it, or an OpenAI-compatible http…/v1; "
            "repeatable. (default: keywords; of smol smol-judge, too)",
        ),
    ] = None,
    judge_model: Annotated[
        str | None, typer.Option(help="The endpoint's name of it; its key in OPENAI_API_KEY.")
    ] = None,
    compare: Annotated[
        list[str] | None,
        typer.Option(
            "--compare", help="A detector to measure on labeled answers; repeatable. (default: the guards')"
        ),
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option("--set", help="A set; repeatable. (default: all in --data)")
    ] = None,
    limit: Annotated[int, typer.Option(min=0, help="Cases of each set and scenario at most; 0: all.")] = 100,
    labeled: Annotated[
        int, typer.Option(min=0, help="Labeled answers of each kind for judges and detectors; 0: none.")
    ] = 150,
    max_tokens: Annotated[int, typer.Option(min=1, help="Of an answer.")] = 96,
    at_once: Annotated[int, typer.Option(min=1, help="Requests under way.")] = 32,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave out rows of the wrong form, and count them.")
    ] = False,
    keep_answers: Annotated[
        Path | None, typer.Option(help="Write every answer to this file, JSON lines; elsewhere there is none.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda. (default: cuda if there is one)")] = None,
    dtype: DtypeOption = None,
    seed: SeedOption = 0,
    json: JsonOption = None,
    resume: ResumeOption = False,
) -> None:
    """Attack success, over-refusal, utility, rounds, latency and tokens of a model under its guards.

    Every question with and without its image; no text of a set or an answer is
    written, unless --keep-answers asks for it.
    """
    from ...engine.models.sources import SMOL_JUDGE, bundle_of
    from ...engine.named import EngineNames, guard_named, source_named
    from ...train.rows import Bad, Skipped, refuse
    from .judges import KEYWORDS, check_apart
    from .plan import OFF, SafetyConfig, SafetyPlan, read_cases

    names = tuple(dict.fromkeys([OFF, *(guard or ("protector", "ecso"))]))
    config = SafetyConfig(names, tuple(only or ()), limit or None, labeled, max_tokens, at_once, seed=seed)
    guards = {name: guard_named(name) for name in names if name != OFF}
    own = EngineNames(model, detector, detoxifier, device, dtype)
    bundle = bundle_of(source_named(model))
    guards_detector = detector or bundle
    if guards_detector is None and "protector" in names:
        raise InvalidGuard("protector needs a detector: give --detector, or other guards by --guard")
    judges = tuple(dict.fromkeys(judge or ((KEYWORDS,) if bundle is None else (KEYWORDS, SMOL_JUDGE))))
    for name in judges:
        if guards_detector is not None:
            check_apart(name, guards_detector)
    skipped = Skipped()
    bad: Bad = skipped if skip_bad else refuse
    cases = read_cases(data, config, bad)
    compared = dict.fromkeys(compare or ([guards_detector] if guards_detector is not None else []))

    def engine_with(name: str) -> Callable[[], Engine]:
        return lambda: EngineNames(model, name, detoxifier, device, dtype).engine()

    stderr = Console(stderr=True, highlight=False)
    with ExitStack() as stack:
        keep = None if keep_answers is None else _kept(keep_answers, stack)

        def make() -> SafetyPlan:
            engine = own.engine()
            settings = {
                "model": model,
                "dtype": str(engine.models["mllm"].backbone.decoder.dtype).removeprefix("torch."),
                "detector": guards_detector,
            }
            plan = SafetyPlan(
                engine,
                dict(guards),
                cases,
                [_judge(name, own, judge_model) for name in judges],
                config,
                {**settings, "detoxifier": detoxifier, "skipped_rows": skipped.count},
                data=data,
                detectors={name: engine_with(name) for name in compared},
                bad=bad,
                keep=keep,
            )
            stderr.print(plan.work)
            return plan

        run_plan("safety", make, json, resume)
    for problem in skipped.first:
        stderr.print(f"left out: {problem}", style="yellow", markup=False)


def _judge(name: str, own: EngineNames, judge_model: str | None) -> Judge:
    import os
    from dataclasses import replace

    from ...engine.models.sources import BUNDLES, SMOL_JUDGE
    from .judges import KEYWORDS, DetectorJudge, EndpointJudge, KeywordJudge

    if name == KEYWORDS:
        return KeywordJudge()
    if name.startswith(("http://", "https://")):
        if judge_model is None:
            raise BadInput("an endpoint needs --judge-model, its name for the model")
        return EndpointJudge(name, judge_model, os.environ.get("OPENAI_API_KEY"))
    # it reads texts only, and judges any model's
    model = BUNDLES[0] if name == SMOL_JUDGE else own.model
    try:
        return DetectorJudge(name, replace(own, model=model, detector=name).engine())
    except CheckpointMissing as error:
        raise BadInput(
            f"no judge {name!r} ({error}); there are {KEYWORDS}, {SMOL_JUDGE}, detectors, and endpoints as http…/v1"
        ) from error


def _kept(file: Path, stack: ExitStack) -> Keep:
    from ...train.journal import Journal

    journal = stack.enter_context(Journal(file))

    def keep(case: Any, with_image: bool, guard: str, reply: Any) -> None:
        key = f"{case.set}/{case.scenario}/{case.id}/{'with' if with_image else 'without'}/{guard}"
        journal.add(key, {"outcome": str(reply.outcome), "text": reply.text})

    return keep
