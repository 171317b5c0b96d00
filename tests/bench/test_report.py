"""Pages, pictures, comparisons and the README's tables, made from documents."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from stockade.bench.commands import app
from stockade.bench.compare import compare, sorted_changes
from stockade.bench.document import BadDocument, Document
from stockade.bench.page import page, read_folder
from stockade.bench.pictures import DARK, pictures
from stockade.bench.readme import filled, write_readme
from stockade.bench.result_tables import ResultTable, tables

ROOT = Path(__file__).parents[2]
CELL = {"prompt_tokens": 16, "images": 0, "answer_tokens": 8, "path": "harmless", "release": "live"}


def document(kind: str, **fields: Any) -> Document:
    known: dict[str, Any] = {
        "kind": kind,
        "settings": {"model": "tiny", "dtype": "bfloat16"},
        "rows": [],
        "machine": {"processor": "a <b>fast</b> one", "cores": 2, "accelerator": None},
        "versions": {"stockade": "0.1.0"},
        "commit": "0123456789ab",
        "command": f"stockade bench {kind} --json x.json",
        "started": "2026-01-02T03:04:05+00:00",
        "took_s": 2.0,
        **dict.fromkeys(("load_before", "load_during", "load_after"), 0.0),
        "quiet": True,
    }
    return Document(**{**known, **fields})


def latencies(factor: float = 1.0, seed: int = 0, rounds: int = 40) -> Document:
    from stockade.bench.latency import Cell

    spread = {"n": rounds, "min": 1.0, "p50": 2.0, "p90": 3.0, "p95": 4.0, "p99": 5.0, "max": 6.0}
    rows = [
        {**CELL, "guard": guard, "n": rounds, **{f"{name}_ms": spread for name in ("ttft", "itl", "e2e", "guard")}}
        for guard in ("off", "ecso")
    ]
    names = {guard: Cell(**{**CELL, "guard": guard}).name for guard in ("off", "ecso")}
    random = np.random.default_rng(seed)
    units = {
        f"round {number}": {
            names["off"]: {"ttft": 0.01, "e2e": float(random.normal(0.10, 0.004))},
            names["ecso"]: {"ttft": 0.11, "e2e": float(random.normal(0.11, 0.004)) * factor},
        }
        for number in range(rounds)
    }
    return document("latency", rows=rows, units=units)


def decoding(rate: float = 60.0) -> Document:
    def side(value: float) -> dict[str, float]:
        return {"n": 3, "median": value, "p10": value - 1, "p90": value + 1}

    rates = {"stockade": side(rate), "transformers": side(20.0)}
    ratio = {
        "n": 3,
        "median": rate / 20.0,
        "low": rate / 20.0 - 0.1,
        "high": rate / 20.0 + 0.1,
        "within_percent": 3.0,
    }
    row = {"workload": "batch 1", "n": 3, "tokens_per_s": rates, "ratio": ratio}
    return document("decode", rows=[row], more={"memory": {"tokens_per_second_at_batch_1": 71.0}})


def capacity() -> Document:
    rows: list[dict[str, Any]] = [
        {
            "guard": guard,
            "placement": "same",
            "replicas": devices,
            "devices": devices,
            "price_per_hour": 2.0 * devices,
            "work_over_unguarded": devices / 4,
            "most_requests_per_s_of_a_replica": 20 / devices,
            **dict.fromkeys(("alone_s", "alone_harmful_s", "e2e_p50_s", "e2e_p95_s", "e2e_p95_routed_s"), 1.5),
            "objective_met": 0.97,
        }
        for guard, devices in (("off", 4), ("ecso", 9))
    ]
    rows.append({"guard": "probe", "placement": "same", "replicas": None, "refused": "too slow"})
    settings = {"costs": "made up", "rate": 20.0, "harmful": 0.05}
    answer = ["20 requests/s take 4 devices.", "ecso takes 9 devices."]
    return document("capacity", rows=rows, settings=settings, more={"answer": answer, "assumed": ["nothing"]})


class Links(HTMLParser):
    """Everything that a page would load, and whether every tag is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loaded += [value or "" for name, value in attrs if name in ("src", "srcset", "href")]
        assert tag != "script"
        if tag not in ("meta", "img", "br", "source", "!doctype"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_a_page_needs_nothing_from_elsewhere_and_escapes_what_it_shows():
    pytest.importorskip("matplotlib")
    noisy = replace(latencies(), warnings=["others kept 1.5 of 2 cores busy"], quiet=False)
    text = page(
        {"capacity": capacity(), "latency": noisy, "decode": decoding()}, [compare(latencies(), latencies(1.5))]
    )
    links = Links()
    links.feed(text)
    assert not links.open
    assert all(link.startswith(("data:image/png;base64,", "#")) for link in links.loaded)
    assert sum(link.startswith("data:") for link in links.loaded) == 2 * 4  # light and dark
    assert "<b>fast" not in text and "a &lt;b&gt;fast&lt;/b&gt; one" in text
    assert "others kept 1.5 of 2 cores busy" in text
    assert "ecso takes 9 devices." in text
    assert "prefers-color-scheme" in text


def test_the_same_figures_make_the_same_picture_and_others_another():
    pytest.importorskip("matplotlib")
    (one,), (same,), (other,) = (pictures(decoding(rate)) for rate in (60.0, 60.0, 90.0))
    assert one.png() == same.png() != other.png()
    assert one.png(DARK) != one.png()
    assert one.png()[:4] == b"\x89PNG"


def test_tables_of_known_kinds_have_headings_and_those_of_others_their_rows_as_they_are():
    (table,) = tables(decoding())
    assert table.markdown().splitlines()[2] == "| batch 1 | 3 | 60.0 | 20.0 | 3.00 (2.90 to 3.10) |"
    assert table.markdown().splitlines()[1] == "| --- | ---: | ---: | ---: | ---: |"
    plain = document("novel", rows=[{"what": "a|b", "ms": {"median": 1.5, "low": 1.0, "high": 2.0}}, {"n": 3}])
    (table,) = tables(plain)
    assert table.headings == ("what", "ms", "n")
    assert "| a\\|b | 1.50 (1.00, 2.00) |  |" in table.markdown()
    assert len(tables(capacity())[0].rows) == 2  # what cannot hold the objective has no figures


def test_a_comparison_tells_change_from_noise():
    then, same, slower = latencies(seed=1), latencies(seed=2), latencies(1.1, seed=3)
    verdicts = {change.what: change.verdict for change in compare(then, same).changes}
    assert set(verdicts.values()) == {"within noise"}
    changed = [change for change in sorted_changes(compare(then, slower)) if change.verdict != "within noise"]
    assert [change.verdict for change in changed] == ["worse"]
    assert "ecso" in changed[0].what and changed[0].ratio == pytest.approx(1.1, rel=0.03)
    assert changed[0].low is not None and changed[0].low > 1.0


def test_single_figures_changed_where_their_intervals_lie_apart():
    for rate, verdict in ((60.5, "within noise"), (90.0, "better"), (30.0, "worse")):
        found = {change.what: change.verdict for change in compare(decoding(), decoding(rate)).changes}
        assert found["batch 1, stockade: tokens/s"] == verdict
        assert found["batch 1, transformers: tokens/s"] == "within noise"
        assert found["batch 1: times as fast"] == verdict


def test_a_comparison_says_what_else_was_different():
    other = replace(decoding(), commit="fff", machine={**decoding().machine, "cores": 4})
    assert compare(decoding(), other).differs == ["machine.cores: 2 → 4", "commit: 0123456789ab → fff"]


def test_the_readme_is_filled_between_its_markers_only():
    text = "before\n<!-- bench: decode 0 -->\nold\n<!-- /bench -->\nafter\n"
    done = filled(text, {"decode": decoding()})
    assert done.startswith("before\n<!-- bench: decode 0 -->\n`stockade bench decode`: a <b>fast</b> one, 2 cores;")
    assert done.endswith("at batch 1.\n<!-- /bench -->\nafter\n")
    assert "old" not in done and filled(done, {"decode": decoding()}) == done
    with pytest.raises(BadDocument, match="'decode'"):
        filled(text, {})
    with pytest.raises(BadDocument, match="number 7"):
        filled(text.replace("decode 0", "decode 7"), {"decode": decoding()})


@pytest.mark.parametrize("file", ["README.md", "bench/results/README.md"])
def test_pages_of_this_repository_show_what_its_results_say(file: str):
    text = (ROOT / file).read_text(encoding="utf-8")
    results = ROOT / "bench" / "results"
    shown = re.findall(r"<!-- bench: ([\w.-]+)", text)
    documents = read_folder(results) if results.is_dir() else {}
    assert set(shown) <= set(documents)
    assert filled(text, documents) == text


def test_the_command_writes_page_pictures_and_readme_and_refuses_other_folders(tmp_path: Path):
    pytest.importorskip("matplotlib")
    results, before, empty = (tmp_path / name for name in ("results", "before", "empty"))
    for folder in (results, before, empty):
        folder.mkdir()
    decoding(90.0).write(results / "decode.json")
    decoding().write(before / "decode.json")
    readme = tmp_path / "README.md"
    readme.write_text("<!-- bench: decode -->\n<!-- /bench -->\n![fast](results/bench-decode-decode.png)\n")

    def run(*arguments: str) -> str:
        done = CliRunner().invoke(app, ["report", *arguments], catch_exceptions=False)
        assert done.exit_code == 0
        return done.output

    told = run(str(results), "--against", str(before), "--png", str(tmp_path / "png"))
    assert "+50.0 %" in told and "better" in told
    assert "What changed" in (results / "report.html").read_text()
    assert (tmp_path / "png" / "decode-decode.png").exists()
    assert "| batch 1 | 3 | 90.0 |" in run(str(results), "--markdown", "--readme", str(readme))
    assert "| batch 1 | 3 | 90.0 |" in readme.read_text()
    assert (results / "bench-decode-decode.png").exists()
    for wrong in ([str(empty)], [str(tmp_path / "nowhere")], [str(results), "--against", str(empty)]):
        with pytest.raises(BadDocument):
            run(*wrong)
    (empty / "x.json").write_text("{}")
    with pytest.raises(BadDocument, match="JSON document"):
        run(str(empty))


def test_only_pictures_that_a_readme_shows_are_made(tmp_path: Path):
    pytest.importorskip("matplotlib")
    readme = tmp_path / "README.md"
    text = "![a](bench-run-capacity.png) ![b](elsewhere/bench.png) [c](bench-run-capacity-price.png)\n"
    readme.write_text(text)
    assert write_readme(readme, {"run": capacity()}) == [tmp_path / "bench-run-capacity.png"]
    assert readme.read_text() == text
    with pytest.raises(BadDocument, match=r"shows bench-run-capacity\.png; there are bench-other"):
        write_readme(readme, {"other": capacity()})


def test_a_table_never_breaks_out_of_its_cells():
    table = ResultTable("<i>", ("a", "b"), [("<script>", "1 | 2")])
    assert "<script>" not in page({"x": document("novel", rows=[{"a": "<script>"}])})
    assert table.markdown().splitlines()[-1] == "| <script> | 1 \\| 2 |"
