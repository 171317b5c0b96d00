"""Files and names: what `open_checkpoint` reads is what `transformers` saved, or a typed refusal."""

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from stockade.engine.errors import (
    CheckpointMismatch,
    CheckpointMissing,
    CheckpointTruncated,
    UnknownArchitecture,
    UnsafeCheckpoint,
)
from stockade.engine.models.checkpoint import ContentHash, open_checkpoint
from stockade.engine.models.names import canonical_name
from stockade.engine.models.shapes import (
    NAMED_SHAPES,
    byte_tokenizer,
    image_processor_for,
    named_config,
    random_tensor,
)

SHAPE = {
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
TEXT_MODELS = [
    (LlamaForCausalLM, LlamaConfig(**SHAPE)),
    (LlamaForCausalLM, LlamaConfig(**SHAPE, tie_word_embeddings=True, attention_bias=True)),
    (LlamaForSequenceClassification, LlamaConfig(**SHAPE, num_labels=1)),
    (MistralForCausalLM, MistralConfig(**SHAPE)),
    (Qwen2ForCausalLM, Qwen2Config(**SHAPE)),
    (Qwen3ForCausalLM, Qwen3Config(**SHAPE, head_dim=8)),
]


@pytest.fixture
def llama(tmp_path):
    """A saved tiny Llama: its folder and its parameters."""
    model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    model.save_pretrained(tmp_path / "llama")
    return tmp_path / "llama", dict(model.named_parameters())


def same(checkpoint, parameters):
    tensors = dict(checkpoint.tensors())
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == checkpoint.shapes
    assert tensors.keys() == parameters.keys()
    return all(torch.equal(tensors[name], parameters[name]) for name in parameters)


@pytest.mark.parametrize(("model_class", "config"), TEXT_MODELS)
def test_every_text_family_comes_back_as_saved(model_class, config, tmp_path):
    model = model_class(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    opened = open_checkpoint(tmp_path)
    assert same(opened, dict(model.named_parameters()))
    assert type(opened.config) is type(config)
    assert (opened.config.hidden_size, opened.config.architectures) == (16, [model_class.__name__])


@pytest.mark.parametrize("original", [True, False], ids=["hub names", "today's names"])
def test_llava_comes_back_under_canonical_names(original, tmp_path):
    model = LlavaForConditionalGeneration(named_config("tiny-llava"))
    model.save_pretrained(tmp_path, save_original_format=original)
    stored = load_file(tmp_path / "model.safetensors")
    assert ("language_model.lm_head.weight" in stored) == original
    expected = {
        name.removeprefix("model.").replace("language_model.", "model.")
        if not name.startswith("lm_head")
        else name: parameter
        for name, parameter in model.named_parameters()
    }
    assert same(open_checkpoint(tmp_path), expected)


@pytest.mark.parametrize(
    ("stored", "canonical"),
    [
        ("language_model.model.layers.3.mlp.up_proj.weight", "model.layers.3.mlp.up_proj.weight"),
        ("language_model.lm_head.weight", "lm_head.weight"),
        ("model.language_model.norm.weight", "model.norm.weight"),
        ("model.language_model.model.norm.weight", "model.norm.weight"),
        ("vision_tower.vision_model.pre_layrnorm.bias", "vision_tower.pre_layrnorm.bias"),
        ("model.vision_tower.vision_model.pre_layrnorm.bias", "vision_tower.pre_layrnorm.bias"),
        ("model.multi_modal_projector.linear_1.bias", "multi_modal_projector.linear_1.bias"),
        ("score.weight", "score.weight"),
        ("model.layers.0.self_attn.rotary_emb.inv_freq", None),
        ("vision_tower.vision_model.embeddings.position_ids", None),
    ],
)
def test_older_and_newer_names_become_one(stored, canonical):
    assert canonical_name(stored) == canonical


def test_the_content_hash_does_not_depend_on_how_the_files_were_cut(llama, tmp_path):
    folder, parameters = llama
    model = LlamaForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path / "shards", max_shard_size="8KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_bytes((folder / "config.json").read_bytes())
    buffers = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}
    torch.save(dict(model.state_dict()) | buffers, pickled / "pytorch_model.bin")
    whole = open_checkpoint(folder).content_hash()
    for other in (tmp_path / "shards", pickled):
        assert same(open_checkpoint(other), parameters)
        assert open_checkpoint(other).content_hash() == whole


def test_the_content_hash_sees_names_shapes_dtypes_and_every_byte():
    def hashed(name, tensor):
        hasher = ContentHash()
        hasher.add(name, tensor)
        return hasher.hexdigest()

    tensor = torch.arange(6, dtype=torch.float16)
    changed = tensor.clone()
    changed[5] += 1
    variants = [("a", tensor), ("b", tensor), ("a", tensor.view(2, 3)), ("a", tensor.view(torch.bfloat16))]
    hashes = [hashed(*variant) for variant in [*variants, ("a", changed), ("a", torch.tensor(1.0))]]
    assert len(set(hashes)) == len(hashes)
    assert hashed("a", tensor.view(2, 3).t().contiguous().t()) == hashed("a", tensor.view(2, 3))


def cut(path: Path, at: int):
    path.write_bytes(path.read_bytes()[:at])


def set_config(folder: Path, **values):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def shard_index(folder: Path, shard: str):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": shard}}))


def pickled_as(folder: Path, write):
    (folder / "model.safetensors").unlink()
    write(folder / "pytorch_model.bin")


class Evil:
    def __reduce__(self):
        return (print, ("this code must not run",))


def duplicate(folder: Path):
    tensors = load_file(folder / "model.safetensors")
    save_file(
        tensors | {"language_model.lm_head.weight": tensors["lm_head.weight"].clone()},
        folder / "model.safetensors",
    )


BAD = {
    "no config": (lambda f: (f / "config.json").unlink(), CheckpointMissing, "config.json"),
    "cut config": (lambda f: cut(f / "config.json", 40), CheckpointTruncated, "config.json"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), CheckpointMissing, "looked for"),
    "header only": (lambda f: cut(f / "model.safetensors", 200), CheckpointTruncated, "model.safetensors"),
    "empty file": (lambda f: cut(f / "model.safetensors", 0), CheckpointTruncated, "model.safetensors"),
    "last byte missing": (lambda f: cut(f / "model.safetensors", -1), CheckpointTruncated, "model.safetensors"),
    "shard missing": (lambda f: shard_index(f, "model-1.safetensors"), CheckpointMissing, "model-1"),
    "shard outside": (lambda f: shard_index(f, "../model.safetensors"), UnsafeCheckpoint, "beside"),
    "shard elsewhere": (lambda f: shard_index(f, "/tmp/model.safetensors"), UnsafeCheckpoint, "beside"),
    "no shards": (lambda f: shard_index(f, None), CheckpointTruncated, "weight_map"),
    "unknown model": (lambda f: set_config(f, model_type="no-such"), UnknownArchitecture, "no-such"),
    "own code": (
        lambda f: set_config(f, model_type="x", auto_map={"AutoConfig": "x.X"}),
        UnsafeCheckpoint,
        "auto_map",
    ),
    "wrong config": (lambda f: set_config(f, hidden_size="many"), CheckpointMismatch, "llama"),
    "two names for one": (duplicate, CheckpointMismatch, "lm_head.weight"),
    "integers": (
        lambda f: save_file({"lm_head.weight": torch.ones(2, dtype=torch.uint8)}, f / "model.safetensors"),
        CheckpointMismatch,
        "U8",
    ),
    "code in a zip": (
        lambda f: pickled_as(f, lambda bin: torch.save({"a": Evil()}, bin)),
        UnsafeCheckpoint,
        "more than tensors",
    ),
    "bare pickle": (
        lambda f: pickled_as(f, lambda bin: bin.write_bytes(pickle.dumps({"a": 1}))),
        UnsafeCheckpoint,
        "bare pickle",
    ),
    "not tensors": (lambda f: pickled_as(f, lambda bin: torch.save({"a": 1}, bin)), CheckpointMismatch, "dictionary"),
    "cut zip": (
        lambda f: pickled_as(f, lambda bin: (torch.save({"a": torch.ones(9)}, bin), cut(bin, -9))),
        CheckpointTruncated,
        "pytorch_model.bin",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_checkpoint_is_refused_by_name(case, llama, capfd):
    damage, error, words = BAD[case]
    damage(llama[0])
    with pytest.raises(error, match=words):
        open_checkpoint(llama[0])
    assert "must not run" not in capfd.readouterr().out


def test_no_folder_and_an_unwanted_base_are_refused(llama, tmp_path):
    with pytest.raises(CheckpointMissing, match="neither"):
        open_checkpoint(tmp_path / "nothing")
    with pytest.raises(CheckpointMismatch, match="no PEFT folder"):
        open_checkpoint(llama[0], base=llama[0])


PEAK = """
import sys, torch
from stockade.engine.models.checkpoint import open_checkpoint

def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))

before = status("VmRSS")
for folder in sys.argv[1:]:
    checkpoint = open_checkpoint(folder)
    slots = {name: torch.empty(shape) for name, shape in checkpoint.shapes.items()}
    for name, tensor in checkpoint.tensors():
        slots[name].copy_(tensor)
    size = sum(slot.nbytes for slot in slots.values())
    del slots, tensor
print((status("VmHWM") - before) / size)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_loading_needs_at_most_1_15_times_the_weights(tmp_path):
    tensors = {f"model.layers.{i}.mlp.up_proj.weight": torch.full((2560, 1024), float(i)) for i in range(24)}
    tensors["model.embed_tokens.weight"] = torch.ones(16384, 1024)
    folders = [tmp_path / "safetensors", tmp_path / "pickled"]
    for folder in folders:
        folder.mkdir()
        LlamaConfig(**SHAPE).save_pretrained(folder)
    save_file(tensors, folders[0] / "model.safetensors")
    torch.save(tensors, folders[1] / "pytorch_model.bin")
    assert sum(tensor.nbytes for tensor in tensors.values()) > 300e6
    done = subprocess.run([sys.executable, "-c", PEAK, *folders], capture_output=True, text=True, check=True)
    assert 0.99 < float(done.stdout) <= 1.15


def test_random_tensors_are_ones_for_norms_and_small_noise_else():
    def draw(name):
        return random_tensor(name, (64, 64), torch.bfloat16, torch.Generator().manual_seed(0))

    for name in ("model.norm.weight", "vision_tower.pre_layrnorm.weight", "x.layer_norm1.weight", "x.q_norm.weight"):
        assert torch.equal(draw(name), torch.ones(64, 64, dtype=torch.bfloat16))
    noise = draw("model.layers.0.mlp.up_proj.weight")
    assert noise.float().std() == pytest.approx(0.02, rel=0.05)
    assert torch.equal(noise, draw("model.layers.0.mlp.up_proj.weight"))


def test_named_shapes_have_the_published_sizes():
    def parameters(model_class, name):
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in model_class(named_config(name)).parameters())

    assert parameters(LlamaForCausalLM, "vicuna-7b") == 6_738_415_616
    assert parameters(LlamaForCausalLM, "open-llama-3b") == 3_426_473_600
    assert parameters(LlavaForConditionalGeneration, "llava-1.5-7b") == pytest.approx(7.063e9, rel=1e-3)
    assert parameters(LlavaForConditionalGeneration, "llava-1.5-13b") == pytest.approx(13.35e9, rel=1e-3)
    assert all(named_config(name) is not None for name in NAMED_SHAPES)
    assert named_config("no-such-shape") is None


@pytest.mark.parametrize(("size", "image"), [(320, 319), (320, None), (32064, 32000)])
def test_every_id_of_the_byte_tokenizer_is_text_and_texts_come_back(size, image):
    tokenizer = byte_tokenizer(size, image)
    assert sorted(tokenizer.get_vocab().values()) == list(range(size))
    assert tokenizer.convert_tokens_to_ids("<image>") == (image or 3)
    text = "Grüße, 世界!\n\t<b>1 + 1 = 2</b>  "
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    chat = [
        {"role": "user", "content": [{"type": "text", "text": "What?"}, {"type": "image"}]},
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": "Sure?"},
    ]
    rendered = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert rendered == "USER: <image>\nWhat? ASSISTANT: A cat.</s>USER: Sure? ASSISTANT:"


@pytest.mark.parametrize(("size", "image"), [(259, None), (320, 320), (320, 2)])
def test_a_vocabulary_without_room_is_refused(size, image):
    with pytest.raises(ValueError, match="at least 260"):
        byte_tokenizer(size, image)


def test_image_processors_are_the_folders_own_and_never_need_torchvision(tmp_path):
    own = image_processor_for(56)
    own.save_pretrained(tmp_path / "alone")
    LlavaProcessor(own, byte_tokenizer(320)).save_pretrained(tmp_path / "nested")
    for folder in (tmp_path / "alone", tmp_path / "nested"):
        read = image_processor_for(folder)
        assert type(read) is type(own)
        assert read.to_dict() == own.to_dict()
    file = tmp_path / "alone" / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"image_processor_type": "OtherImageProcessor"}))
    with pytest.raises(UnknownArchitecture, match="OtherImageProcessor"):
        image_processor_for(tmp_path / "alone")
    with pytest.raises(CheckpointMissing, match="processor_config"):
        image_processor_for(tmp_path)
