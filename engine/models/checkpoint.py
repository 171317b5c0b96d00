"""A checkpoint on disk: its configuration and its tensors under canonical names, read in bounded memory.

Opens Hugging Face folders (safetensors, torch zip files), PEFT LoRA folders and GGUF files. Whether the tensors suit
a model is the loader's question.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

from ..errors import (
    CheckpointMismatch,
    CheckpointMissing,
    CheckpointTruncated,
    UnknownArchitecture,
    UnsafeCheckpoint,
)
from .adapters import Adapter, MergedSource, is_adapter, read_adapter
from .gguf_file import GgufFile
from .json_file import read_json
from .names import canonical_names
from .weight_files import TensorSource, WeightFiles

# In the order `transformers` looks for them.
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


class ContentHash:
    """Hash of named tensors: names, shapes, dtypes and bytes, whatever the order they are added in."""

    def __init__(self) -> None:
        self._digests: dict[str, bytes] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        """Take in one CPU tensor."""
        digest = hashlib.blake2b(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode(), digest_size=32)
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
        self._digests[name] = digest.digest()

    def hexdigest(self) -> str:
        """64 hexadecimal digits for everything added so far."""
        return hashlib.blake2b(
            b"".join(self._digests[name] for name in sorted(self._digests)), digest_size=32
        ).hexdigest()


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint. Nothing but headers has been read (of an adapter: all of it)."""

    path: Path
    config: PretrainedConfig
    source: TensorSource
    tokenizer_path: Path
    """The folder with tokenizer and processor files, or the GGUF file that holds the tokenizer."""
    quantized: bool = False
    """Whether any of its weights, or of those that an adapter is merged into, is held in fewer bits than 16."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Canonical name → shape."""
        return dict(self.source.shapes)

    def tensors(self, hasher: ContentHash | None = None) -> Iterator[tuple[str, Tensor]]:
        """Each canonical name and its CPU tensor, in stored dtype (fp32 where GGUF was quantized), the largest first.

        A tensor may be a view of a mapped file: copy it, then drop it. Copied into memory not touched before
        (`torch.empty`), all of them together never need more than about 1.1 × the weights. `hasher` is fed along.
        """
        for name, tensor in self.source.read():
            if hasher is not None:
                hasher.add(name, tensor)
            yield name, tensor
            del tensor

    def content_hash(self) -> str:
        """The hash of all tensors, the same however they are spread over files."""
        hasher = ContentHash()
        for _ in self.tensors(hasher):
            pass
        return hasher.hexdigest()


def open_checkpoint(path: str | Path, base: str | Path | None = None) -> Checkpoint:
    """Open a Hugging Face folder, a PEFT LoRA folder, or a GGUF file (or a folder with one and no config.json).

    A PEFT folder yields its base's tensors with the adapter merged in, and the base's configuration (for SEQ_CLS with
    the adapter's labels). The base is `base`, else the local folder that its adapter_config.json names.
    Raises the types under `CheckpointError`.
    """
    path = Path(path)
    if path.is_dir() and is_adapter(path):
        return _open_adapter(path, base)
    if base is not None:
        raise CheckpointMismatch(f"a base is given, but {path} is no PEFT folder (it has no adapter_config.json)")
    if path.is_file() and path.suffix == ".gguf":
        return _open_gguf(path, path)
    if not path.is_dir():
        raise CheckpointMissing(f"{path} is neither a folder nor a .gguf file")
    if not (path / "config.json").is_file():
        found = sorted(path.glob("*.gguf"))
        if len(found) == 1:
            return _open_gguf(path, found[0])
        raise CheckpointMissing(
            f"{path} has no config.json" + (f" and {len(found)} .gguf files: name one of them" if found else "")
        )
    config = _read_config(path)
    return Checkpoint(path, config, WeightFiles(_weight_files(path), rename=canonical_names), path)


def _open_gguf(path: Path, file: Path) -> Checkpoint:
    source = GgufFile(file)
    return Checkpoint(path, source.config(), source, file, source.quantized)


def _open_adapter(path: Path, base: str | Path | None) -> Checkpoint:
    adapter = read_adapter(path)
    if base is None:
        base = adapter.base
        if not isinstance(base, str) or not Path(base).exists():
            raise CheckpointMissing(f"{path} is an adapter for {base!r}, which is no local path; give the base's")
    if is_adapter(Path(base)):
        raise CheckpointMismatch(f"{base} is itself an adapter; the base of {path} has to be a whole model")
    opened = open_checkpoint(base)
    source = MergedSource(opened.source, adapter)
    own_tokenizer = (path / "tokenizer_config.json").is_file()
    tokenizer_path = path if own_tokenizer else opened.tokenizer_path
    return Checkpoint(path, _adapted_config(opened.config, adapter), source, tokenizer_path, opened.quantized)


def _adapted_config(config: PretrainedConfig, adapter: Adapter) -> PretrainedConfig:
    if adapter.task_type != "SEQ_CLS":
        return config
    config = copy.deepcopy(config)
    config.architectures = [
        name.replace("ForCausalLM", "ForSequenceClassification") for name in config.architectures or ()
    ]
    if "score.weight" in adapter.saved:
        config.num_labels = adapter.saved["score.weight"].shape[0]
    return config


def _read_config(path: Path) -> PretrainedConfig:
    raw = read_json(path / "config.json")
    model_type = raw.get("model_type")
    # what stands above knows other models, and is asked only where this one cannot be used
    from .support import hint

    known = f". {hint(raw)}" if hint(raw) else ""
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        if "auto_map" in raw:
            raise UnsafeCheckpoint(
                f"{path} wants its own code to run (auto_map in config.json); that is never done{known}"
            )
        raise UnknownArchitecture(f"{path}/config.json has model_type {model_type!r}, unknown to transformers{known}")
    if known:
        raise UnknownArchitecture(f"{path}/config.json is of no model that runs{known}")
    try:
        return AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # configuration classes check their values each in its own way
        raise CheckpointMismatch(f"{path}/config.json is no valid {model_type} configuration: {error}") from error


def _weight_files(path: Path) -> list[Path]:
    found = next((path / name for name in _WEIGHTS if (path / name).is_file()), None)
    if found is None:
        raise CheckpointMissing(f"{path} has no weights; looked for {', '.join(_WEIGHTS)}")
    if found.suffix != ".json":
        return [found]
    shards = read_json(found).get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(isinstance(shard, str) for shard in shards.values()):
        raise CheckpointTruncated(f"{found} has no weight_map from tensors to files")
    files = []
    for shard in sorted(set(shards.values())):
        # A bare name only: an index must not reach out of its folder.
        if Path(shard).name != shard or Path(shard).suffix not in (".safetensors", ".bin"):
            raise UnsafeCheckpoint(f"{found} names {shard!r}; shards are .safetensors or .bin files beside it")
        if not (path / shard).is_file():
            raise CheckpointMissing(f"{found} names {shard}, which is not there")
        files.append(path / shard)
    return files
