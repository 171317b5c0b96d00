"""What a client may ask of the guard: tighter always, looser only as far as the operator says."""

from __future__ import annotations

from typing import Any

import pytest

from stockade import Cascade, GenerativeGuard, Guard, HarmHead, Probe, SelfJudge
from stockade.engine.errors import InvalidGuard
from stockade.engine.guards import TEMPLATES
from stockade.engine.models.loader import ModelSet
from stockade.engine.named import guard_named
from stockade.engine.passes import ModelTraits
from stockade.engine.serving.policy import Chosen, Policy
from stockade.engine.serving.protocol import GuardChoice
from tests.engine.screened import engine_of, probe_on, with_models
from tests.engine.test_outside import Counting

PROTECTOR = Guard(HarmHead(template="response", threshold=0.4))


def choose(offered: Policy, models: ModelSet, **wanted: Any) -> Chosen:
    engine = engine_of(models)
    return offered.bound(engine.traits).choose(GuardChoice(**wanted), engine.traits)


def test_without_a_wish_a_client_gets_the_operator_s_default(models: ModelSet) -> None:
    policy = Policy({"protector": PROTECTOR, "ecso": Guard.ecso()}, "protector", "window")
    assert choose(policy, models)[::2] == ("protector", "window")
    # what judges at the end cannot show a window: the tighter release takes its place
    assert choose(policy, models, policy="ecso")[::2] == ("ecso", "verdict")
    with pytest.raises(InvalidGuard, match="judges at the end"):
        choose(policy, models, policy="ecso", release="window")


@pytest.mark.parametrize("loosest", [None, "verdict", "window", "audit"])
@pytest.mark.parametrize("wanted", ["verdict", "window", "audit"])
def test_no_release_is_looser_than_the_loosest(models: ModelSet, loosest: Any, wanted: Any) -> None:
    policy = Policy({"protector": PROTECTOR}, "protector", loosest=loosest)
    order = ["verdict", "window", "audit"]
    if order.index(wanted) <= order.index(loosest or "verdict"):
        assert choose(policy, models, release=wanted).release == wanted
    else:
        with pytest.raises(InvalidGuard, match="not offered"):
            choose(policy, models, release=wanted)


def test_a_threshold_may_be_raised_and_lowered_only_where_that_is_allowed(models: ModelSet) -> None:
    policy = Policy({"protector": PROTECTOR, "ecso": Guard.ecso(threshold=0.6)}, "protector")
    assert choose(policy, models, threshold=0.4).guard.detector.threshold == 0.4  # type: ignore[union-attr]
    assert choose(policy, models, threshold=0.9).guard.detector.threshold == 0.9  # type: ignore[union-attr]
    judge = choose(policy, models, policy="ecso", threshold=0.7).guard.detector
    assert isinstance(judge, SelfJudge) and judge.threshold == 0.7
    for wanted in ({"threshold": 0.39}, {"policy": "ecso", "threshold": 0.59}):
        with pytest.raises(InvalidGuard, match="raised, not lowered"):
            choose(policy, models, **wanted)
    loose = Policy({"protector": PROTECTOR}, "protector", loosen=True)
    assert choose(loose, models, threshold=0.1).guard.detector.threshold == 0.1  # type: ignore[union-attr]


def test_a_guard_model_is_offered_as_any_other_and_its_threshold_may_be_raised(models: ModelSet) -> None:
    policy = Policy({"qwen3guard": guard_named("qwen3guard", 0.6)}, "qwen3guard")
    traits = {"detector": ModelTraits(special_tokens=TEMPLATES["qwen3guard"].specials)}
    offered = policy.bound(traits)
    assert [(one.policy, one.threshold, one.releases) for one in offered.offered(traits)] == [
        ("qwen3guard", 0.6, ["verdict"])
    ]
    assert offered.choose(GuardChoice(threshold=0.7), traits).guard.detector == GenerativeGuard(
        "qwen3guard", threshold=0.7
    )
    with pytest.raises(InvalidGuard, match="raised, not lowered"):
        offered.choose(GuardChoice(threshold=0.5), traits)
    with pytest.raises(InvalidGuard, match="judges at the end"):
        Policy({"qwen3guard": guard_named("qwen3guard")}, "qwen3guard", "window").bound(traits)
    with pytest.raises(InvalidGuard, match="has a head that scores"):
        choose(policy, models)


def test_the_head_s_own_threshold_is_the_least_where_the_operator_names_none(models: ModelSet) -> None:
    policy = Policy({"protector": Guard(HarmHead(template="response"))}, "protector")
    head = models.models["detector"].head
    assert head is not None
    with pytest.raises(InvalidGuard, match=f"has {head.spec.threshold:g}"):
        choose(policy, models, threshold=head.spec.threshold - 0.01)
    assert choose(policy, models, threshold=head.spec.threshold + 0.01)


def test_a_raised_threshold_holds_for_a_probe_s_fallback_too(models: ModelSet) -> None:
    able = with_models(models, probe=probe_on(models.models["mllm"]))
    probe = Probe(threshold=0.2, fallback=HarmHead(template="response", threshold=0.3))
    found = choose(Policy({"probe": Guard(probe)}, "probe"), able, threshold=0.8).guard.detector
    assert isinstance(found, Probe) and isinstance(found.fallback, HarmHead)
    assert (found.threshold, found.fallback.threshold) == (0.8, 0.8)
    both = Guard(Cascade(Probe(threshold=0.2), HarmHead(template="response"), (0.3, 0.6)))
    with pytest.raises(InvalidGuard, match="no threshold"):
        choose(Policy({"cascade": both}, "cascade"), able, threshold=0.8)


def test_what_is_not_offered_is_refused(models: ModelSet) -> None:
    policy = Policy({"protector": PROTECTOR}, "protector")
    for name in ("off", "ecso", "", "../protector"):
        with pytest.raises(InvalidGuard, match="not offered"):
            choose(policy, models, policy=name)
    with pytest.raises(InvalidGuard, match="no threshold"):
        choose(Policy({"off": Guard.off()}, "off"), models, threshold=1.0)


def test_a_server_offers_no_guard_that_lets_unread_text_out(models: ModelSet) -> None:
    for guard in (Guard.protector(published=True), Guard.ecso(published=True), Guard(HarmHead(), recheck=False)):
        with pytest.raises(InvalidGuard, match="no detector has read"):
            Policy({"guard": guard}, "guard")


def test_settings_that_contradict_each_other_are_refused(models: ModelSet) -> None:
    with pytest.raises(InvalidGuard, match="not among"):
        Policy({"protector": PROTECTOR}, "ecso")
    with pytest.raises(InvalidGuard, match="tighter"):
        Policy({"protector": PROTECTOR}, "protector", "window", "verdict")
    with pytest.raises(InvalidGuard, match="judges at the end"):
        choose(Policy({"ecso": Guard.ecso()}, "ecso", "window"), models)
    with pytest.raises(InvalidGuard, match="needs a model"):
        choose(Policy({"other": Guard(HarmHead("other"))}, "other"), models)


def test_a_detector_outside_the_engine_has_a_threshold_too(models: ModelSet) -> None:
    detector = Counting(models.models["mllm"].codec)
    outside = ModelSet({"mllm": models.models["mllm"]}, models.device, models.dtype, {"detector": detector})
    policy = Policy({"protector": Guard.protector(detoxifier=None)}, "protector", "window")
    assert choose(policy, outside, threshold=0.6).guard.detector.threshold == 0.6  # type: ignore[union-attr]
    with pytest.raises(InvalidGuard, match=r"has 0\.5"):
        choose(policy, outside, threshold=0.4)
    detector.incremental = False
    with pytest.raises(InvalidGuard, match="judges at the end"):
        policy.bound(engine_of(outside).traits)
    detector.close()
