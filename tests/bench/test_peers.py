"""Other engines as peers: their programs, what they cannot do, the same tokens where the weights are the same."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM

from stockade.bench.beside_peers import PeersConfig, PeersPlan, same
from stockade.bench.gguf_export import save_gguf
from stockade.bench.paired import Enough
from stockade.bench.peer_process import Peer, PeerFailed, PeerSpec, UnknownPeer
from stockade.bench.units import run_units
from stockade.bench.workload import sources
from stockade.engine.errors import BadInput, MissingExtra, UnknownArchitecture
from stockade.engine.models.gguf_file import GgufFile


@pytest.mark.parametrize(
    ("text", "error"),
    [("vllm2", UnknownPeer), ("url=ftp://x", BadInput), ("url", BadInput), ("openvino=/no/such/python", BadInput)],
)
def test_what_is_no_peer_is_refused(text: str, error: type[Exception]):
    with pytest.raises(error):
        PeerSpec.parse(text)


def test_a_missing_package_says_what_to_install_and_where():
    with Peer(PeerSpec.parse("llama.cpp"), 1) as peer, pytest.raises(MissingExtra, match="install xllamacpp there"):
        peer.ask("load")


def test_a_program_that_is_killed_or_silent_is_a_failure_with_its_name():
    with Peer(PeerSpec("url", sys.executable), 1) as peer:
        with pytest.raises(PeerFailed, match="url: URLError"):
            peer.ask("load", url="http://127.0.0.1:9")
        with pytest.raises(PeerFailed, match="url: AttributeError"):
            peer.ask("fly")
        peer._process.kill()
        with pytest.raises(PeerFailed, match="url ended with -9"):
            peer.ask("load", url="http://127.0.0.1:9")


class Server(BaseHTTPRequestHandler):
    asked: ClassVar[list[dict]] = []

    def do_GET(self) -> None:
        self._send(json.dumps({"data": [{"id": "some-model"}]}).encode())

    def do_POST(self) -> None:
        self.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        events = [{"choices": [{"text": word}]} for word in ("one", " two", "")]
        self._send(b"".join(b"data: " + json.dumps(one).encode() + b"\n\n" for one in events) + b"data: [DONE]\n\n")

    def _send(self, body: bytes) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    httpd = HTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{httpd.server_address[1]}/v1"
    httpd.shutdown()
    thread.join()
    httpd.server_close()


def test_any_server_of_openais_protocol_is_a_peer(server: str):
    with Peer(PeerSpec.parse(f"url={server}"), 1) as peer:
        loaded = peer.ask("load", url=server)
        assert loaded["version"] == "some-model" and "score" in loaded["cannot"]
        said = peer.ask("run", text="Count:", ids=[1], new=2)
    assert said["text"] == "one two" and len(said["times"]) == 2 and said["ids"] is None
    assert Server.asked[-1]["prompt"] == "Count:" and Server.asked[-1]["stream"] is True


def test_this_engine_and_transformers_give_the_same_tokens_in_turn():
    enough = Enough(least=2, tolerance=1e9)
    config = PeersConfig(enough=enough, prompt_tokens=12, answer_tokens=6, dtype="fp32", threads=1)
    done: dict = {}
    with sources("tiny-llama") as weights, ExitStack() as stack:
        plan = PeersPlan(weights, config, stack)
        assert run_units(plan, done)
    assert list(done) == ["question, round 0", "question, round 1"]
    assert [list(found) for found in done.values()] in (
        [["stockade", "transformers"], ["transformers", "stockade"]],
        [["transformers", "stockade"], ["stockade", "transformers"]],
    )
    first, second = plan.rows(json.loads(json.dumps(done)))
    assert [first["peer"], second["peer"]] == ["stockade", "transformers"]
    assert second["same_as_first"] == "2 of 2 answers, 100 % of the tokens"
    for row in (first, second):
        assert row["answer_ms"]["n"] == 2 and row["answer_ms"]["median"] >= row["first_token_ms"]["median"] > 0
        assert row["judge_ms"]["median"] > 0
        assert row["score_ms"] is None and row["not_done"] == {"score": "no detector was given"}
    seconds = [[found[name]["seconds"]["answer"] for name in ("transformers", "stockade")] for found in done.values()]
    assert second["ratios"]["answer"]["median"] == pytest.approx(sum(a / b for a, b in seconds) / 2, rel=1e-3)
    assert first["ratios"] == {}


def test_answers_are_compared_up_to_the_first_token_that_differs():
    first = [{"ids": [1, 2, 3, 4], "text": "x"}]
    assert same([{"ids": [1, 2, 9, 4], "text": "y"}], first) == "0 of 1 answers, 50 % of the tokens"
    assert same([{"ids": None, "text": "x"}], first) == "1 of 1 answers, by text"


def test_every_peer_runs_once():
    twice = PeersConfig(peers=(PeerSpec("stockade"), PeerSpec("stockade")))
    with sources("tiny-llama") as weights, ExitStack() as stack, pytest.raises(BadInput, match="every peer once"):
        PeersPlan(weights, twice, stack)


def test_weights_come_back_from_the_gguf_that_others_read(tmp_path: Path):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=1, eos_token_id=2, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    words = {chr(97 + number): number for number in range(20)} | {"ab": 20}
    Tokenizer(models.BPE(vocab=words, merges=[("a", "b")])).save(str(tmp_path / "tokenizer.json"))
    for dtype in ("bf16", "fp32"):
        file = GgufFile(save_gguf(tmp_path, tmp_path / f"{dtype}.gguf", dtype))
        known = {name: value.detach().float() for name, value in model.named_parameters()}
        found = dict(file.read())
        assert found.keys() == known.keys()
        assert all(torch.equal(found[name].float(), known[name]) for name in known)
    (tmp_path / "config.json").write_text(json.dumps({**config.to_dict(), "model_type": "mistral"}))
    with pytest.raises(UnknownArchitecture, match="only llamas"):
        save_gguf(tmp_path, tmp_path / "no.gguf")
