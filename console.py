"""How replies look in a terminal: passes with their verdicts, outcomes, tables. Prints nothing by itself.

Texts of models and users are shown as text: no markup, no terminal control sequences.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from .engine.request import Outcome, PassRecord, Reply, Verdict

if TYPE_CHECKING:
    from .bench.demo import Results
    from .doctor import Fact

OUTCOME_STYLES = {
    Outcome.CLEAN: "green",
    Outcome.MENDED: "yellow",
    Outcome.REFUSED: "red",
    Outcome.UNGUARDED: "blue",
}
PASS_NAMES = {
    "answer": "answer",
    "score": "detector reads it",
    "judge": "model judges itself",
    "caption": "caption",
    "rewrite": "rewritten",
    "eyes_closed": "asked again",
}
GUARDS_SAID = {
    "off": "no guard: the model's answer goes out as it is",
    "protector": "a detector scores the answer; a detoxifier rewrites a harmful one, up to 3 times (MLLM-Protector)",
    "ecso": "the model judges its own answer; a harmful one is asked for again, as a harmless one (ECSO)",
}


def error_console() -> Console:
    return Console(stderr=True, highlight=False)


def printable(text: str) -> str:
    """The text without what a terminal would obey: control characters other than line ends become U+FFFD."""
    return "".join(char if char.isprintable() or char == "\n" else " " if char == "\t" else "\ufffd" for char in text)


def quoted(text: str, style: str = "") -> Text:
    return Text(printable(text.strip()) or "(empty)", style=style or ("" if text.strip() else "dim"))


def verdict_text(verdict: Verdict) -> Text:
    """`harmful 0.03 < 0.50`, or why there is no score."""
    if verdict.error is not None:
        return Text(f"harmful: no verdict ({printable(verdict.error)})", style="red")
    word, sign, style = ("harmless", "≥", "green") if verdict.harmless else ("harmful", "<", "red")
    return Text(f"{word}: {verdict.score:.2f} {sign} {verdict.threshold:.2f}", style=style)


def outcome_text(outcome: Outcome) -> Text:
    return Text(outcome.value, style=OUTCOME_STYLES[outcome])


def reply_line(reply: Reply) -> Text:
    """One line on how a reply came about: outcome, time, verdicts."""
    line = Text.assemble(outcome_text(reply.outcome), f"  {reply.trace.total:.1f} s")
    for verdict in reply.verdicts:
        line.append("  ").append_text(verdict_text(verdict))
    if reply.error is not None and not reply.verdicts:
        line.append(f"  {printable(reply.error)}")
    return line


def question_panel(title: str, question: str, replies: Mapping[str, Reply]) -> Panel:
    """One question under several guards, by name: every pass, its text and its verdict.

    A text that stood above already is not printed again.
    """
    seen: set[str] = set()
    parts: list[RenderableType] = [quoted(question, "bold"), Text()]
    for name, reply in replies.items():
        head = Text.assemble(
            (f"{name:<10}", "bold magenta"), outcome_text(reply.outcome), f"  {reply.trace.total:.2f} s"
        )
        parts.append(head)
        parts += [_pass(record, seen) for record in reply.passes]
        if reply.outcome is Outcome.REFUSED:
            parts.append(_indented(Text.assemble(("said instead: ", "dim"), quoted(reply.text))))
    return Panel(Group(*parts), title=Text(title), title_align="left", border_style="dim")


def _pass(record: PassRecord, seen: set[str]) -> RenderableType:
    name = PASS_NAMES.get(record.label, record.label)
    line = Text.assemble((name, "cyan"), (f"  {record.seconds:.2f} s", "dim"))
    if record.error is not None:
        line.append(f"  failed: {printable(record.error)}", style="red")
    if record.verdict is not None:
        line.append("  → ").append_text(verdict_text(record.verdict))
    if not record.text:
        return _indented(line)
    if record.text in seen:
        line.append("  (same text as above)", style="dim")
        return _indented(line)
    seen.add(record.text)
    text = quoted(record.text)
    if record.finish_reason == "length":
        text.append(" … (cut: no tokens left)", style="dim")
    return _indented(Group(line, Padding(text, (0, 0, 0, 2))))


def _indented(item: RenderableType) -> Padding:
    return Padding(item, (0, 0, 0, 2))


# Tables.


def plain_table(title: str, columns: Sequence[str], right: Sequence[str] = (), caption: str | None = None) -> Table:
    """A table without rows yet; the columns named in `right` hold numbers."""
    table = Table(title=title, title_justify="left", title_style="bold", caption=caption, caption_justify="left")
    table.box = box.SIMPLE_HEAD
    for name in columns:
        table.add_column(name, justify="right" if name in right else "left", overflow="fold")
    return table


def facts_table(title: str, facts: Sequence[Fact]) -> Table:
    """The doctor's facts, each with a mark; what is missing with the way to get it."""
    marks = {"ok": Text("ok", "green"), "note": Text("-", "yellow"), "missing": Text("missing", "red")}
    table = plain_table(title, ["", "", ""])
    table.show_header = False
    for fact in facts:
        text = fact.text if fact.remedy is None else f"{fact.text}\n{fact.remedy}"
        table.add_row(marks[fact.status], fact.topic, Text(text))
    return table


# The demo.


def introduction(model: str, questions: int, guards: Sequence[str]) -> Group:
    """What somebody who sees the demo for the first time has to know."""
    who = "SmolLM2-135M-Instruct, small and often wrong" if model == "smol" else printable(model)
    text = (
        f"{questions} questions, each answered under {len(guards)} settings. Model: {who}. A guard scores every "
        "answer: the probability that it is harmless. An answer below the threshold is mended; when that fails, a "
        "fixed refusal goes out instead."
    )
    about = Table.grid(padding=(0, 2))
    for name in guards:
        about.add_row(
            "", Text(name, "bold"), GUARDS_SAID.get(name, "a guard model reads the answer and says its verdict")
        )
    return Group(Text("stockade demo", "bold"), Text(text), Text(), about, Text())


def outcomes_table(results: Results) -> Table:
    """What went out, question by question, and how often."""
    table = plain_table("What went out", ["question", *results.guards])
    for item in results.answered:
        cells = [outcome_text(reply.outcome) for reply in item.replies.values()]
        table.add_row(Text(printable(item.question.title)), *cells)
    table.add_section()
    for outcome in Outcome:
        table.add_row(Text(outcome.value, "bold"), *(str(results.count(guard, outcome)) for guard in results.guards))
    return table


def costs_table(results: Results, baseline: str, device: str) -> Table:
    """What the guards cost; `baseline` is the name of the unguarded run."""
    note = (
        f"Medians over n replies on {device}, one request at a time. added: from the end of the first answer to the "
        f"reply; added %: of the same question's reply under {baseline}."
    )
    numbers = ["n", "whole reply", "added", "added %"]
    table = plain_table("Added latency", ["guard", "answers that were", *numbers], right=numbers, caption=note)
    for cost in results.costs(baseline):
        seconds, added, percent = f"{cost.seconds:.2f} s", f"{cost.added_ms:.0f} ms", f"{cost.added_percent:.1f} %"
        table.add_row(cost.guard, cost.path, str(cost.n), seconds, added, percent)
    return table
