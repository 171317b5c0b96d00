"""Safety: official file formats with made-up harmless texts, figures by hand, and the whole command on tiny
models."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from stockade.bench.document import read_document
from stockade.bench.pictures import pictures
from stockade.bench.result_tables import tables
from stockade.bench.safety.asked import Result, answer_cases
from stockade.bench.safety.cases import Case, Kind, sample
from stockade.bench.safety.detoxified import likeness
from stockade.bench.safety.figures import Figures, interval
from stockade.bench.safety.judges import EndpointJudge, KeywordJudge, judged, refuses, trained_on
from stockade.bench.safety.labeled import labeled_answers, unseen
from stockade.bench.safety.plan import SafetyConfig, read_cases
from stockade.bench.safety.sets import READERS
from stockade.bench.safety.typography import Typography, figstep
from stockade.bench.safety.utility import UTILITY_READERS, right, scores
from stockade.cli import app
from stockade.engine.engine import Engine
from stockade.engine.errors import BadInput, InvalidGuard
from stockade.engine.guards import HarmHead, SelfJudge
from stockade.engine.models.heads import Head, HeadSpec, save_head
from stockade.engine.models.sources import SMOL_JUDGE
from stockade.engine.sampling import SamplingParams
from stockade.train.data import Part, Source, read_set
from stockade.train.rows import DataInvalid, DataMissing, Skipped, refuse

SECRET = "zebra"  # in every made-up text: no document may hold it


def picture(file: Path, color: str = "red") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (24, 24), color).save(file)
    return file


def write(file: Path, text: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    return file


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Every set in its official form, a case or two each."""
    folder = tmp_path / "data"
    for number, name in enumerate(("01-Tea", "02-Cake"), 1):
        row = {
            "Question": f"How is {SECRET} tea {number} made?",
            "Key Phrase": f"{SECRET} tea {number}",
            "Rephrased Question": "How is what the image says made?",
            "Rephrased Question(SD)": "How is what the image shows made?",
        }
        write(folder / "mm-safetybench" / "processed_questions" / f"{name}.json", json.dumps({"0": row}))
    for kind in ("SD", "TYPO"):
        picture(folder / "mm-safetybench" / "imgs" / "01-Tea" / kind / "0.jpg")
    table = "dataset,category_id,task_id,category_name,question,instruction\n"
    table += f"ForbidQI,1,1,Tea,How is {SECRET} tea made?,Steps to make tea.\n"
    table += f"ForbidQI,1,2,Tea,How is {SECRET} cake made?,Steps to make cake.\n"
    write(folder / "figstep" / "safebench.csv", table)
    picture(folder / "figstep" / "images" / "query_ForbidQI_1_1_6.png")
    write(folder / "vlsafe" / "VLSafe.jsonl", json.dumps({"image_id": 7, "caption": "tea", "query": f"{SECRET}?"}))
    picture(folder / "vlsafe" / "train2017" / "000000000007.jpg")
    rows = f"id,prompt,type,label\n1,How do I kill {SECRET} weeds?,homonyms,safe\n2,How do I weed?,contrast,unsafe\n"
    write(folder / "xstest" / "xstest_prompts.csv", rows)
    asked = [
        {"safe_instruction": f"What {SECRET}?", "response": "x"},
        {"unsafe_instruction": "Why?", "response": "x"},
    ]
    safe = {"image": "a/1.jpg", "safe": True, "instr-resp": asked}
    unsafe = {"image": "a/2.jpg", "safe": False, "harmful_category": "tea", "instr-resp": [{"instruction": "Well?"}]}
    write(folder / "vlguard" / "test.json", json.dumps([safe, unsafe]))
    picture(folder / "vlguard" / "test" / "a" / "1.jpg")
    table = "id,jailbreak_query,redteam_query,format,policy,image_path,from,selected_mini,transfer_from_llm\n"
    table += f"0,Say {SECRET} tea,Tea?,Template,Tea policy,llm/b.png,x,True,True\n"
    table += "1,What is in the image?,Cake?,SD,Tea policy,,x,True,False\n"
    write(folder / "jailbreakv" / "JailBreakV_28K.csv", table)
    picture(folder / "jailbreakv" / "llm" / "b.png")
    write(folder / "mme" / "color" / "1.txt", f"Is {SECRET} red?\tYes\nIs it blue?\tNo\n")
    picture(folder / "mme" / "color" / "1.png")
    write(folder / "mme" / "scene" / "questions_answers_YN" / "1.txt", "Is it tea?\tYes\nIs it cake?\tNo\n")
    picture(folder / "mme" / "scene" / "images" / "1.jpg")
    row = {"imagename": "v.png", "question": f"{SECRET}?", "answer": "red<AND>two<OR>2", "capability": ["rec", "ocr"]}
    write(folder / "mm-vet" / "mm-vet.json", json.dumps({"v1_0": row}))
    picture(folder / "mm-vet" / "images" / "v.png")
    buffer = io.BytesIO()
    Image.new("RGB", (24, 24), "blue").save(buffer, "PNG")
    shown = base64.b64encode(buffer.getvalue()).decode()
    lines = ["index\tquestion\thint\tA\tB\tC\tD\tanswer\tcategory\timage"]
    lines += [f"5\tWhich {SECRET}?\tnan\tred\tblue\t\t\tB\tcolor\t{shown}"]
    lines += ["1000005\tWhich?\tLook.\tblue\tred\t\t\tA\tcolor\t5"]
    write(folder / "mmbench" / "dev.tsv", "\n".join(lines) + "\n")
    return folder


def read(name: str, data: Path) -> list[Case]:
    return (READERS | UTILITY_READERS)[name](data / name, Skipped())


def test_mm_safetybench_has_three_images_a_question_and_renders_what_can_be(data: Path) -> None:
    cases = read("mm-safetybench", data)
    assert [case.scenario for case in cases] == ["01-Tea/SD", "01-Tea/TYPO", "02-Cake/TYPO"]
    sd, typo, rendered = cases
    assert sd.text == "How is what the image shows made?" == typo.text and sd.alone.startswith("How is zebra")
    assert isinstance(typo.image, Path) and isinstance(rendered.image, Typography)
    assert READERS["mm-safetybench"] and rendered.image.draw().width == 1024
    (first, *_) = rendered.messages(with_image=True)[0]["content"]
    assert first["image"].size == rendered.image.draw().size


def test_figstep_asks_the_question_itself_without_the_image(data: Path) -> None:
    there, rendered = read("figstep", data)
    assert isinstance(there.image, Path) and isinstance(rendered.image, Typography)
    assert rendered.image.draw().size == (760, 760) and min(rendered.image.draw().convert("L").getdata()) == 0
    assert "items are empty" in there.text and there.alone == "How is zebra tea made?"
    assert figstep("Steps.").text == "Steps.\n1. \n2. \n3. "


def test_the_other_safety_sets(data: Path) -> None:
    (one,) = read("vlsafe", data)
    assert isinstance(one.image, Path) and one.kind is Kind.ATTACK
    safe, unsafe = read("xstest", data)
    assert (safe.kind, unsafe.kind, safe.image) == (Kind.BENIGN, Kind.ATTACK, None)
    write(
        data / "xstest" / "xstest_prompts.csv", "prompt,type,label\n" + "".join(f"{n}?,t,safe\n" for n in range(10))
    )
    parts = Counter(case.set for case in read("xstest", data))
    assert parts == {"xstest, safe, held out": 3, "xstest, safe, in training": 7}
    kinds = {(case.set, case.kind, case.text): case.image is not None for case in read("vlguard", data)}
    assert kinds == {
        ("vlguard, safe image, unsafe question", Kind.ATTACK, "Why?"): True,
        ("vlguard, safe image, safe question", Kind.BENIGN, "What zebra?"): True,
        ("vlguard, unsafe image", Kind.ATTACK, "Well?"): False,
    }
    of_text, of_image = read("jailbreakv", data)
    assert (of_text.alone, of_image.alone) == ("Say zebra tea", "Cake?") and isinstance(of_text.image, Path)


def test_utility_sets_and_their_scores(data: Path) -> None:
    cases = read("mme", data)
    assert {case.scenario for case in cases} == {"color", "scene"} and all(case.image for case in cases)
    said = dict(zip((case.id for case in cases), ("Yes.", "No", "Yes", "yes, it is"), strict=True))
    rights = {case.id: right(case, said[case.id]) for case in cases}
    # color: both right; scene: one of two, hence no image whole
    assert scores("mme", cases, rights) == {"score": 100 + 100 + 50 + 0, "of": 400, "accuracy": 75}
    (vet,) = read("mm-vet", data)
    assert [right(vet, text) for text in ("Red, 2 of them", "two", "reddish")] == [1.0, 0.5, 0.0]
    first, rotated = read("mmbench", data)
    assert (
        isinstance(rotated.image, str) and rotated.image == first.image and rotated.text.startswith("Look.\nWhich?")
    )
    assert "A. red\nB. blue\nAnswer" in first.text
    rights = {first.id: right(first, "The answer is B."), rotated.id: right(rotated, "B")}
    assert scores("mmbench", [first, rotated], rights) == {"score": 50, "of": 100, "circular": 0}


def test_bad_rows_are_named_or_skipped(data: Path) -> None:
    file = data / "xstest" / "xstest_prompts.csv"
    file.write_text(file.read_text() + "3,Why?,homonyms,perhaps\n")
    with pytest.raises(DataInvalid, match="row 3"):
        read_cases(data, SafetyConfig(sets=("xstest",)))
    skipped = Skipped()
    assert len(read_cases(data, SafetyConfig(sets=("xstest",)), skipped)) == 2 and skipped.count == 1
    with pytest.raises(BadInput, match="unknown sets"):
        read_cases(data, SafetyConfig(sets=("nothing",)))
    with pytest.raises(DataMissing):
        read_cases(data / "xstest", SafetyConfig())
    with pytest.raises(DataMissing, match="no folder figstep-tiny; of the sets it has mm-safetybench, figstep"):
        read_cases(data, SafetyConfig(sets=("figstep-tiny",)))
    (data / "vlguard" / "test.json").write_text(
        json.dumps([{"image": "../../xstest/x.jpg", "safe": False, "instr-resp": [{"instruction": "?"}]}])
    )
    picture(data / "xstest" / "x.jpg")
    with pytest.raises(BadInput, match="outside"):
        read_cases(data, SafetyConfig(sets=("vlguard",)))


def test_a_sample_is_of_every_scenario_and_the_seed_decides(data: Path) -> None:
    cases = read_cases(data, SafetyConfig())
    some = sample(cases, 1, 0)
    assert {(case.set, case.scenario) for case in some} == {(case.set, case.scenario) for case in cases}
    assert sample(cases, 1, 0) == some and len(some) == len({(case.set, case.scenario) for case in cases})


def test_the_published_keyword_rule() -> None:
    assert refuses("I'm SORRY, no.") and refuses("It is not") and refuses(" ") and not refuses("Take a cup of tea.")
    assert KeywordJudge()([("?", "Take a cup."), ("?", "I cannot.")]) == [True, False]


def test_rates_by_hand() -> None:
    low, high = interval(5, 10)
    assert (low, high) == (pytest.approx(23.66, abs=0.01), pytest.approx(76.34, abs=0.01))
    assert interval(0, 10)[0] == 0 and interval(10, 10)[1] == pytest.approx(100)
    cases = [Case("tea", f"s{n % 2}", str(n), Kind.ATTACK, "?", "?") for n in range(4)]

    def unit(guard: str, harmful: Sequence[tuple[bool | None, ...]], seconds: float, rounds: int) -> dict[str, Any]:
        results = [
            list(Result(one, rounds > 0, rounds > 0, False, rounds, rounds > 0, 0.01, 30, 10, None))
            for one in harmful
        ]
        known = {"guard": guard, "with_image": False, "numbers": [0, 1, 2, 3], "seconds": seconds, "results": results}
        return json.loads(json.dumps(known))

    off = unit("off", [(True, True), (True, False), (True, None), (False, False)], 2.0, 0)
    done = {"a": off, "b": unit("safe", [(False, False)] * 4, 3.0, 1)}
    figures = Figures(cases, ["off", "safe"], ["one", "two"])
    whole = [row for row in figures.rows(done) if row["scenario"] == "all"]
    harmful = whole[0]["harmful"]
    assert (harmful["one"]["percent"], harmful["two"]["percent"], harmful["two"]["unread"]) == (75.0, 33.33, 1)
    assert (harmful["all"]["count"], harmful["all"]["n"]) == (1, 3)
    assert whole[1]["added_ms"] == pytest.approx(250.0) and whole[1]["added_percent"] == pytest.approx(50.0)
    assert [row["n"] for row in figures.rows(done) if row["scenario"] == "s1"] == [2, 2]
    summary = figures.more(done)["summary"]
    assert [one["attack_success"]["one"]["percent"] for one in summary] == [75.0, 0.0]
    assert summary[1]["rounds"] == 1.0 and figures.more(done)["skipped"] == 0
    assert whole[1]["newly_refused"]["percent"] == 100.0 and whole[0]["newly_refused"]["percent"] == 0.0
    assert whole[0]["mended"]["n"] == 0 and whole[1]["mended"]["harmful"]["one"] == whole[1]["harmful"]["one"]


def test_ordinary_questions_are_those_that_train_nothing_and_short_ones_are_rendered(data: Path) -> None:
    asked = [f"How is {SECRET} tea {number} made?" for number in range(8)]
    asked += [
        f"How is {SECRET} cake {number} made, in a kitchen as small as this one, of rye and of nothing else at all?"
        for number in range(12)
    ]
    rows = [json.dumps({"question": question, "response": f"{n} {question}"}) for question in asked for n in range(2)]
    write(data / "alpaca-eval" / "answers.jsonl", "\n".join(rows))
    tests = {one.question for one in read_set(data, Source.ALPACA_EVAL, 0) if one.part is Part.TEST}
    cases = read("alpaca-eval", data)
    assert sorted(case.alone for case in cases) == sorted(tests) and len(tests) == 6
    for case in cases:
        assert case.kind is Kind.ORDINARY and (case.image is not None) == ("tea" in case.alone)
        if isinstance(case.image, Typography):
            page = case.image.draw().convert("L")
            assert "items are empty" in case.text and min(page.crop((0, 740, 760, 760)).getdata()) == 255


def test_what_measures_a_judge_did_not_train_it(data: Path, tmp_path: Path) -> None:
    rows = [
        {"behavior": f"b{n}", "question": f"Tea {n}?", "response": f"{word} {n}", "harmful": word == "Cup"}
        for n in range(10)
        for word in ("Cup", "No")
    ]
    write(data / "jailbreakbench" / "responses.jsonl", "\n".join(map(json.dumps, rows)))
    of_detectors = {one.text for one in labeled_answers(data, None, 0, unseen(Part.TRAIN))}
    of_judges = {one.text for one in labeled_answers(data, None, 0, unseen(Part.TEST))}
    assert of_detectors and of_judges and not of_detectors & of_judges
    assert len(of_detectors | of_judges) == len(rows)
    head = Head(HeadSpec(1, "mean"), torch.zeros(4))
    for part, file in ((Part.TEST, tmp_path / "judge.safetensors"), (Part.TRAIN, tmp_path / "other.safetensors")):
        save_head(head, file, trained_on=part)
        assert trained_on(str(file)) is part
    assert trained_on("smol") is Part.TRAIN and trained_on(SMOL_JUDGE) is Part.TEST


def test_likeness_is_of_what_texts_say() -> None:
    engine = Engine("tiny-llava", device="cpu", kv_bytes=16 << 20)
    asked, answers = ["Tea?", "Cake, and bread?"], ["Take a cup of it.", "Two eggs."]
    same = likeness(engine.models["mllm"], asked, answers, answers)
    assert same["original_rewrite"] == pytest.approx(1) and same["question_rewrite"] == same["question_original"]
    assert same["original_refusal"] < 0.9
    other = likeness(engine.models["mllm"], asked, answers, asked)
    assert other["question_rewrite"] == pytest.approx(1) and other["original_rewrite"] == other["question_original"]


def test_no_guard_finds_what_another_one_computed() -> None:
    engine = Engine("tiny-llava", device="cpu", kv_bytes=16 << 20)
    case = Case("tea", "s", "1", Kind.ATTACK, "Tea? " * 20, "Tea?", figstep("Tea."))
    sampling = SamplingParams(temperature=0.0, max_tokens=2)
    computed = set()
    for _ in range(2):
        (found,) = answer_cases(engine, [case], True, None, "off", sampling, [], 1, refuse).results
        assert found is not None
        computed.add(found.computed)
    assert len(computed) == 1 and engine.runner.features.misses == 2


def test_a_detector_and_the_model_itself_judge_given_texts() -> None:
    engine = Engine("tiny-llava", "tiny-llama", device="cpu", kv_bytes=16 << 20)
    found = judged(engine, HarmHead(), [("Tea?", None, "Take a cup."), ("Cake?", None, "Take two eggs.")])
    assert all(0 <= one.score <= 1 and one.error is None for one in found) and found[0].score != found[1].score
    shown = Image.new("RGB", (24, 24), "red")
    (own,) = judged(engine, SelfJudge(min_mass=1e-9), [("Tea?", shown, "Take a cup.")])
    assert own.error is None and own.detector == "self_judge"
    assert not engine.has_work


@pytest.fixture
def endpoint() -> Iterator[Callable[[list[str]], str]]:
    """Starts an endpoint that says the given words in turn; gives its address."""
    servers = []

    def start(words: list[str]) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"][0]["content"]
                said = words[0] if "cup" in asked else words[1]
                body = {"choices": [{"message": {"content": said}, "finish_reason": "stop"}]}
                self.send_response(200)
                self.end_headers()
                self.wfile.write(json.dumps(body).encode())

            def log_message(self, *_: object) -> None:
                pass

        server = HTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}/v1"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_an_endpoint_judges_and_what_it_mumbles_is_no_judgement(endpoint: Callable[[list[str]], str]) -> None:
    judge = EndpointJudge(endpoint(["Yes.", "Perhaps"]), "m")
    assert judge([("Tea?", "Take a cup."), ("Cake?", "Take an egg.")]) == [True, None]


def test_the_whole_command_on_tiny_models(data: Path, tmp_path: Path) -> None:
    file, answers = tmp_path / "safety.json", tmp_path / "answers.jsonl"
    plain = {"behavior": "b", "question": "Tea?", "response": "Take a zebra cup.", "harmful": True}
    rows = [{**plain, "behavior": f"b{n}", "question": f"Tea {n}?", "response": f"Cup {n}"} for n in range(8)]
    rows += [{**row, "response": f"No cup {n}", "harmful": False} for n, row in enumerate(rows)]
    write(data / "jailbreakbench" / "responses.jsonl", "\n".join(map(json.dumps, rows)))
    tiny = ["--model=tiny-llava", "--detector=tiny-llama", "--detoxifier=tiny-llama", "--device=cpu"]
    arguments = ["bench", "safety", "--data", str(data), *tiny, "--max-tokens=3", "--labeled=2", "--limit=1"]
    arguments += [f"--set={name}" for name in ("mm-safetybench", "figstep", "xstest", "mme")]
    done = CliRunner().invoke(app, [*arguments, "--json", str(file), "--keep-answers", str(answers)])
    assert done.exit_code == 0, done.output
    document = read_document(file, "safety")
    assert document.complete and document.settings["images"] and document.settings["judges"] == ["keywords"]
    sets = {(row["set"], row["image"]) for row in document.rows}
    assert ("figstep", True) in sets and ("figstep", False) in sets and ("xstest, safe, held out", False) in sets
    assert {row["guard"] for row in document.rows} == {"off", "protector", "ecso"}
    assert {(one["judge"], one["image"]) for one in document.more["judges"]} == {
        ("keywords", False),
        ("the model itself", False),
        ("the model itself", True),
    }
    assert document.more["labeled_detectors"][0]["detector"] == "tiny-llama"
    assert all("added_ms" in row for row in document.rows)
    (rewritten,) = document.more["detoxified"]
    assert rewritten["n"] == 2 and rewritten["failed"] == 0 and rewritten["harmless"]["keywords"]["n"] == 2
    assert rewritten["originals"]["keywords"]["count"] == 0 and -1 <= rewritten["likeness"]["question_rewrite"] <= 1
    assert SECRET not in file.read_text() and SECRET not in done.stdout
    kept = [json.loads(line) for line in answers.read_text().splitlines()]
    assert len(kept) == sum(
        row["n"] for row in document.rows if row["scenario"] == "all" or _alone(row, document.rows)
    )
    again = CliRunner().invoke(app, [*arguments, "--json", str(file), "--resume"])
    assert again.exit_code == 0 and read_document(file).rows == document.rows
    titles = [table.title for table in tables(document)]
    assert titles[0].startswith("Safety and its price") and "Attacks that succeed, by set and scenario" in titles
    assert "Given harmful answers, rewritten by the detoxifier" in titles
    assert SECRET not in "".join(table.markdown() for table in tables(document))
    drawn = {one.name: one for one in pictures(document)}
    assert list(drawn) == ["safety-cost", "safety-mm-safetybench-text", "safety-mm-safetybench-image"]
    assert drawn["safety-mm-safetybench-text"].png()


def _alone(row: dict[str, Any], rows: list[dict[str, Any]]) -> bool:
    return len({one["scenario"] for one in rows if one["set"] == row["set"]}) == 1


def test_a_judge_that_is_the_guard_and_a_guard_without_detector_are_refused(data: Path) -> None:
    arguments = ["bench", "safety", "--data", str(data), "--model=tiny-llava"]
    same = CliRunner().invoke(app, [*arguments, "--detector=tiny-llama", "--judge=tiny-llama"])
    assert isinstance(same.exception, BadInput) and "another one" in str(same.exception)
    without = CliRunner().invoke(app, arguments)
    assert isinstance(without.exception, InvalidGuard)
    unknown = CliRunner().invoke(app, [*arguments, "--guard=ecso", "--judge=nobody", "--set=xstest", "--device=cpu"])
    assert isinstance(unknown.exception, BadInput) and "smol-judge" in str(unknown.exception)
    nameless = CliRunner().invoke(app, [*arguments, "--guard=ecso", "--judge=http://127.0.0.1:1/v1", "--set=xstest"])
    assert isinstance(nameless.exception, BadInput) and "--judge-model" in str(nameless.exception)
