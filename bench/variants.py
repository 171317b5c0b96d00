"""The guards that `bench overhead` compares, each as something that answers a question on a forced path.

A threshold forces the path and all texts have fixed lengths, so that runs compare: time is measured, not safety.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from time import perf_counter

import torch
from transformers import AutoTokenizer

from ..engine.chat import Chat
from ..engine.engine import Engine
from ..engine.errors import BadInput
from ..engine.guards import Detoxify, EyesClosed, Guard, HarmHead, Probe, SelfJudge
from ..engine.guards.prompts import detector_text
from ..engine.guards.remedies import Mending
from ..engine.models.backbones import check_without_weights
from ..engine.models.heads import IN_CONTEXT, Head, HeadSpec
from ..engine.models.loader import ModelSet, load_models
from ..engine.models.sources import Attached
from ..engine.passes import Answer, Decision, Handle, Loop, ModelTraits, ReleaseMode, Score
from ..engine.request import Outcome, Reply
from ..engine.sampling import SamplingParams
from .checkpoints import save_adapter
from .published import Lengths, PublishedEcso, PublishedProtector, Scores, Speaker, conversation
from .report import WrongPath
from .side_by_side import Answering, Run, Variant, Whole
from .workload import Asked, Sources

PATHS = ("harmless", "harmful")
MIXED = "mixed"  # some questions on the one path, some on the other
# A score is between 0 and 1: against these it is always harmless, always harmful.
THRESHOLDS = {"harmless": 0.0, "harmful": 2.0}
AS_PUBLISHED = "-as-published"
# Of the published pipelines, what each guard is compared with.
COUNTERPARTS = {"protector": "published-protector", "probe": "published-protector", "ecso": "published-ecso"}
TRANSFORMERS = "transformers-off"
DETECTOR_ALONE = "detector-alone"
DEFAULT = ("protector-separate", "protector-adapter", "probe", "ecso", "ecso-continued")
ATTACHED = ("protector-adapter",)
"""Guards that are adapters attached to the MLLM, which models on the fallback do not take."""


def is_published(variant: Variant) -> bool:
    """Whether it is a pipeline on `transformers`."""
    return variant.baseline == TRANSFORMERS


def counterpart(name: str) -> str | None:
    """The published pipeline that a guard of this engine is compared with; None for what is no guard."""
    return COUNTERPARTS.get(name.split("-")[0])


@dataclass(frozen=True)
class _Rewrites(Detoxify):
    """On a forced path the text is the models' own whatever it is: of an untrained one it may well be blank."""

    def mend(self, chat: Chat, answer: Answer) -> Mending:
        return _spoken((yield from super().mend(chat, answer)))


@dataclass(frozen=True)
class _AsksAgain(EyesClosed):
    """Likewise."""

    def mend(self, chat: Chat, answer: Answer, started: Handle | None = None) -> Mending:
        return _spoken((yield from super().mend(chat, answer, started)))


def _spoken(answer: Answer) -> Answer:
    return answer if answer.text.strip() else answer._replace(text=".")


def forced_guards(lengths: Lengths, path: str) -> dict[str, Guard | None]:
    """This engine's guards on a forced path, every text of its length; None is no guard at all.

    They let the mended answer go as the published scripts do. `-rechecked` are the guards as they ship, which judge
    it again (here it is refused then, after the same work as for one that passes). `-as-published` run the
    published scripts' own prompts and passes on this engine.
    """
    threshold = THRESHOLDS[path]
    first = SamplingParams(max_tokens=lengths.answer, ignore_eos=True)
    later = SamplingParams(max_tokens=lengths.mended, ignore_eos=True)
    word = SamplingParams(max_tokens=lengths.judge, ignore_eos=True)
    captions = SamplingParams(max_tokens=lengths.caption, ignore_eos=True)
    protector = replace(
        Guard.protector(threshold=threshold, max_rounds=1), remedy=_Rewrites(sampling=later), recheck=False
    )
    # any mass will do: the verdict is forced, a nonsensical one would cut the path short
    judge = SelfJudge(threshold=threshold, min_mass=1e-12)
    eyes_closed = _AsksAgain(sampling=later, caption_sampling=captions)
    ecso = replace(Guard.ecso(), detector=judge, remedy=eyes_closed, recheck=False)
    scripts = Guard.protector(published=True, threshold=threshold), Guard.ecso(published=True, threshold=threshold)
    protector_script, ecso_script = (
        replace(guard, released=replace(guard.released, sampling=first)) for guard in scripts if guard.released
    )
    return {
        "off": None,
        "protector": protector,
        "protector-rechecked": replace(protector, recheck=True),
        "ecso": ecso,
        "ecso-continued": replace(ecso, detector=replace(judge, mode="continue")),
        "ecso-rechecked": replace(ecso, recheck=True),
        "off-as-published": Guard(name="off", released=protector_script.released),
        "protector-as-published": replace(
            protector_script, remedy=_Rewrites(with_question=False, chat_template=False, sampling=later)
        ),
        "ecso-as-published": replace(
            ecso_script,
            detector=SelfJudge(mode="published", threshold=threshold, sampling=word),
            remedy=replace(eyes_closed, published=True),
        ),
    }


def guards_of_bench(lengths: Lengths, path: str, adapters: bool = True) -> dict[str, Guard | None]:
    """`forced_guards`, and those on the models that only `bench_models` has. To `protector-alarmed` every beginning
    looks harmful: it begins the rewrite beside the answer, which on the harmless path is in vain. Without `adapters`
    the probe's rewrites are those of the separate detoxifier."""
    known = forced_guards(lengths, path)
    separate = known.pop("protector")
    assert separate is not None
    mender = _Rewrites("detoxifier-adapter", sampling=SamplingParams(max_tokens=lengths.mended, ignore_eos=True))
    own = replace(separate, remedy=mender) if adapters else separate
    threshold = THRESHOLDS[path]
    attached = {"protector-adapter": replace(own, detector=HarmHead("detector-adapter", threshold=threshold))}
    return {
        **known,
        "protector-separate": separate,
        "protector-alarmed": replace(
            separate, detector=HarmHead(threshold=threshold, prefix_threshold=THRESHOLDS["harmful"], chunk=32)
        ),
        **(attached if adapters else {}),
        "probe": replace(own, detector=Probe(threshold=threshold)),
    }


def shipped_guards(lengths: Lengths, path: str) -> dict[str, Guard | None]:
    """`guards_of_bench` as they ship: what was mended is judged again, before it may leave (here it is refused then,
    after the same work), and what is said of a beginning agrees with the path."""
    out: dict[str, Guard | None] = {}
    for name, guard in guards_of_bench(lengths, path).items():
        detector = None if guard is None else guard.detector
        if guard is None or guard.published or detector is None:
            out[name] = guard
            continue
        if isinstance(detector, Probe):
            detector = replace(detector, fallback=HarmHead("detector-adapter", threshold=THRESHOLDS[path]))
        if isinstance(detector, HarmHead | Probe) and detector.prefix_threshold is None:
            detector = replace(detector, prefix_threshold=THRESHOLDS[path])
        if not name.endswith("-rechecked"):
            out[name] = replace(guard, detector=detector, recheck=True)
    return out


def takes_adapters(sources: Sources) -> bool:
    """Whether the MLLM will run on the engine's own decoder. Raises a `CheckpointError` for one that will not run."""
    return check_without_weights(sources.model)[1] is None


def bench_models(sources: Sources, dtype: torch.dtype | None = None, adapters: bool = True) -> ModelSet:
    """Every guard's models side by side, so that all variants share one unguarded reply.

    `detector` and `detoxifier` have weights and lanes of their own; `detector-adapter` (an activated LoRA) and
    `detoxifier-adapter` (a plain one) are random adapters on the MLLM's weights, and `probe` is a random head on its
    states a little above the middle. Without `adapters` there are none.
    """
    attached: tuple[Attached, Attached] | tuple[()] = ()
    if adapters:
        # ids that any text may have: they are appended, never looked for
        tokenizer = AutoTokenizer.from_pretrained(sources.folder)
        invocation = tokenizer.encode("Is this harmful?", add_special_tokens=False)[:4]
        detector = save_adapter(sources.folder, sources.work / "detector", task="SEQ_CLS", invocation=invocation)
        detoxifier = save_adapter(sources.folder, sources.work / "detoxifier", task="CAUSAL_LM", seed=1)
        attached = Attached(detector), Attached(detoxifier)
    here = load_models(sources.model, *attached, dtype=dtype)
    others = load_models(sources.detoxifier, sources.detector, dtype=dtype)
    mllm = here.models["mllm"]
    config = mllm.backbone.decoder.config
    layer = min(config.layers // 2 + 1, config.layers)
    weight = torch.randn(config.hidden_size, generator=torch.Generator().manual_seed(0)).to(here.device)
    head = Head(HeadSpec(layer, "mean", template=IN_CONTEXT), weight)
    models = {
        "mllm": mllm,
        "detector": others.models["detector"],
        "detoxifier": replace(others.models["mllm"], name="detoxifier"),
        "probe": replace(mllm, name="probe", depth=layer, head=head),
    }
    for name in ("detector", "detoxifier") if adapters else ():
        models[f"{name}-adapter"] = replace(here.models[name], name=f"{name}-adapter")
    return ModelSet(models, here.device, here.dtype)


def check_path(reply: Reply, wanted: Outcome, answer_tokens: int) -> None:
    """Raises `WrongPath` unless the reply ended as meant, after an answer of the length that was meant."""
    first = reply.passes[0]
    if reply.outcome is not wanted or len(first.token_ids) != answer_tokens:
        raise WrongPath(
            f"a run ended {reply.outcome} ({reply.error}) after {len(first.token_ids)} tokens; "
            f"meant was {wanted} after {answer_tokens}"
        )


def wanted_outcome(guard: Guard | None, path: str) -> Outcome:
    if guard is None or guard.detector is None:
        return Outcome.UNGUARDED
    if path == "harmless":
        return Outcome.CLEAN
    return Outcome.REFUSED if guard.recheck else Outcome.MENDED


def engine_variants(lengths: Lengths, names: tuple[str, ...], adapters: bool = True) -> list[Variant]:
    """The guards of these names, and the unguarded replies that they are compared with.

    Raises `BadInput` for a name that is none.
    """
    known = {path: guards_of_bench(lengths, path, adapters) for path in PATHS}
    guards = [name for name in known[PATHS[0]] if not name.startswith("off")]
    if unknown := [name for name in names if name not in guards]:
        raise BadInput(f"no guard {unknown[0]!r} to measure; there are {', '.join(guards)}")
    offs = tuple(dict.fromkeys(("off", *(_baseline(name) for name in names))))
    return [
        *(_variant(lengths, name, PATHS[0], known[PATHS[0]][name]) for name in offs),
        *(_variant(lengths, name, path, known[path][name]) for name in names for path in PATHS),
    ]


def _baseline(name: str) -> str:
    return "off" + AS_PUBLISHED if name.endswith(AS_PUBLISHED) else "off"


def mixed_variants(lengths: Lengths, names: tuple[str, ...], adapters: bool = True) -> list[Variant]:
    """The guards of these names on traffic in which every question says whether its answer is harmful, and `off`."""
    known = {path: guards_of_bench(lengths, path, adapters) for path in PATHS}
    return [_variant(lengths, name, MIXED, known[PATHS[0]][name], known[PATHS[1]][name]) for name in ("off", *names)]


def _variant(lengths: Lengths, name: str, path: str, guard: Guard | None, harmful: Guard | None = None) -> Variant:
    """harmful: takes the place of `guard` for the questions that say so."""
    sampling = SamplingParams(max_tokens=lengths.answer, ignore_eos=True)

    def begin(engine: Engine, asked: list[Asked]) -> Answering:
        guards = [harmful if item.harmful else guard for item in asked]

        def check(number: int, reply: Reply) -> None:
            found = path if path in PATHS else PATHS[asked[number].harmful]
            check_path(reply, wanted_outcome(guards[number], found), lengths.answer)
            if reply.passes[0].cached_tokens:
                raise WrongPath("a measured answer began with tokens from the cache")

        return Answering.begin(engine, [item.messages for item in asked], guards, sampling, check)

    return Variant(name, _baseline(name), path, begin)


@dataclass(frozen=True)
class _ScoreOnly:
    """No guard: one pass of a detector over a text."""

    model: str
    text: str

    def run(self, chat: Chat, traits: Mapping[str, ModelTraits], release: ReleaseMode = "verdict") -> Loop:
        segments, pool_from = detector_text("response", chat.query, self.text)
        yield Score(self.model, segments, pool_from)
        return Decision(Answer(""), Outcome.UNGUARDED)


def detector_alone(text: Callable[[], str]) -> Variant:
    """One prefill of a text, as long as an answer, by the detector that has weights of its own. text: gives one."""

    def check(number: int, reply: Reply) -> None:
        (only,) = reply.passes
        if only.error or only.cached_tokens:
            raise WrongPath(f"the detector alone failed ({only.error}) or began with tokens from the cache")

    def begin(engine: Engine, asked: list[Asked]) -> Answering:
        return Answering.begin(engine, ["?"], [_ScoreOnly("detector", text())], None, check)

    return Variant(DETECTOR_ALONE, DETECTOR_ALONE, PATHS[0], begin)


def published_variants(mllm: Speaker, detector: Scores, detoxifier: Speaker, lengths: Lengths) -> list[Variant]:
    """Both pipelines on `transformers`, and their unguarded answer."""

    def off(asked: Asked) -> Run:
        began = perf_counter()
        prompt = conversation("human", asked.text, len(asked.images))
        ran = mllm.generate("answer", prompt, asked.images, max_new_tokens=lengths.answer)
        seconds = perf_counter() - began
        return Run(seconds, (ran.label,), ran.prompt_tokens, ran.new_tokens, before=seconds)

    def variant(name: str, pipeline: PublishedProtector | PublishedEcso, path: str) -> Variant:
        def one(asked: Asked) -> Run:
            began = perf_counter()
            reply = pipeline.answer(asked.text, asked.images)
            seconds = perf_counter() - began
            if reply.harmful is not (path == "harmful") or reply.passes[0].new_tokens != lengths.answer:
                raise WrongPath(f"{name} did not take the {path} path with {lengths.answer} tokens")
            after = sum(ran.seconds for ran in reply.passes[1:])
            return Run(
                seconds,
                tuple(ran.label for ran in reply.passes),
                sum(ran.prompt_tokens for ran in reply.passes),
                sum(ran.new_tokens for ran in reply.passes),
                before=seconds - after,
                exposed=after,
            )

        return Variant(name, TRANSFORMERS, path, _whole(one))

    protectors = [
        variant("published-protector", PublishedProtector(mllm, detector, detoxifier, threshold, lengths), path)
        for path, threshold in THRESHOLDS.items()
    ]
    ecsos = [
        variant("published-ecso", PublishedEcso(mllm, threshold, lengths), path)
        for path, threshold in THRESHOLDS.items()
    ]
    return [Variant(TRANSFORMERS, TRANSFORMERS, PATHS[0], _whole(off)), *protectors, *ecsos]


def _whole(one: Callable[[Asked], Run]) -> Callable[[Engine, list[Asked]], Whole]:
    return lambda _, asked: Whole(lambda: one(asked[0]))
