"""A llama checkpoint of `transformers` as one GGUF file, for engines that read nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import AutoModelForCausalLM

from ..engine.errors import UnknownArchitecture

TYPES = {
    "bf16": gguf.GGMLQuantizationType.BF16,
    "fp16": gguf.GGMLQuantizationType.F16,
    "fp32": gguf.GGMLQuantizationType.F32,
}


def save_gguf(folder: Path, file: Path, dtype: str = "bf16") -> Path:
    """dtype: bf16, fp16 or fp32, of the matrices; norms are fp32.

    Raises `UnknownArchitecture` for anything but a llama with a byte-level BPE tokenizer in `tokenizer.json`.
    """
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = model.config
    words = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    if config.model_type != "llama" or words["model"]["type"] != "BPE":
        raise UnknownArchitecture(f"only llamas with a BPE tokenizer become GGUF here, not {config.model_type}")
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_name(folder.name)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type({"fp32": 0, "fp16": 1, "bf16": 32}[dtype])
    _add_tokenizer(writer, words, config)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, parameter in model.named_parameters():
        values = parameter.detach().numpy()
        for part, heads in ((".q_proj", config.num_attention_heads), (".k_proj", config.num_key_value_heads)):
            if part in name:
                values = _interleaved(values, heads)
        kind = TYPES["fp32"] if values.ndim == 1 else TYPES[dtype]
        data = gguf.quantize(np.ascontiguousarray(values), kind)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _add_tokenizer(writer: gguf.GGUFWriter, words: dict[str, Any], config: Any) -> None:
    vocabulary = {index: token for token, index in words["model"]["vocab"].items()}
    special = {item["id"]: item["content"] for item in words["added_tokens"]}
    vocabulary |= special
    tokens = [vocabulary.get(index, f"[PAD{index}]") for index in range(config.vocab_size)]
    control, normal, unused = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL, gguf.TokenType.UNUSED
    kinds = [control if n in special else normal if n in vocabulary else unused for n in range(config.vocab_size)]
    merges = words["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_id if isinstance(config.eos_token_id, int) else config.eos_token_id[0])


def _interleaved(values: np.ndarray, heads: int) -> np.ndarray:
    """Rows of queries or keys in the order that llama.cpp's rotation expects: halves of a head become pairs."""
    rows, columns = values.shape
    return values.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)
