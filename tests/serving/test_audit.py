"""The audit log: every decision is in it before its reply leaves, and no line goes missing or changes unseen."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from stockade.cli import app
from stockade.engine.chat import Chat
from stockade.engine.errors import AuditBroken, AuditFailed, BadInput
from stockade.engine.models.loader import ModelSet
from stockade.engine.serving.audit import AuditLog, read_key, verify
from tests.engine.screened import engine_of
from tests.serving.live import Live, chat, serving

KEY = bytes(range(32))


def written(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_bytes().splitlines()]


def a_log(file: Path, *texts: str) -> list[bytes]:
    log = AuditLog(file, KEY)
    for text in texts:
        log.write("decision", **log.said("released", text))
    log.close()
    return file.read_bytes().splitlines(keepends=True)


def test_a_log_that_nobody_touched_verifies_and_goes_on_after_a_restart(tmp_path: Path) -> None:
    file = tmp_path / "log"
    a_log(file, "one", "two\nlines", "\ud800 \u2028 three")
    found = verify(a_log(file, "four"), KEY)
    assert (found.lines, found.decisions, found.closed) == (8, 4, True)
    assert [line["event"] for line in written(file)] == [
        "open",
        *["decision"] * 3,
        "close",
        "open",
        "decision",
        "close",
    ]
    assert oct(file.stat().st_mode)[-3:] == "600"


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_line_that_is_missing_moved_added_or_altered_shows(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    lines = a_log(tmp_path_factory.mktemp("log") / "log", "one", "two", "three")
    at, other = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 4))
    how = data.draw(st.sampled_from(["drop", "swap", "repeat", "flip", "forge"]))
    changed = list(lines)
    if how == "drop":
        del changed[at]
    elif how == "swap" and at != other:
        changed[at], changed[other] = changed[other], changed[at]
    elif how == "repeat":
        changed.insert(other, changed[at])
    elif how == "flip":
        place = data.draw(st.integers(0, len(lines[at]) - 2))
        changed[at] = lines[at][:place] + bytes([lines[at][place] ^ 1]) + lines[at][place + 1 :]
    else:
        line = json.loads(lines[at])
        line["event"] = "forged"
        changed[at] = json.dumps(line).encode() + b"\n"
    if changed != lines:
        with pytest.raises(AuditBroken):
            verify(changed, KEY)


def test_lines_missing_at_the_end_show_by_what_is_not_closed_and_by_the_last_value(tmp_path: Path) -> None:
    lines = a_log(tmp_path / "log", "one", "two")
    last = verify(lines, KEY).last
    assert not verify(lines[:-1], KEY).closed
    with pytest.raises(AuditBroken, match="ends with another line"):
        verify(lines[:-1], KEY, last)
    with pytest.raises(AuditBroken):
        verify([*lines[:-1], lines[-1][:-9]], KEY)
    with pytest.raises(AuditBroken):
        verify(lines, bytes(32))


def test_a_log_whose_end_is_damaged_is_not_written_on(tmp_path: Path) -> None:
    file = tmp_path / "log"
    whole = b"".join(a_log(file, "one"))
    for damaged in (whole[:-5], whole + b"{}\n", whole + b"[" * 5000 + b"\n", whole.replace(b'"close"', b'"clone"')):
        file.write_bytes(damaged)
        with pytest.raises(AuditBroken, match="verify"):
            AuditLog(file, KEY)
    file.write_bytes(whole)
    with pytest.raises(AuditBroken):
        AuditLog(file, bytes(32))


def test_two_processes_do_not_write_one_log(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "log", KEY)
    with pytest.raises(BadInput, match="another process"):
        AuditLog(tmp_path / "log", KEY)
    log.close()


def test_a_log_that_cannot_be_written_fails_for_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = AuditLog(tmp_path / "log", KEY)
    monkeypatch.setattr(os, "write", lambda fd, data: len(data) - 1)
    with pytest.raises(AuditFailed):
        log.write("decision")
    monkeypatch.undo()
    assert not log.writable
    with pytest.raises(AuditFailed):
        log.write("decision")
    log.close()


def test_texts_and_images_are_hashes_that_only_the_key_makes(tmp_path: Path) -> None:
    log, other = AuditLog(tmp_path / "one", KEY), AuditLog(tmp_path / "two", bytes(32))
    talk = Chat.single("a secret question")
    assert log.asked(talk) == log.asked(talk) != other.asked(talk)
    assert "secret" not in json.dumps(log.asked(talk))
    assert log.hashed("a") != log.hashed("b")
    log.close()
    other.close()
    told = AuditLog(tmp_path / "three", KEY, texts=True)
    assert "secret" in json.dumps(told.asked(talk))
    told.close()


def test_a_key_is_made_once_and_for_its_owner_only(tmp_path: Path) -> None:
    file = tmp_path / "key"
    with pytest.raises(BadInput):
        read_key(file)
    key = read_key(file, create=True)
    assert key == read_key(file, create=True) and len(key) == 32
    assert oct(file.stat().st_mode)[-3:] == "600"
    file.write_text("abc")
    with pytest.raises(BadInput):
        read_key(file)


def test_every_reply_of_a_server_is_in_its_log_with_who_decided(models: ModelSet, tmp_path: Path) -> None:
    file = tmp_path / "audit.jsonl"
    with serving(engine_of(models, 200), audit=file) as live, live.client() as client:
        for policy in ("harmless", "harmful", "ecso", "off"):
            said = client.post("/v1/chat/completions", json=chat("a secret question", guard={"policy": policy}))
            last = written(file)[-1]  # written before the reply left
            assert last["event"] == "decision" and last["request"] == said.json()["id"]
            assert last["outcome"] == said.json()["guard"]["outcome"] and last["policy"] == policy
        turns = chat(guard={"policy": "turns", "release": "window"}, max_tokens=40, stream=True)
        client.post("/v1/chat/completions", json=turns)
        client.post("/v1/moderations", json={"input": ["a secret text"]})
        client.post("/v1/chat/completions", json=chat(timeout=0.01, max_tokens=64))
    lines = written(file)
    events = [line["event"] for line in lines]
    assert events == ["open", *["decision"] * 4, "release", "decision", "decision", "failure", "close"]
    assert [line.get("decided_by") for line in lines[1:5]] == ["harm_head", "harm_head", "self_judge", "policy"]
    assert len({line["query"] for line in lines[1:5]}) == 1
    assert lines[6]["replaced_characters"] > 0 and lines[8]["error"] == "DeadlineExceeded"
    assert "secret" not in file.read_text()
    done = CliRunner().invoke(app, ["audit", "verify", str(file)])
    assert done.exit_code == 0 and "10 lines, 6 decisions, all in place; closed" in done.stdout
    text = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(text[:3] + text[4:]))
    broken = CliRunner().invoke(app, ["audit", "verify", str(file)])
    assert isinstance(broken.exception, AuditBroken) and "line 4" in str(broken.exception)


def test_nothing_leaves_where_the_log_cannot_be_written(
    models: ModelSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(live: Live, **body: Any) -> str:
        with live.client() as client:
            response = client.post("/v1/chat/completions", json=chat(max_tokens=40, **body))
            assert response.status_code == (200 if body else 503)
            assert client.get("/ready").status_code == 503 and client.get("/health").status_code == 200
        return response.text

    with serving(engine_of(models, 200), audit=tmp_path / "log") as live:
        write = os.write
        monkeypatch.setattr(os, "write", lambda fd, data: -1 if data[:1] == b"{" else write(fd, data))
        for release in ("verdict", "window", "audit"):
            said = fail(live, stream=True, guard={"release": release})
            pieces = [json.loads(line[6:]) for line in said.splitlines() if line.startswith("data: ")]
            assert pieces[-1]["error"]["code"] == "audit_failed"
            assert not any(c["delta"]["content"] for piece in pieces[:-1] for c in piece["choices"])
        assert "audit_failed" in fail(live)
        monkeypatch.undo()
