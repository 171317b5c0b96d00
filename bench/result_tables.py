"""Documents of measurements as tables of text: for a page, for the README. Nothing is computed anew."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from .document import Document, as_written


class ResultTable(NamedTuple):
    """All cells are text; numeric columns stand to the right. note: what to know when reading it."""

    title: str
    headings: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    note: str = ""

    @property
    def right(self) -> list[bool]:
        """Which columns stand to the right: numbers, but never the first."""
        return [index > 0 and all(_numeric(row[index]) for row in self.rows) for index in range(len(self.headings))]

    def markdown(self) -> str:
        """A table in Markdown, its note below."""
        lines = [self.headings, tuple("---:" if number else "---" for number in self.right), *self.rows]
        text = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
        return text + (f"\n\n{self.note}" if self.note else "")


def tables(document: Document) -> list[ResultTable]:
    """The tables of one document; of a kind that has none of its own, its rows as they are. Raises `BadDocument`."""
    with as_written(document):
        return [table for table in _KINDS.get(document.kind, _plain)(document) if table.rows]


def provenance(document: Document) -> str:
    """Where, when and with what it was measured, in one line."""
    machine, versions = document.machine, document.versions
    where = machine.get("accelerator") or f"{machine.get('processor')}, {machine.get('cores')} cores"
    known = ", ".join(f"{name} {version}" for name, version in versions.items())
    quiet = "" if document.quiet or not document.warnings else "; others used the machine meanwhile"
    return f"{where}; {known}; commit {document.commit or 'unknown'}; {document.started[:10]}{quiet}"


def _overhead(document: Document) -> Iterable[ResultTable]:
    variants: Mapping[str, Any] = document.more.get("variants", {})
    rows = []
    for name, paths in variants.items():
        harmless, harmful = paths.get("harmless"), paths.get("harmful")
        if harmless is None or name.startswith(("off", "transformers", "published", "detector-alone")):
            continue
        low, high = harmless["added_percent_interval"]
        lost = harmless.get("lost_throughput_percent")
        rows.append(
            (
                name,
                f"{harmless['added_percent']:.1f} % ({low:.1f} to {high:.1f})",
                _number(harmless["added_ms"]),
                f"{harmless['exposed_percent']:.1f} %",
                _maybe(harmless.get("published_added_ms")),
                "" if harmful is None else f"{harmful['total_ms'] / 1e3:.1f}",
                ""
                if harmful is None or "published_total_ms" not in harmful
                else f"{harmful['published_total_ms'] / 1e3:.1f} ({harmful['speedup_over_published']:.1f} x)",
                "" if lost is None else f"{lost['median']:.1f} ({lost['low']:.1f} to {lost['high']:.1f})",
            )
        )
    headings = (
        *("guard", "added, harmless answer (95 % interval)", "ms", "of it after the last token", "published adds ms"),
        *("harmful answer, whole reply s", "published s", "lost throughput %"),
    )
    yield ResultTable(f"What a guard costs: {_model(document)}", headings, rows)
    traffic: Mapping[str, Any] = document.more.get("mixed", {})
    mixed = [
        (
            name,
            str(one["n"]),
            *(
                f"{_number(one[key])} ({_number(one[f'{key}_interval'][0])} to {_number(one[f'{key}_interval'][1])})"
                for key in ("added_ms", "lost_throughput_percent")
            ),
        )
        for name, one in traffic.items()
    ]
    share = max((one["harmful_share"] for one in traffic.values()), default=0.0)
    title = f"On traffic with {100 * share:.3g} % harmful answers, many at once"
    yield ResultTable(title, ("guard", "n", "added ms a request (95 % interval)", "lost throughput %"), mixed)
    yield _targets(document)


def _targets(document: Document) -> ResultTable:
    goals = [
        (
            goal["what"],
            f"{'≤' if 'at_most' in goal else '≥'} {goal.get('at_most', goal.get('at_least')):g} {goal['unit']}",
            f"{goal['measured']:g}"
            + ("" if not goal["interval"] else f" ({goal['interval'][0]:g} to {goal['interval'][1]:g})"),
            ("yes" if goal["met"] else "no") + ("" if goal["certain"] else ", perhaps"),
        )
        for goal in document.more.get("targets", [])
    ]
    return ResultTable("Targets", ("what", "target", "measured (95 % interval)", "met"), goals)


def _decode(document: Document) -> Iterable[ResultTable]:
    rows = [
        (
            row["workload"],
            str(row["n"]),
            *(_number(row["tokens_per_s"][side]["median"]) for side in ("stockade", "transformers")),
            _interval(row["ratio"]),
        )
        for row in document.rows
    ]
    memory = document.more.get("memory", {})
    note = (
        f"Reading the weights allows {memory['tokens_per_second_at_batch_1']:.0f} tokens/s at batch 1."
        if memory
        else ""
    )
    headings = ("tokens/s", "n", "stockade", "`transformers`", "ratio (95 % interval)")
    yield ResultTable(f"Decoding and prefill: {_model(document)}", headings, rows, note)


def _training(document: Document) -> Iterable[ResultTable]:
    rows = [
        (str(row["n"]), *(_number(rate["median"]) for rate in row["tokens_per_s"].values()), _interval(row["ratio"]))
        for row in document.rows
    ]
    headings = ("n", *(side for row in document.rows[:1] for side in row["tokens_per_s"]), "ratio (95 % interval)")
    yield ResultTable(f"A detector's training step, tokens/s: {_model(document)}", headings, rows)
    yield _targets(document)


def _serve(document: Document) -> Iterable[ResultTable]:
    rows = [
        (
            row["way"],
            str(row["n"]),
            _number(row["tokens_per_s"]["median"]),
            "{median:.1f} ({low:.1f} to {high:.1f})".format(**row["lost_percent"]) if index else "",
        )
        for index, row in enumerate(document.rows)
    ]
    more = document.more
    notes = []
    if "health_ms" in more:
        notes.append("`/health` under load: {p50:.1f} ms, p99 {p99:.1f} ms.".format(**more["health_ms"]))
    if "idle_steps" in more:
        notes.append(f"Steps a second for {document.settings['idle']} idle streams: {more['idle_steps']}.")
    headings = ("", "n", "tokens/s", "lost % (95 % interval)")
    yield ResultTable(f"What the server costs: {_model(document)}", headings, rows, " ".join(notes))


def _peers(document: Document) -> Iterable[ResultTable]:
    names = ("first_token_ms", "per_token_ms", "answer_ms", "judge_ms", "score_ms")
    rows = [
        (
            f"{row['peer']} {row['version']}",
            *("not done" if row[name] is None else _number(row[name]["median"]) for name in names),
            row["same_as_first"],
        )
        for row in document.rows
    ]
    settings = document.settings
    title = f"{_model(document)}, {settings['threads']} threads, {settings['prompt_tokens']} tokens in, "
    headings = ("peer", "first token ms", "ms a token", "whole answer ms", "ECSO's judge adds ms")
    why = [
        f"{row['peer']}: no {what}, {reason}."
        for row in document.rows
        for what, reason in (row["not_done"] or {}).items()
    ]
    yield ResultTable(
        f"{title}{settings['answer_tokens']} out, n = {document.rows[0]['answer_ms']['n']}, medians",
        (*headings, "detector after it ms", "the same as the first one's"),
        rows,
        " ".join(why),
    )


def _onnx(document: Document) -> Iterable[ResultTable]:
    columns = [name for name in (document.rows or [{}])[0] if name not in ("batch", "tokens", "n", "ratios")]
    pairs = list((document.rows or [{"ratios": {}}])[0]["ratios"])
    rows = [
        (
            *(f"{row['batch']} x {row['tokens']}", str(row["n"]), *(_number(row[name]) for name in columns)),
            *(_interval(row["ratios"][pair]) for pair in pairs),
        )
        for row in document.rows
    ]
    headings = ("answers x tokens", "n", *columns, *pairs)
    yield ResultTable("One pass of the detector over answers, ms; ratios with 95 % intervals", headings, rows)
    for name in ("loading", "sidecar", "quality"):
        found = document.more.get(name)
        if isinstance(found, Mapping):
            yield ResultTable(name, ("", "value"), [(key, _cell(value)) for key, value in found.items()])
        elif found:
            yield _of_rows(name, found)


def _latency(document: Document) -> Iterable[ResultTable]:
    rows = []
    for row in document.rows:
        cells = (row[f"{name}_ms"] for name in ("ttft", "itl", "e2e", "guard"))
        rows.append(
            (
                row["guard"] + ("" if row["path"] == "harmless" else f", {row['path']}"),
                row["release"],
                f"{row['prompt_tokens']}, {row['images']}, {row['answer_tokens']}",
                str(row["n"]),
                *(f"{_number(cell['p50'])} ({_number(cell['p95'])}, {_number(cell['p99'])})" for cell in cells),
            )
        )
    headings = (
        *("guard", "release", "tokens in, images, out", "n"),
        *("first text ms: p50 (p95, p99)", "between tokens", "whole reply", "after the answer"),
    )
    yield ResultTable(f"Latency of one request at a time: {_model(document)}", headings, rows)


def _throughput(document: Document) -> Iterable[ResultTable]:
    knees = document.more.get("knees", {})
    rows = []
    for row in document.rows:
        load = f"{row['level']:g} at once" if row["loop"] == "closed" else f"{row['level']:.3g}/s"
        if row["loop"] == "closed" and knees.get(row["guard"], {}).get("level") == row["level"]:
            load += " (knee)"
        rows.append(
            (
                row["guard"],
                load,
                f"{row['n']} ({row['rounds']})",
                f"{row['requests_per_s']:.2f} ({_between(row, 'requests_per_s')})",
                _number(row["tokens_per_s"]),
                f"{row['goodput_per_s']:.2f}",
                *(
                    f"{_number(row[f'{name}_ms']['p50'])} ({_number(row[f'{name}_ms']['p95'])})"
                    for name in ("ttft", "itl", "e2e")
                ),
                _between(row, "e2e_ms"),
                f"{row['prefix_hit_percent']:.0f}",
            )
        )
    headings = (
        *(
            "guard",
            "load",
            "n (rounds)",
            "req/s (rounds)",
            "tok/s",
            "good/s",
            "first text ms: p50 (p95)",
            "between tokens",
            "whole reply",
        ),
        *("its p50 by round", "prefix hits %"),
    )
    yield ResultTable(f"Throughput: {_model(document)}", headings, rows)


def _between(row: Mapping[str, Any], name: str) -> str:
    """The slowest and the fastest round."""
    rounds = row["between_rounds"][name]
    return f"{_number(rounds['low'])} to {_number(rounds['high'])}"


def _capacity(document: Document) -> Iterable[ResultTable]:
    rows = [
        (
            row["guard"],
            row["placement"],
            f"{row['devices']:,}",
            f"{row['price_per_hour']:,.2f}",
            "" if row["work_over_unguarded"] is None else f"{row['work_over_unguarded']:.2f}",
            f"{row['most_requests_per_s_of_a_replica']:.3g}",
            *(
                f"{row[name]:.3g}"
                for name in ("alone_s", "alone_harmful_s", "e2e_p50_s", "e2e_p95_s", "e2e_p95_routed_s")
            ),
            f"{100 * row['objective_met']:.1f}",
        )
        for row in document.rows
        if row["replicas"] is not None
    ]
    headings = (
        *("guard", "placement", "devices", "price an hour", "work x unguarded", "req/s each"),
        *("alone s", "harmful s", "p50 s", "p95 s", "p95 routed s", "objective met %"),
    )
    note = " ".join(document.more.get("answer", []))
    yield ResultTable(f"Capacity, simulated; {document.settings['costs']}", headings, rows, note)
    yield ResultTable("Assumed", ("",), [(text,) for text in document.more.get("assumed", [])])
    fit = document.more.get("fit", {})
    columns = tuple(next(iter(fit.values()), {}))
    yield ResultTable(
        "Costs of a step, fitted",
        ("lane", *columns),
        [(lane, *(_cell(found[name]) for name in columns)) for lane, found in fit.items()],
    )


def _roofline(document: Document) -> Iterable[ResultTable]:
    for name, found in document.more.get("predicted", {}).items():
        rows = [
            (
                guard,
                *(f"{cost[key]:,.2f}" for key in ("added_ms", "added_percent", "exposed_ms", "published_added_ms")),
            )
            for guard, cost in found["variants"].items()
        ]
        prefill, step, reply = (found[f"{part}_ms"] for part in ("prefill", "step", "reply"))
        note = f"Prefill {prefill:.2f} ms, a step {step:.2f} ms, reply {reply:.1f} ms."
        headings = ("guard", "added ms", "%", "exposed ms", "published adds ms")
        yield ResultTable(f"Predicted, not measured: {name}", headings, rows, note)


def _plain(document: Document) -> Iterable[ResultTable]:
    yield _of_rows(f"{document.kind}: {_model(document)}", document.rows)
    for name, found in document.more.items():
        if isinstance(found, Mapping) and found and not any(isinstance(one, list) for one in found.values()):
            yield ResultTable(name, ("", "value"), [(key, _cell(value)) for key, value in found.items()])
        elif isinstance(found, list) and found and all(isinstance(one, Mapping) for one in found):
            yield _of_rows(name, found)


def _of_rows(title: str, rows: Sequence[Mapping[str, Any]]) -> ResultTable:
    names = tuple(dict.fromkeys(name for row in rows for name in row))
    return ResultTable(title, names, [tuple(_cell(row.get(name)) for name in names) for row in rows])


def _safety(document: Document) -> Iterable[ResultTable]:
    from .safety.shown import safety_tables

    return safety_tables(document)


_KINDS: dict[str, Callable[[Document], Iterable[ResultTable]]] = {
    "overhead": _overhead,
    "decode": _decode,
    "serve": _serve,
    "peers": _peers,
    "onnx": _onnx,
    "training": _training,
    "latency": _latency,
    "throughput": _throughput,
    "capacity": _capacity,
    "roofline": _roofline,
    "safety": _safety,
}


def _model(document: Document) -> str:
    return " ".join(str(document.settings[name]) for name in ("model", "dtype") if name in document.settings)


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, Mapping):
        middle = value.get("median", value.get("p50"))
        ends = [value[name] for name in ("low", "high", "p10", "p90", "p95", "p99") if name in value]
        if middle is not None:
            return _number(middle) + (f" ({', '.join(_number(end) for end in ends)})" if ends else "")
        return ", ".join(f"{name} {_cell(one)}" for name, one in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_cell(one) for one in value)
    return _number(value) if isinstance(value, int | float) and not isinstance(value, bool) else str(value)


def _interval(ratio: Mapping[str, float]) -> str:
    return f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"


def _maybe(value: float | None) -> str:
    return "" if value is None else _number(value)


def _number(value: float) -> str:
    """Three digits, or all before the point."""
    if isinstance(value, int) or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}" if abs(value) >= 1 else f"{value:.3g}"


def _numeric(cell: str) -> bool:
    return not cell or cell.lstrip("-+≤≥ ")[:1].isdigit()
