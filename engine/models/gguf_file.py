"""GGUF files as checkpoints: metadata, configuration, and tensors dequantized one by one to the Hugging Face layout.

The header is read here, bounds-checked and without mapping the file (the `gguf` package's own reader takes seconds
for a vocabulary and trusts every length); the quantization formats are the `gguf` package's.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, PretrainedConfig, Qwen2Config, Qwen3Config

from ..errors import (
    CheckpointError,
    CheckpointMismatch,
    CheckpointMissing,
    CheckpointTruncated,
    UnknownArchitecture,
)

_CONFIGS: Mapping[str, tuple[type[PretrainedConfig], str]] = {
    "llama": (LlamaConfig, "LlamaForCausalLM"),  # Mistral too: its converter writes this name
    "qwen2": (Qwen2Config, "Qwen2ForCausalLM"),
    "qwen3": (Qwen3Config, "Qwen3ForCausalLM"),
}
_WHOLE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_SCALARS: Mapping[int, str] = {  # GGUF's value types as struct spells them
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
_STRING, _ARRAY = 8, 9
_PLAIN: Mapping[str, torch.dtype] = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F64": torch.float64,
}
_CHUNK = 1 << 22  # elements dequantized at once: the package's routines make several temporaries of that size


class Packed(NamedTuple):
    """Where a tensor lies in the file, and how it is packed."""

    stored: str
    shape: tuple[int, ...]
    kind: Any  # gguf.GGMLQuantizationType
    offset: int  # bytes from the file's start
    nbytes: int


class GgufFile:
    """One opened GGUF file: `metadata` (the file's own keys and values) and its tensors under canonical names."""

    def __init__(self, path: Path) -> None:
        """Read the header. Raises `CheckpointMissing`, `CheckpointTruncated`, `CheckpointMismatch`,
        `UnknownArchitecture` (neither llama, qwen2 nor qwen3, or a variant of them that is not supported)."""
        if not path.is_file():
            raise CheckpointMissing(f"{path} is not there (or not a file)")
        self.path = path
        size = path.stat().st_size
        with open(path, "rb") as file:
            header = _Header(file, size, path)
            self.metadata = header.metadata()
            tensors = header.tensors(_alignment(self.metadata, path))
        self.architecture = self._known_architecture()
        self._tensors: dict[str, Packed] = {}
        for tensor in tensors:
            if tensor.offset + tensor.nbytes > size:
                raise CheckpointTruncated(
                    f"{path} has {size} bytes, but {tensor.stored!r} ends at byte {tensor.offset + tensor.nbytes}"
                )
            name = _canonical(tensor.stored)
            if name is None:
                raise UnknownArchitecture(
                    f"{path}: tensor {tensor.stored!r} belongs to no plain {self.architecture} decoder"
                )
            if name in self._tensors:
                raise CheckpointMismatch(f"{path}: tensor {tensor.stored!r} is there twice")
            self._tensors[name] = tensor
        # Largest first, as in `WeightFiles.read`.
        self._order = sorted(self._tensors, key=lambda name: (-math.prod(self._tensors[name].shape), name))

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: self._tensors[name].shape for name in self._order}

    @property
    def quantized(self) -> bool:
        """Whether any of its tensors is held in fewer bits than 16."""
        return any(tensor.kind.name not in _PLAIN for tensor in self._tensors.values())

    def config(self) -> PretrainedConfig:
        """The `transformers` configuration of this file. Raises `CheckpointMismatch` where a key is missing or
        senseless, `UnknownArchitecture` for rope scalings other than none and linear."""
        config_class, model_class = _CONFIGS[self.architecture]
        if "model.embed_tokens.weight" not in self._tensors:
            raise CheckpointMismatch(f"{self.path} has no token embeddings")
        vocabulary = self._tensors["model.embed_tokens.weight"].shape[0]
        hidden, heads = self._whole("embedding_length"), self._whole("attention.head_count")
        head_dim = self._whole("attention.key_length", hidden // heads)
        if self._whole("rope.dimension_count", head_dim) != head_dim:
            raise UnknownArchitecture(f"{self.path}: rotary embeddings on a part of each head are not supported")
        tokens = {
            f"{name}_token_id": self._token_id(key, vocabulary)
            for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
        }
        extra = {"attention_bias": "model.layers.0.self_attn.q_proj.bias" in self._tensors}
        try:
            return config_class(
                architectures=[model_class],
                vocab_size=vocabulary,
                hidden_size=hidden,
                intermediate_size=self._whole("feed_forward_length"),
                num_hidden_layers=self._whole("block_count"),
                num_attention_heads=heads,
                num_key_value_heads=self._whole("attention.head_count_kv", heads),
                head_dim=head_dim,
                max_position_embeddings=self._whole("context_length"),
                rms_norm_eps=self._real("attention.layer_norm_rms_epsilon"),
                rope_parameters=self._rope(),
                tie_word_embeddings="lm_head.weight" not in self._tensors,
                **tokens,
                **({} if self.architecture == "qwen2" else extra),
            )
        except CheckpointError:
            raise
        except Exception as error:  # configuration classes check their values each in its own way
            raise CheckpointMismatch(f"{self.path}: no valid {self.architecture} configuration: {error}") from error

    def read(self) -> Iterator[tuple[str, Tensor]]:
        """Each tensor once, the largest first: floating-point ones in their stored dtype, quantized ones as fp32."""
        with open(self.path, "rb") as file:
            for name in self._order:
                yield name, self._unpermuted(name, _dequantized(file, self._tensors[name], self.path))

    def _unpermuted(self, name: str, tensor: Tensor) -> Tensor:
        """GGUF's llama interleaves the two halves of each head's rotary dimensions; Hugging Face's does not."""
        if self.architecture != "llama" or not re.search(r"\.self_attn\.[qk]_proj\.", name):
            return tensor
        heads = self._whole("attention.head_count")
        if ".k_proj." in name:
            heads = self._whole("attention.head_count_kv", heads)
        rows = tensor.shape[0]
        if rows % (2 * heads):
            raise CheckpointMismatch(f"{self.path}: {name} has {rows} rows, which {heads} heads cannot share")
        return tensor.view(heads, rows // heads // 2, 2, -1).transpose(1, 2).reshape(tensor.shape)

    def _known_architecture(self) -> str:
        name = self.metadata.get("general.architecture")
        if not isinstance(name, str) or name not in _CONFIGS:
            raise UnknownArchitecture(f"{self.path} is a GGUF of {name!r}; supported are {', '.join(_CONFIGS)}")
        if self.metadata.get("split.count", 1) not in (0, 1):
            raise UnknownArchitecture(f"{self.path} is one part of a split GGUF; merge its parts first")
        if self.metadata.get(f"{name}.expert_count", 0):
            raise UnknownArchitecture(f"{self.path} is a mixture of experts; only dense decoders are supported")
        return name

    def _rope(self) -> dict[str, Any]:
        theta = self._real("rope.freq_base", 10000.0)
        scaling = self.metadata.get(f"{self.architecture}.rope.scaling.type", "none")
        if scaling == "none":
            return {"rope_type": "default", "rope_theta": theta}
        if scaling == "linear":
            return {"rope_type": "linear", "rope_theta": theta, "factor": self._real("rope.scaling.factor")}
        raise UnknownArchitecture(f"{self.path}: rope scaling {scaling!r} in a GGUF; supported are none and linear")

    def _token_id(self, key: str, vocabulary: int) -> int | None:
        value = self.metadata.get(f"tokenizer.ggml.{key}_token_id")
        if value is not None and not (isinstance(value, int) and 0 <= value < vocabulary):
            raise CheckpointMismatch(f"{self.path}: the {key} token is {value!r}; the vocabulary has {vocabulary}")
        return value

    def _whole(self, key: str, default: int | None = None) -> int:
        value = self.metadata.get(f"{self.architecture}.{key}", default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise CheckpointMismatch(
                f"{self.path}: {self.architecture}.{key} is {value!r}; it has to be one positive integer"
            )
        return value

    def _real(self, key: str, default: float | None = None) -> float:
        value = self.metadata.get(f"{self.architecture}.{key}", default)
        if not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
            raise CheckpointMismatch(f"{self.path}: {self.architecture}.{key} is {value!r}; it has to be positive")
        return float(str(np.float32(value)))  # stored as fp32: 1e-05, not 9.999999747378752e-06


class _Header:
    """Reads the header front to back; every length is held against what is left of the file."""

    def __init__(self, file: BinaryIO, size: int, path: Path) -> None:
        self._file, self._left, self._path = file, size, path
        if size < 4 or self._take(4) != b"GGUF":
            raise CheckpointTruncated(f"{path} is no GGUF file (it does not begin with GGUF)")
        version = self._scalar("I")
        if version not in (2, 3):
            raise CheckpointMismatch(f"{path} is GGUF version {version}; versions 2 and 3, little-endian, are read")
        self._tensor_count, self._key_count = self._scalar("Q"), self._scalar("Q")

    def metadata(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for _ in range(self._key_count):
            key = self._string()
            if key in found:
                raise CheckpointMismatch(f"{self._path}: metadata key {key!r} is there twice")
            found[key] = self._value(self._scalar("I"))
        return found

    def tensors(self, alignment: int) -> list[Packed]:
        """The tensors' places; `offset` counts from the file's start, as the data begins after this header."""
        found = [self._tensor() for _ in range(self._tensor_count)]
        start = -(-self._file.tell() // alignment) * alignment
        return [tensor._replace(offset=start + tensor.offset) for tensor in found]

    def _tensor(self) -> Packed:
        name = self._string()
        rank = self._scalar("I")
        if not 1 <= rank <= 4:
            raise CheckpointMismatch(f"{self._path}: tensor {name!r} has {rank} dimensions; 1 to 4 are allowed")
        shape = tuple(reversed([self._scalar("Q") for _ in range(rank)]))  # GGUF names the fastest one first
        number = self._scalar("I")
        import gguf  # only who reads such a file needs it

        try:
            kind = gguf.GGMLQuantizationType(number)
        except ValueError:
            raise CheckpointMismatch(f"{self._path}: tensor {name!r} is packed in unknown format {number}") from None
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        if shape[-1] % block or 0 in shape:
            raise CheckpointMismatch(
                f"{self._path}: tensor {name!r} has rows of {shape[-1]}; {kind.name} needs multiples of {block}"
            )
        return Packed(name, shape, kind, self._scalar("Q"), math.prod(shape) // block * block_bytes)

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._scalar(self._format(kind))
        item, count = self._scalar("I"), self._scalar("Q")
        if item == _STRING:
            return [self._string() for _ in range(count)]
        code = self._format(item)
        return list(struct.unpack(f"<{count}{code}", self._take(count * struct.calcsize(f"<{code}"))))

    def _format(self, kind: int) -> str:
        if kind not in _SCALARS:
            raise CheckpointMismatch(f"{self._path}: a metadata value has unknown type {kind}")
        return _SCALARS[kind]

    def _scalar(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self._take(struct.calcsize(f"<{code}")))[0]

    def _string(self) -> str:
        try:
            return self._take(self._scalar("Q")).decode()
        except UnicodeDecodeError as error:
            raise CheckpointMismatch(f"{self._path}: a string of the header is not UTF-8: {error}") from error

    def _take(self, count: int) -> bytes:
        self._left -= count
        data = self._file.read(count) if self._left >= 0 else b""
        if len(data) != count:
            raise CheckpointTruncated(f"{self._path} ends within its header")
        return data


def _alignment(metadata: Mapping[str, Any], path: Path) -> int:
    value = metadata.get("general.alignment", 32)
    if not isinstance(value, int) or not 0 < value <= 1 << 20 or value & (value - 1):
        raise CheckpointMismatch(f"{path}: general.alignment is {value!r}; it has to be a power of two")
    return value


def _canonical(stored: str) -> str | None:
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", stored)
    if match is None:
        return None
    layer, part, kind = match.groups()
    if layer is None:
        return f"{_WHOLE[part]}.{kind}" if part in _WHOLE else None
    return f"model.layers.{int(layer)}.{_BLOCK[part]}.{kind}" if part in _BLOCK else None


def _dequantized(file: BinaryIO, packed: Packed, path: Path) -> Tensor:
    """The tensor in fp32, or as stored where it is not quantized. Packed bytes are read a few rows at a time."""
    file.seek(packed.offset)
    if plain := _PLAIN.get(packed.kind.name):
        return torch.frombuffer(_exactly(file, packed.nbytes, path), dtype=plain).view(packed.shape)
    import gguf

    columns = packed.shape[-1]
    rows = math.prod(packed.shape[:-1])
    row_bytes = packed.nbytes // rows
    out = torch.empty(rows, columns)
    step = max(1, _CHUNK // columns)
    for first in range(0, rows, step):
        count = min(step, rows - first)
        data = np.frombuffer(_exactly(file, count * row_bytes, path), dtype=np.uint8).reshape(count, row_bytes)
        try:
            values = gguf.dequantize(data, packed.kind)
        except NotImplementedError as error:
            raise CheckpointMismatch(
                f"{path}: {packed.stored!r} is packed as {packed.kind.name}, which gguf does not unpack"
            ) from error
        out[first : first + count] = torch.from_numpy(values)
    return out.view(packed.shape)


def _exactly(file: BinaryIO, count: int, path: Path) -> bytearray:
    data = bytearray(count)
    if file.readinto(data) != count:  # type: ignore[attr-defined]
        raise CheckpointTruncated(f"{path} was cut off while it was read")
    return data
