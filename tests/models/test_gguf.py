"""GGUF files: the tensors and the configuration that went in come out, and nothing damaged is believed."""

import struct

import gguf
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from stockade.engine.errors import CheckpointError, CheckpointMismatch, CheckpointTruncated, UnknownArchitecture
from stockade.engine.models.checkpoint import open_checkpoint
from stockade.engine.models.gguf_file import GgufFile

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MODELS = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SHAPE, rope_theta=50000.0)),
    "llama tied": (LlamaForCausalLM, LlamaConfig(**SHAPE, tie_word_embeddings=True)),
    "llama biased": (LlamaForCausalLM, LlamaConfig(**SHAPE, attention_bias=True)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**SHAPE, tie_word_embeddings=True)),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SHAPE, head_dim=32)),
}


def interleaved(weight, heads):
    """What llama.cpp's converter does to the rows of Llama's Q and K."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def write(path, model, kind=gguf.GGMLQuantizationType.F32, **extra):
    """A GGUF of a `transformers` model, names by the gguf package's own table."""
    config = model.config
    writer = gguf.GGUFWriter(path, config.model_type)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if config.model_type == "qwen3":
        writer.add_key_length(config.head_dim)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_token_list(["a", "ü", "c"])
    for key, value in extra.items():
        writer.add_key_value(key.replace("__", "."), value, gguf.GGUFValueType.UINT32)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[config.model_type.upper()], config.num_hidden_layers)
    for name, parameter in model.named_parameters():
        values = parameter.detach().numpy()
        if config.model_type == "llama" and ".q_proj" in name:
            values = interleaved(values, config.num_attention_heads)
        if config.model_type == "llama" and ".k_proj" in name:
            values = interleaved(values, config.num_key_value_heads)
        packed = gguf.GGMLQuantizationType.F32 if values.ndim == 1 else kind
        data = gguf.quantize(np.ascontiguousarray(values), packed)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), data, raw_dtype=packed)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def tiny(name="llama"):
    torch.manual_seed(0)
    model_class, config = MODELS[name]
    model = model_class(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.5)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_a_model_comes_back_from_gguf(name, tmp_path):
    model = tiny(name)
    write(tmp_path / "model.gguf", model)
    opened = open_checkpoint(tmp_path)  # a folder with one .gguf and no config.json
    tensors, parameters = dict(opened.tensors()), dict(model.named_parameters())
    assert opened.shapes == {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    assert tensors.keys() == parameters.keys()
    assert all(torch.equal(tensors[name], parameters[name]) for name in parameters)
    assert opened.tokenizer_path == tmp_path / "model.gguf"
    clone = type(model)(opened.config)
    clone.load_state_dict(tensors, strict=False)
    clone.tie_weights()
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(clone(ids).logits, model(ids).logits)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_every_packing_gives_what_the_gguf_package_unpacks(kind, tmp_path):
    kind = gguf.GGMLQuantizationType[kind]
    model = tiny("qwen2")
    write(tmp_path / "model.gguf", model, kind)
    tensors = dict(open_checkpoint(tmp_path / "model.gguf").tensors())
    for name, parameter in model.named_parameters():
        values = parameter.detach().numpy()
        if values.ndim == 2:
            values = gguf.dequantize(gguf.quantize(values, kind), kind)
        assert np.array_equal(tensors[name].float().numpy(), values)


def test_a_large_tensor_is_unpacked_in_pieces_without_a_seam(tmp_path):
    rows = (1 << 22) // 64 + 3  # one piece and three rows
    config = Qwen2Config(**SHAPE | {"vocab_size": rows, "num_hidden_layers": 1})
    model = Qwen2ForCausalLM(config)
    write(tmp_path / "model.gguf", model, gguf.GGMLQuantizationType.Q8_0)
    weight = model.model.embed_tokens.weight.detach()
    tensors = dict(open_checkpoint(tmp_path).tensors())
    assert (tensors["model.embed_tokens.weight"] - weight).abs().max() < weight.abs().max() / 127


@pytest.mark.parametrize(
    ("extra", "error", "words"),
    [
        ({"llama__expert_count": 8}, UnknownArchitecture, "mixture"),
        ({"split__count": 2}, UnknownArchitecture, "split"),
        ({"llama__rope__dimension_count": 8}, UnknownArchitecture, "rotary"),
        ({"llama__attention__key_length": 0}, CheckpointMismatch, "key_length"),
        ({"general__alignment": 24}, CheckpointMismatch, "alignment"),
    ],
)
def test_variants_that_are_not_read_are_refused_by_name(extra, error, words, tmp_path):
    write(tmp_path / "model.gguf", tiny(), **extra)
    with pytest.raises(error, match=words):
        open_checkpoint(tmp_path)


def test_another_architecture_and_another_file_are_refused(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(UnknownArchitecture, match="mamba"):
        open_checkpoint(tmp_path)
    (tmp_path / "model.gguf").write_bytes(b"PK\3\4 not a model")
    with pytest.raises(CheckpointTruncated, match="no GGUF"):
        open_checkpoint(tmp_path)
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + struct.pack("<I", 1))
    with pytest.raises(CheckpointMismatch, match="version 1"):
        open_checkpoint(tmp_path)


def test_a_file_cut_anywhere_or_with_any_byte_changed_is_read_or_refused(tmp_path):
    """Never an untyped error, never a hang, never memory for a length the file only claims."""
    write(tmp_path / "model.gguf", tiny())
    whole = (tmp_path / "model.gguf").read_bytes()
    header = whole.index(b"token_embd.weight") + 2000
    damaged = tmp_path / "damaged.gguf"
    for size in [*range(0, header, 97), len(whole) - 40]:
        damaged.write_bytes(whole[:size])
        with pytest.raises(CheckpointTruncated):
            GgufFile(damaged)
    generator = np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        changed = bytearray(whole)
        changed[generator.integers(header)] = generator.integers(256)
        damaged.write_bytes(changed)
        try:
            file = GgufFile(damaged)
            file.config()
            for _ in file.read():
                pass
        except CheckpointError:
            refused += 1
    assert refused > 100
