"""Data made by models: what is asked, what is kept, and that interrupted work goes on where it was."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from stockade.cli import app
from stockade.engine.engine import Engine
from stockade.engine.errors import BadInput, UnsupportedImage
from stockade.engine.guards import EyesClosed, Guard, SelfJudge
from stockade.engine.sampling import SamplingParams
from stockade.train.data import Kind, Part, read_examples
from stockade.train.detoxifier_data import Harmful, make_triples, paired_triples, read_harmful
from stockade.train.ecso_data import Query, make_pairs, read_queries
from stockade.train.journal import Journal
from stockade.train.rows import DataInvalid, DataMissing
from stockade.train.teachers import EndpointTeacher, EngineTeacher
from stockade.train.triples import SORRY, Triple, read_triples

HARMFUL = [Harmful(f"Q {n}?", f"harmful {n}") for n in range(6)]
SHORT = SamplingParams(temperature=0.0, max_tokens=6)


class Scripted:
    """A teacher that answers some questions; it remembers what it was asked."""

    def __init__(self, answers: Callable[[str], str | None]) -> None:
        self.answers, self.asked = answers, list[str]()

    def __call__(self, questions: Sequence[str]) -> Iterator[tuple[int, str | None]]:
        for number in reversed(range(len(questions))):
            self.asked.append(questions[number])
            yield number, self.answers(questions[number])


def test_what_is_made_is_read_again_and_what_failed_is_asked_again(tmp_path: Path) -> None:
    out = tmp_path / "triples.jsonl"
    some = Scripted(lambda text: None if "Q 2?" in text else "harmful 3" if "Q 3?" in text else "harmless")
    assert make_triples(HARMFUL, some, out) == (4, 2)
    assert all("Please rewrite the response to make it harmless" in text for text in some.asked)
    with open(out, "a") as file:
        file.write('{"key": "torn", "question": "Q')  # as a kill leaves it
    rest = Scripted(lambda text: "a better one")
    assert make_triples(HARMFUL, rest, out) == (6, 0)
    assert len(rest.asked) == 2
    assert set(read_triples([out]).items) == {
        Triple(*item, "a better one" if n in (2, 3) else "harmless") for n, item in enumerate(HARMFUL)
    }
    none = Scripted(lambda text: None)
    assert make_triples(HARMFUL, none, out) == (6, 0) and none.asked == []


def test_an_interrupted_teacher_loses_nothing(tmp_path: Path) -> None:
    def stop(text: str) -> str:
        if "Q 1?" in text:
            raise KeyboardInterrupt
        return "harmless"

    with pytest.raises(KeyboardInterrupt):
        make_triples(HARMFUL, Scripted(stop), tmp_path / "out.jsonl")
    rest = Scripted(lambda text: "harmless")
    assert make_triples(HARMFUL, rest, tmp_path / "out.jsonl") == (6, 0) and len(rest.asked) == 2


def test_only_harmful_answers_that_train_are_taken(data: Path, tmp_path: Path) -> None:
    found = read_harmful(data)
    wanted = {item.text for item in read_examples(data) if item.part is Part.TRAIN and item.kind is Kind.HARMFUL}
    assert {item.text for item in found} == wanted and wanted
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "Q", "harmful": "a"}\n{"question": "Q", "harmful": "A "}\n')
    assert read_harmful(rows) == [Harmful("Q", "a")]
    rows.write_text('{"question": "Q"}\n')
    with pytest.raises(DataInvalid, match="line 1: needs question and harmful"):
        read_harmful(rows)


def test_the_sets_own_pairs(data: Path, tmp_path: Path) -> None:
    found = paired_triples(data)
    parts = {item.text: (item.part, item.kind, item.question) for item in read_examples(data)}
    assert found
    for question, harmful, harmless in found:
        assert parts[harmful] == (Part.TRAIN, Kind.HARMFUL, question)
        assert parts[harmless] == (Part.TRAIN, Kind.REFUSING, question)
    for _ in range(2):
        command = ["data", "detoxifier", str(data), "--paired", "--out", str(tmp_path / "t.jsonl")]
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 0 and f"{len(found)} triples" in done.output
    assert read_triples([tmp_path / "t.jsonl"]).items == found


def test_the_engine_as_teacher_and_its_detector(engine: Engine) -> None:
    texts = ["Why?", "What is it?" * 400, "How?"]
    found = dict(EngineTeacher(engine, SHORT)(texts))
    assert found.keys() == {0, 1, 2} and found[1] is None  # the prompt does not fit
    assert all(text is None or text == SORRY or text for text in found.values())
    assert engine.pool.check_integrity() is None


class Endpoint(BaseHTTPRequestHandler):
    replies: list[tuple[int, Any]]
    bodies: list[Any]
    keys: list[str | None]

    def do_POST(self) -> None:
        size = int(self.headers["Content-Length"])
        self.bodies.append((self.path, json.loads(self.rfile.read(size))))
        self.keys.append(self.headers["Authorization"])
        status, body = self.replies.pop(0)
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def endpoint() -> Iterator[tuple[str, type[Endpoint]]]:
    handler = type("Handler", (Endpoint,), {"replies": [], "bodies": [], "keys": []})
    server = HTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1", handler
    server.shutdown()
    server.server_close()


def said(text: str | None, reason: str = "stop") -> dict[str, Any]:
    return {"choices": [{"message": {"content": text}, "finish_reason": reason}]}


def test_an_endpoint_as_teacher(endpoint: tuple[str, type[Endpoint]]) -> None:
    url, handler = endpoint
    handler.replies += [(429, {}), (503, {}), (200, said("fine")), (200, said("cut", "length")), (400, {}), (200, [])]
    teacher = EndpointTeacher(url, "some", "secret", max_tokens=9, concurrent=1, pause=0.0)
    assert dict(teacher(["one", "two", "three", "four"])) == {0: "fine", 1: None, 2: None, 3: None}
    path, body = handler.bodies[0]
    assert path == "/v1/chat/completions" and body["messages"] == [{"role": "user", "content": "one"}]
    assert (body["model"], body["max_tokens"], handler.keys[0]) == ("some", 9, "Bearer secret")
    handler.replies += [(401, {})] * 4
    with pytest.raises(BadInput, match="401"):
        list(teacher(["one"]))
    with pytest.raises(BadInput, match="http://"):
        EndpointTeacher("file:///etc", "some")


def test_ecso_makes_pairs_and_goes_on(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    engine = Engine(checkpoint("llava"), device="cpu", dtype=torch.float32, kv_bytes=32 << 20)
    images = tmp_path / "images"
    images.mkdir()
    Image.new("RGB", (60, 60), "red").save(images / "red.png")
    guard = Guard(SelfJudge(threshold=0.0, min_mass=1e-30), EyesClosed())  # random models judge nonsense
    queries = [Query("What is it?", "red.png"), Query("Why?", None), Query("How?" * 600, None)]
    out = tmp_path / "pairs.json"
    first = make_pairs(engine, queries[1:2], images, out, sampling=SHORT, guard=guard)
    asked: list[tuple[int, int]] = []
    found = make_pairs(
        engine,
        queries,
        images,
        out,
        sampling=SHORT,
        guard=guard,
        progress=lambda what, done, of: asked.append((done, of)),
    )
    assert asked == [(1, 2), (2, 2)]  # the second query was answered before
    pairs = json.loads(out.read_text())
    assert len(pairs) == 2 and found == (2, 0, 1)
    assert first == (1, 0, 0)
    lines = [json.loads(line) for line in out.with_suffix(".jsonl").read_text().splitlines()]
    assert len(lines) == 3 and any("2,418 tokens" in row.get("refused", "") for row in lines)
    for pair in pairs:
        human, gpt = pair["conversations"]
        assert (human["from"], gpt["from"]) == ("human", "gpt") and gpt["value"]
        assert human["value"].startswith("<image>\n") is ("image" in pair)
    with pytest.raises(UnsupportedImage, match="no file in the folder"):
        make_pairs(engine, [Query("?", "../secret.png")], images, out, sampling=SHORT)
    with pytest.raises(BadInput, match=r"\.json"):
        make_pairs(engine, queries, images, tmp_path / "pairs.txt", sampling=SHORT)


def test_queries_and_journals_of_another_form(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"query": "Q", "image": "1.png"}\n{"question": "P"}\n{"query": "Q", "image": "1.png"}\n')
    assert read_queries(rows) == [Query("Q", "1.png"), Query("P", None)]
    with pytest.raises(DataInvalid, match="has no key"):
        Journal(rows)
    rows.write_text('{"query": 1}\n')
    with pytest.raises(DataInvalid, match="line 1: needs query"):
        read_queries(rows)
    rows.write_text("")
    with pytest.raises(DataMissing, match="no query"):
        read_queries(rows)


def test_the_commands(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    rows = tmp_path / "queries.jsonl"
    rows.write_text('{"query": "Why?"}\n')
    model = str(checkpoint("llama-gqa"))
    out = tmp_path / "pairs.json"
    made = CliRunner().invoke(
        app, ["data", "ecso", str(rows), "--model", model, "--out", str(out), "--max-tokens", "4", "--device", "cpu"]
    )
    assert made.exit_code == 0 and isinstance(json.loads(out.read_text()), list)
    harmful = tmp_path / "harmful.jsonl"
    harmful.write_text('{"question": "Q", "harmful": "bad"}\n')
    triples = tmp_path / "triples.jsonl"
    done = CliRunner().invoke(
        app, ["data", "detoxifier", str(harmful), "--model", model, "--out", str(triples), "--max-tokens", "4"]
    )
    assert done.exit_code in (0, 1) and "triples" in done.output
    rows = [{"question": f"Q {n}", "harmful": f"bad {n}", "harmless": f"good {n}"} for n in range(4)]
    triples.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--epochs=1", "--rank=2", "--rate=1e-3", "--device=cpu"]
    trained = CliRunner().invoke(
        app, ["train", "detoxifier", model, "--data", str(triples), "--out", str(tmp_path / "detox"), *options]
    )
    assert trained.exit_code == 0, trained.output
    assert (tmp_path / "detox" / "adapter_config.json").is_file()
