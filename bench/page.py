"""Documents of measurements as one HTML page that needs nothing else: no network, no scripts; light and dark."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path

from .compare import Comparison, sorted_changes
from .document import BadDocument, Document, read_document
from .pictures import DARK, LIGHT, Picture, pictures
from .result_tables import ResultTable, provenance, tables

ORDER = (
    "capacity",
    "safety",
    "overhead",
    "throughput",
    "latency",
    "peers",
    "decode",
    "kernels",
    "roofline",
    "onnx",
    "training",
    "serve",
)
_WHAT = {
    "capacity": "What it takes to serve this",
    "safety": "What a guard prevents",
    "overhead": "What a guard costs",
    "throughput": "How much is served",
    "latency": "How long a request takes",
    "peers": "Beside other engines",
    "decode": "Decoding against transformers",
    "kernels": "Operations",
    "roofline": "What must be paid on paper",
    "onnx": "The exported detector",
    "training": "A training step",
    "serve": "The server",
}
_STYLE = """
:root{--text:#1f2328;--dim:#59636e;--back:#fff;--line:#d8dee4;--soft:#f6f8fa;--good:#1a7f37;--bad:#cf222e;--warn:#9a6700}
@media(prefers-color-scheme:dark){:root{--text:#e6edf3;--dim:#9198a1;--back:#0d1117;--line:#30363d;--soft:#161b22;
--good:#3fb950;--bad:#f85149;--warn:#d29922}}
*{box-sizing:border-box}body{margin:0 auto;max-width:1100px;padding:2rem 1.2rem;background:var(--back);
color:var(--text);font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
h1{font-size:1.7rem;margin:0 0 .3rem}h2{font-size:1.25rem;margin:2.4rem 0 .6rem;padding-top:.8rem;
border-top:1px solid var(--line)}h3{font-size:1rem;margin:1.4rem 0 .4rem}
p,li{max-width:80ch}.dim{color:var(--dim);font-size:.88rem}.answer{font-size:1.05rem;background:var(--soft);
border-left:4px solid #4c7fc9;padding:.7rem 1rem;border-radius:4px}.warning{color:var(--warn)}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:.86rem;font-variant-numeric:tabular-nums}
th,td{padding:.3rem .7rem;border-bottom:1px solid var(--line);text-align:left;vertical-align:top}
th{color:var(--dim);font-weight:600}td.number{text-align:right;white-space:nowrap}
tbody tr:hover{background:var(--soft)}
.better{color:var(--good);font-weight:600}.worse{color:var(--bad);font-weight:600}
img{max-width:100%;height:auto;margin:.4rem 0}code{font:.84rem ui-monospace,Menlo,Consolas,monospace;
background:var(--soft);padding:.1rem .3rem;border-radius:3px;overflow-wrap:anywhere}
details{margin:.5rem 0}summary{cursor:pointer;color:var(--dim)}nav a{margin-right:1rem;color:#4c7fc9}
"""


def read_folder(folder: Path) -> dict[str, Document]:
    """All documents in a folder, by the names of their files. Raises `BadDocument` for a folder without any, or a
    file `*.json` that is none."""
    if not folder.is_dir():
        raise BadDocument(f"{folder} is no folder of JSON documents of `stockade bench`")
    found = {file.stem: read_document(file) for file in sorted(folder.glob("*.json"))}
    if not found:
        raise BadDocument(f"{folder} has no *.json; a measurement writes one with --json FILE")
    order = {kind: number for number, kind in enumerate(ORDER)}
    return dict(sorted(found.items(), key=lambda item: (order.get(item[1].kind, len(order)), item[0])))


def page(
    documents: Mapping[str, Document], comparisons: Sequence[Comparison] = (), title: str = "stockade bench"
) -> str:
    """The whole page."""
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width,initial-scale=1">',
        '<meta name="color-scheme" content="light dark">',
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{escape(title)}</h1>",
        *_summary(documents),
        "<nav>",
        *(f'<a href="#{escape(name)}">{escape(name)}</a>' for name in documents),
        "</nav>",
        *_compared(comparisons),
    ]
    for name, document in documents.items():
        parts += _section(name, document)
    return "\n".join([*parts, "</body></html>", ""])


def _summary(documents: Mapping[str, Document]) -> Iterator[str]:
    machines = {provenance(document) for document in documents.values()}
    for line in sorted(machines):
        yield f'<p class="dim">{escape(line)}</p>'
    noisy = [name for name, document in documents.items() if document.warnings]
    if noisy:
        yield f'<p class="warning">Not quiet, hence off: {escape(", ".join(noisy))}; see there.</p>'
    for document in documents.values():
        answer = document.more.get("answer", [])
        if document.kind == "capacity" and answer:
            yield f'<p class="answer">{"<br>".join(escape(line) for line in answer)}</p>'


def _section(name: str, document: Document) -> Iterator[str]:
    yield f'<h2 id="{escape(name)}">{escape(_WHAT.get(document.kind, document.kind))}</h2>'
    yield f'<p class="dim"><code>{escape(document.command)}</code></p>'
    if not document.complete:
        yield '<p class="warning">Interrupted: not all of it was measured.</p>'
    for warning in document.warnings:
        yield f'<p class="warning">{escape(warning)}</p>'
    for picture in pictures(document):
        yield _image(picture)
    found = tables(document)
    for number, table in enumerate(found):
        whole = _table(table)
        # what is long stands behind a click, but never the first
        yield (
            whole
            if not number or len(table.rows) <= 12
            else f"<details><summary>{escape(table.title)}</summary>{whole}</details>"
        )
    yield _measured(document)


def _measured(document: Document) -> str:
    load = {"before": document.load_before, "during": document.load_during, "after": document.load_after}
    facts = {
        "kind": document.kind,
        "started": f"{document.started}, {document.took_s:,.0f} s",
        "commit": document.commit,
        "seed": document.seed,
        "quiet": document.quiet,
        "cores that others kept busy": ", ".join(f"{when} {value}" for when, value in load.items()),
        **{f"machine: {name}": value for name, value in document.machine.items()},
        **{f"version: {name}": value for name, value in document.versions.items()},
        **{f"setting: {name}": value for name, value in document.settings.items()},
    }
    rows = [(name, str(value)) for name, value in facts.items() if value is not None and value != []]
    return (
        "<details><summary>machine, versions, settings</summary>"
        + _table(ResultTable("", ("", ""), rows))
        + "</details>"
    )


def _compared(comparisons: Sequence[Comparison]) -> Iterator[str]:
    if not comparisons:
        return
    yield '<h2 id="changes">What changed</h2>'
    for comparison in comparisons:
        known = sorted_changes(comparison)
        beyond = sum(change.verdict in ("better", "worse") for change in known)
        yield f"<h3>{escape(comparison.kind)}: {beyond} of {len(known)} figures beyond noise</h3>"
        if comparison.differs:
            items = "".join(f"<li>{escape(line)}</li>" for line in comparison.differs)
            many = f"{len(comparison.differs)} differences of setting, machine or version"
            yield f'<details><summary>{many}</summary><ul class="dim">{items}</ul></details>'
        yield '<div class="scroll"><table><thead><tr>'
        yield "".join(
            f"<th>{escape(name)}</th>" for name in ("what", "then", "now", "now / then", "99 % interval", "")
        )
        yield "</tr></thead><tbody>"
        for change in known:
            interval = "" if change.low is None or change.high is None else f"{change.low:.3f} to {change.high:.3f}"
            cells = (f"{change.then:,.4g}", f"{change.now:,.4g}", f"{change.ratio:.3f}", interval)
            numbers = "".join(f'<td class="number">{escape(cell)}</td>' for cell in cells)
            verdict = f'<td class="{change.verdict}">{change.verdict}</td>'
            yield f"<tr><td>{escape(change.what)}</td>{numbers}{verdict}</tr>"
        yield "</tbody></table></div>"


def _table(table: ResultTable) -> str:
    classes = [' class="number"' if right else "" for right in table.right]
    head = "".join(f"<th>{escape(name)}</th>" for name in table.headings)
    body = ""
    for row in table.rows:
        cells = (f"<td{kind}>{escape(cell)}</td>" for cell, kind in zip(row, classes, strict=True))
        body += f"<tr>{''.join(cells)}</tr>"
    title = f"<h3>{escape(table.title)}</h3>" if table.title else ""
    note = f'<p class="dim">{escape(table.note)}</p>' if table.note else ""
    return (
        f'{title}<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>{note}'
    )


def _image(picture: Picture) -> str:
    light, dark = (base64.b64encode(picture.png(theme)).decode() for theme in (LIGHT, DARK))
    return (
        f'<picture><source srcset="data:image/png;base64,{dark}" media="(prefers-color-scheme: dark)">'
        f'<img alt="{escape(picture.title)}" src="data:image/png;base64,{light}"></picture>'
    )
