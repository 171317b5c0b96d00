"""What holds for every family with eyes: a test file a family inherits it and says how `transformers` is asked."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, PreTrainedTokenizerFast

from stockade.bench.overhead import OverheadPlan
from stockade.bench.overhead_report import OverheadConfig
from stockade.bench.published import Lengths, PublishedEcso, Speaker
from stockade.bench.side_by_side import Run
from stockade.bench.variants import forced_guards
from stockade.bench.workload import sources
from stockade.engine.engine import Engine
from stockade.engine.errors import TooManyImageTokens
from stockade.engine.guards import Guard
from stockade.engine.models.loader import ModelSet, load_models
from stockade.engine.models.shapes import byte_tokenizer, image_processor_for
from stockade.engine.request import Reply
from stockade.engine.sampling import SamplingParams
from tests.conftest import BASE, VOCAB, scatter_norms

PAGE = 16
GREEDY = SamplingParams(max_tokens=48, ignore_eos=True)
SHORT = SamplingParams(max_tokens=8, ignore_eos=True)
ADDED = ("<|im_start|>", "<|im_end|>")
# a layout of published templates: `IMAGE` is what the family writes for one
CHAT_ML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% for part in message.content %}{% if part.type == 'image' %}IMAGE{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def picture(seed: int, size: tuple[int, int]) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


PICTURES = [picture(1, (80, 60)), picture(2, (56, 56)), picture(3, (40, 150))]


def chat(text: str, *images: Image.Image) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def pictures(messages: list[dict[str, Any]]) -> list[Image.Image]:
    return [part["image"] for message in messages for part in message["content"] if "image" in part]


CHATS = [
    chat("What is this?", PICTURES[0]),
    chat("No image at all."),
    chat("Which of these?", *PICTURES),
    [
        *chat("And this?", PICTURES[1]),
        {"role": "assistant", "content": [{"type": "text", "text": "A thing."}]},
        *chat("And that?", PICTURES[2]),
    ],
]


def text_config(family: Callable[..., Any], added: tuple[str, ...], **changes: Any) -> Any:
    """A tiny language model with room for the tokens that a family adds."""
    return family(**{**BASE, "vocab_size": VOCAB + len(ADDED) + len(added), **changes})


def save_tokenizer(folder: Path, image: str, added: tuple[str, ...]) -> PreTrainedTokenizerFast:
    """Bytes, and the family's own tokens behind them; `image` is what its template writes for an image."""
    tokenizer = byte_tokenizer(VOCAB)
    tokenizer.add_special_tokens({"additional_special_tokens": [*ADDED, *added]})
    tokenizer.chat_template = CHAT_ML.replace("IMAGE", image)
    tokenizer.save_pretrained(folder)
    return tokenizer


def token(added: tuple[str, ...], name: str) -> int:
    """The id that `save_tokenizer` gives one of the family's tokens."""
    return VOCAB + (*ADDED, *added).index(name)


def last_logits(engine: Engine, messages: list[dict[str, Any]]) -> tuple[list[int], torch.Tensor]:
    """The prompt's ids, and the logits behind it."""
    engine.submit(messages, sampling=SHORT)
    works = engine.scheduler.schedule(engine.lanes[0])
    logits = engine.runner.run(engine.lanes[0], works).logits
    assert logits is not None
    return works[0].sequence.tokens, logits[0]


class FamilyTests:
    """A family gives `save`, which writes a checkpoint, and `expand`: the ids of each image in the prompt."""

    # a pool that holds not all chats at once
    small_pool = 26

    def save(self, folder: Path) -> Any:
        """Write the tokenizer and the image processor to the folder; returns the model's configuration."""
        raise NotImplementedError

    def expand(self, given: dict[str, Any], index: int) -> list[int]:
        """What the processor of `transformers` puts in a prompt for image `index` of its outputs."""
        raise NotImplementedError

    def rendered(self, models: ModelSet, messages: list[dict[str, Any]]) -> str:
        """The chat in the model's template, with what the processor writes around an image."""
        tokenizer = models.models["mllm"].codec.tokenizer
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    def process(self, folder: Path, images: list[Image.Image]) -> dict[str, Any]:
        """What the image processor of `transformers` makes of a chat's images."""
        return dict(image_processor_for(folder)(images=images, return_tensors="pt"))

    def extras(self, ids: torch.Tensor, given: dict[str, Any]) -> dict[str, Any]:
        """What the model of `transformers` wants besides the ids, the mask and the image processor's outputs."""
        return {}

    @pytest.fixture(scope="class")
    def folder(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        folder = tmp_path_factory.mktemp("eyes")
        torch.manual_seed(3)
        model = AutoModelForImageTextToText.from_config(self.save(folder))
        scatter_norms(model)
        with torch.no_grad():  # a fresh tower's features are so small that nothing would depend on them
            for name, weight in model.named_parameters():
                if weight.dim() > 1 and "language_model" not in name and "lm_head" not in name:
                    weight.normal_(0, weight[0].numel() ** -0.5)
        model.eval().save_pretrained(folder)
        return folder

    @pytest.fixture(scope="class")
    def models(self, folder: Path) -> ModelSet:
        return load_models(folder, dtype=torch.float32)

    @pytest.fixture(scope="class")
    def reference(self, folder: Path) -> Any:
        model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
        model.generation_config.eos_token_id = None
        return model

    def inputs(self, folder: Path, models: ModelSet, messages: list[dict[str, Any]]) -> dict[str, Any]:
        """What the processor of `transformers` makes of a chat."""
        codec = models.models["mllm"].codec
        text = self.rendered(models, messages)
        images = pictures(messages)
        given = self.process(folder, images) if images else {}
        ids: list[int] = []
        seen = 0
        for one in codec.tokenizer(text)["input_ids"]:
            if one == codec.image_id:
                ids += self.expand(given, seen)
                seen += 1
            else:
                ids.append(one)
        row = torch.tensor([ids])
        return {"input_ids": row, "attention_mask": torch.ones_like(row), **given, **self.extras(row, given)}

    @pytest.fixture(scope="class")
    def wanted(self, folder: Path, models: ModelSet, reference: Any) -> list[list[int]]:
        out = []
        for messages in CHATS:
            given = self.inputs(folder, models, messages)
            ids = reference.generate(**given, max_new_tokens=48, do_sample=False, pad_token_id=2)
            out.append(ids[0, given["input_ids"].shape[1] :].tolist())
        return out

    def new(self, models: ModelSet, **options: Any) -> Engine:
        return Engine(models=models, **{"kv_bytes": 16 << 20, "tokens_per_page": PAGE, **options})

    def test_prompts_and_logits_are_those_of_transformers(
        self, folder: Path, models: ModelSet, reference: Any
    ) -> None:
        for messages in CHATS:
            given = self.inputs(folder, models, messages)
            ids, got = last_logits(self.new(models), messages)
            assert ids == given["input_ids"][0].tolist()
            with torch.inference_mode():
                torch.testing.assert_close(got, reference(**given).logits[0, -1], atol=1e-4, rtol=0)

    def test_both_spellings_of_names_load(self, folder: Path, models: ModelSet, tmp_path: Path) -> None:
        """`transformers` writes the names of the hub, or those of its modules today."""
        shutil.copytree(folder, tmp_path / "other", ignore=shutil.ignore_patterns("*.safetensors"))
        model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
        model.save_pretrained(tmp_path / "other", save_original_format=False)
        other = load_models(tmp_path / "other", dtype=torch.float32)
        assert other.models["mllm"].backbone.content_hash == models.models["mllm"].backbone.content_hash

    def test_what_an_image_shows_matters(self, models: ModelSet) -> None:
        _, one = last_logits(self.new(models), chat("What?", PICTURES[1]))
        _, other = last_logits(self.new(models), chat("What?", picture(9, PICTURES[1].size)))
        assert (one - other).abs().max() > 1e-3

    def test_each_alone_gives_the_tokens_of_transformers(self, models: ModelSet, wanted: list[list[int]]) -> None:
        assert [self.new(models).chat([one], sampling=GREEDY)[0].token_ids for one in CHATS] == wanted

    @pytest.mark.parametrize("how", ["together", "chunks through images", "drafts", "preempted"])
    def test_batches_chunks_drafts_and_preemption_change_no_token(
        self, models: ModelSet, wanted: list[list[int]], how: str
    ) -> None:
        page = models.models["mllm"].layout(PAGE).page_bytes
        options = {"chunks through images": {"max_batch_tokens": 9, "max_sequences": 6}}.get(how, {})
        if how == "preempted":
            options = {"kv_bytes": self.small_pool * page}
        engine = self.new(models, **options)
        sampling = replace(GREEDY, draft_tokens=6) if how == "drafts" else GREEDY
        requests = [engine.submit(one, sampling=sampling) for one in CHATS]
        while engine.has_work:
            engine.step()
            engine.check_integrity()
        assert [request.reply and request.reply.token_ids for request in requests] == wanted
        assert (engine.scheduler.preemptions > 0) == (how == "preempted")

    def test_hits_include_images_and_change_no_token(self, models: ModelSet, wanted: list[list[int]]) -> None:
        engine = self.new(models)
        assert tokens(engine.chat(CHATS, sampling=GREEDY)) == wanted
        encoded = engine.runner.images_encoded
        again = engine.chat(CHATS, sampling=GREEDY)
        assert tokens(again) == wanted
        assert all(reply.passes[0].cached_tokens == reply.passes[0].prompt_tokens - 1 for reply in again)
        engine.pool.clear_cache()
        assert tokens(engine.chat(CHATS, sampling=GREEDY)) == wanted
        assert engine.runner.images_encoded == encoded  # the features were kept, too

    def test_both_guards_run_and_share_the_image(self, folder: Path, models: ModelSet, tmp_path: Path) -> None:
        """Every verdict is made harmful, so that remedies run as well."""
        ecso = Guard.ecso()
        remedy = replace(ecso.remedy, caption_sampling=SHORT, sampling=SHORT)
        guard = replace(ecso, detector=replace(ecso.detector, min_mass=1e-9, threshold=1.0), remedy=remedy)
        engine = self.new(models)
        reply = engine.chat([chat("What is it?", PICTURES[0])], guard=guard, sampling=SHORT)[0]
        labels = [(one.label, one.error) for one in reply.passes]
        # what it says with its eyes closed may be blank, which nobody judges
        assert labels[:4] == [(label, None) for label in ("answer", "judge", "caption", "eyes_closed")]
        assert reply.outcome == "refused"
        shared = models.models["mllm"].backbone.vision
        assert shared is not None
        if not shared.reads_prompt:
            assert engine.runner.images_encoded == 1
            least = shared.tokens(PICTURES[0].size, 1)
            assert all(one.cached_tokens >= least for one in reply.passes[1:3])
        engine.check_integrity()
        assert engine.pool.owned_pages == 0

    def test_a_detector_and_a_detoxifier_guard_it(self, models: ModelSet, checkpoint: Callable[[str], Path]) -> None:
        others = load_models(
            checkpoint("llama-gqa"), checkpoint("classifier"), checkpoint("llama-mha-tied"), dtype=torch.float32
        )
        whole = replace(models, models={**others.models, "mllm": models.models["mllm"]})
        guard = Guard.protector(threshold=2.0, max_rounds=1)
        guard = replace(guard, remedy=replace(guard.remedy, sampling=SHORT))
        reply = self.new(whole).chat([chat("What is it?", *PICTURES[:2])], guard=guard, sampling=SHORT)[0]
        labels = [(one.label, one.error) for one in reply.passes]
        assert labels == [(label, None) for label in ("answer", "screen", "rewrite", "screen")]
        assert reply.outcome == "refused"

    def test_bf16_stays_near_fp32(self, folder: Path, models: ModelSet) -> None:
        """With the native kernels where this machine and the model's shape allow them."""
        halves = load_models(folder, dtype=torch.bfloat16)
        for messages in CHATS:
            _, exact = last_logits(self.new(models), messages)
            _, near = last_logits(self.new(halves), messages)
            assert torch.cosine_similarity(exact, near.float(), 0) > 0.99

    def test_the_bench_holds_it_against_the_published_pipeline(self, folder: Path, models: ModelSet) -> None:
        lengths = Lengths(answer=5, judge=2, caption=4, mended=3)
        speaker = Speaker(folder, torch.float32, ignore_eos=True, vision=models.models["mllm"].backbone.vision)
        want = PublishedEcso(speaker, 2.0, lengths).answer("What?", PICTURES[:1])
        guard = forced_guards(lengths, "harmful")["ecso-as-published"]
        reply = self.new(models).chat([chat("What?", PICTURES[0])], guard=guard)[0]
        assert [(one.label, one.prompt_tokens) for one in reply.passes] == [
            (one.label, one.prompt_tokens) for one in want.passes
        ]
        assert reply.text == want.text

    def test_what_cannot_fit_is_refused_before_it_is_processed(
        self, models: ModelSet, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        vision = models.models["mllm"].backbone.vision
        assert vision is not None
        monkeypatch.setattr(vision, "inputs", None)  # not to be called
        size = PICTURES[0].size
        model = models.models["mllm"]
        whole = replace(models, models={"mllm": replace(model, context=2 * vision.tokens(size, 2))})
        with pytest.raises(TooManyImageTokens, match=r"become \d+ tokens; mllm takes at most \d+ in all"):
            self.new(whole).chat([chat("What?", picture(5, size), picture(6, size))])

    def test_what_guards_cost_is_measured_on_it(self, folder: Path) -> None:
        """Engine and published pipelines on the forced paths, every text of its length."""
        config = OverheadConfig(
            variants=("protector-adapter", "ecso"),
            repeats=1,
            harmful_repeats=1,
            published_repeats=1,
            prompt_tokens=12,
            lengths=Lengths(6, 2, 4, 6),
            saturation_pairs=0,
            mixed_pairs=0,
        )
        done: dict[str, Any] = {}
        with sources(str(folder), "tiny-llama", "tiny-llama") as weights:
            plan = OverheadPlan(weights, config, torch.float32)
            for name, measure in plan.units(done):
                if name.startswith("latency"):
                    done[name] = measure()
        cells = {(name, path): Run.of(run) for name, path, run in done["latency 0"]}
        new = {"protector-adapter": 12, "published-protector": 12, "ecso": 16, "published-ecso": 18}
        for guard, tokens in new.items():  # the engine's judge reads a distribution and writes nothing
            run = cells[guard, "harmful"]
            assert run.seconds > run.exposed > 0 and run.new_tokens == tokens


def tokens(replies: list[Reply]) -> list[list[int]]:
    return [reply.token_ids for reply in replies]
