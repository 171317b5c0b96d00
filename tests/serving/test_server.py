"""The server as its clients see it: OpenAI's own client and plain HTTP, streamed and whole, guarded either way."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

from stockade.engine.models.loader import ModelSet
from stockade.engine.serving import exchange
from stockade.engine.serving.policy import Policy
from tests.engine.screened import assert_empty, engine_of
from tests.serving.live import GUARDS, HARMFUL, Live, chat, data_url, picture, serving


def events(live: Live, path: str, body: dict[str, Any]) -> list[Any]:
    with live.client() as client, client.stream("POST", path, json={**body, "stream": True}) as response:
        assert response.status_code == 200, response.read()
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line.startswith("data: ")]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line[6:]) for line in lines[:-1]]


def shown(chunks: list[Any], what: str = "content") -> str:
    return "".join(c["choices"][0]["delta"][what] or "" for c in chunks if c["choices"])


def ask(live: Live, body: dict[str, Any], path: str = "/v1/chat/completions") -> Any:
    with live.client() as client:
        response = client.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


def refused(live: Live, body: Any, status: int, code: str, path: str = "/v1/chat/completions") -> str:
    with live.client() as client:
        response = client.post(path, json=body)
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (status, code), error
    assert set(error) == {"message", "type", "param", "code"}
    return str(error["message"])


def test_openai_s_client_talks_streams_and_moderates(live: Live) -> None:
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="whatever", max_retries=0) as client:
        asked: list[Any] = [{"role": "user", "content": "Hi"}]
        whole = client.chat.completions.create(model="tiny", messages=asked, max_tokens=12, temperature=0)
        assert whole.choices[0].finish_reason in ("stop", "length") and whole.choices[0].message.content is not None
        assert whole.usage is not None and whole.usage.prompt_tokens > 0
        assert whole.model_extra is not None and whole.model_extra["guard"]["outcome"] == "clean"
        pieces = client.chat.completions.create(
            model="tiny",
            messages=asked,
            max_tokens=12,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"guard": {"policy": "harmless", "release": "window"}},
        )
        chunks = list(pieces)
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        assert text == whole.choices[0].message.content
        assert chunks[-1].usage is not None and chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens
        assert [model.id for model in client.models.list()] == ["tiny"]
        assert client.models.retrieve("tiny").id == "tiny"
        judged = client.moderations.create(input=["one text", "another"])
        assert len(judged.results) == 2
        said = client.completions.create(model="tiny", prompt="Once upon", max_tokens=5, temperature=0)
        assert said.choices[0].text is not None
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(model="../../etc/passwd", messages=asked)
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(model="tiny", messages=[])


@pytest.mark.parametrize("policy", list(GUARDS))
def test_a_stream_gives_what_the_whole_reply_gives(live: Live, policy: str) -> None:
    body = chat("What is this?", guard={"policy": policy})
    whole = ask(live, body)
    chunks = events(live, "/v1/chat/completions", body)
    message, choice = whole["choices"][0]["message"], whole["choices"][0]
    assert shown(chunks) == (message["content"] or "")
    assert shown(chunks, "refusal") == (message["refusal"] or "")
    last = chunks[-1]
    assert last["choices"][0]["finish_reason"] == choice["finish_reason"]
    for report in (whole["guard"], last["guard"]):
        assert report["unscreened_characters"] == 0
    for key in ("policy", "outcome", "rounds", "reason"):
        assert last["guard"][key] == whole["guard"][key]
    assert [v["score"] for v in last["guard"]["verdicts"]] == pytest.approx(
        [v["score"] for v in whole["guard"]["verdicts"]], abs=1e-4
    )


def test_a_refusal_has_the_standard_finish_reason_and_field(live: Live) -> None:
    whole = ask(live, chat(guard={"policy": "harmful"}))
    choice, guard = whole["choices"][0], whole["guard"]
    assert choice["finish_reason"] == "content_filter"
    assert choice["message"]["content"] is None and "help" in choice["message"]["refusal"]
    assert guard["outcome"] == "refused" and guard["rounds"] == 1 and guard["reason"] == "harmful"
    assert [verdict["harmful"] for verdict in guard["verdicts"]] == [True, True]
    assert {record["label"] for record in guard["passes"]} >= {"answer", "rewrite"}
    assert all(record["text"] is None for record in guard["passes"])


def test_a_stream_whose_answer_turns_harmful_says_what_takes_its_place(live: Live) -> None:
    body = chat(guard={"policy": "turns", "release": "window"}, max_tokens=40)
    chunks = events(live, "/v1/chat/completions", body)
    last = chunks[-1]
    assert last["choices"][0]["finish_reason"] == "content_filter"
    assert last["guard"]["replaced"]["released_characters"] == len(shown(chunks)) > 0
    assert last["guard"]["replaced"]["text"] == shown(chunks, "refusal")
    assert last["guard"]["unscreened_characters"] == 0


def test_withheld_texts_stay_withheld_unless_the_operator_reveals_them(models: ModelSet, live: Live) -> None:
    body = chat(guard={"policy": "harmful"})
    with serving(engine_of(models, 200), reveal=True) as revealing:
        report = ask(revealing, body)["guard"]
    texts = [record["text"] for record in report["passes"] if record["label"] == "answer"]
    assert texts[0]
    streamed = json.dumps(events(live, "/v1/chat/completions", body))
    assert json.dumps(texts[0])[1:-1] not in json.dumps(ask(live, body)) + streamed


def test_a_stream_that_has_nothing_to_show_says_that_it_is_there(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "KEEP_ALIVE", 0.005)
    with live.client() as client:
        said = client.post("/v1/chat/completions", json=chat(max_tokens=40, stream=True)).text
    events = [event for event in said.split("\n\n") if event]
    assert any(event.startswith(": ") for event in events) and events[-1] == "data: [DONE]"
    assert all(event.startswith((": ", "data: ")) for event in events)


def test_progress_is_told_where_it_was_asked_for(live: Live) -> None:
    body = chat(guard={"policy": "turns", "progress": True}, max_tokens=40)
    told = [c["progress"] for c in events(live, "/v1/chat/completions", body) if "progress" in c]
    assert len(told) > 3 and all(one["label"] == "answer" for one in (passes[0] for passes in told))
    assert any(one["score"] is not None for passes in told for one in passes)


def test_an_image_is_answered_and_its_size_is_checked(live: Live) -> None:
    def about(url: str) -> dict[str, Any]:
        parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is it?"}]
        return chat(messages=[{"role": "user", "content": parts}], max_tokens=4)

    one, two = ask(live, about(data_url(picture()))), ask(live, about(data_url(picture(color="blue"))))
    assert one["usage"]["prompt_tokens"] == two["usage"]["prompt_tokens"] > 16
    again = ask(live, about(data_url(picture())))
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] >= 16  # the image's page is found again
    refused(live, about("https://example.com/cat.png"), 400, "unsupported_image")
    refused(live, about("file:///etc/passwd"), 400, "unsupported_image")
    refused(live, about("/etc/passwd"), 400, "unsupported_image")
    refused(live, about(data_url(b"no picture")), 400, "unreadable_image")


def test_a_raw_prompt_is_guarded_too(live: Live) -> None:
    body = {"model": "tiny", "prompt": "Once upon a time", "max_tokens": 12, "temperature": 0, "ignore_eos": True}
    plain = ask(live, {**body, "guard": {"policy": "off"}}, "/v1/completions")
    clean = ask(live, body, "/v1/completions")
    assert plain["choices"][0]["text"] == clean["choices"][0]["text"] != ""
    assert (plain["guard"]["outcome"], clean["guard"]["outcome"]) == ("unguarded", "clean")
    harmful = {**body, "guard": {"policy": "harmful"}}
    whole = ask(live, harmful, "/v1/completions")
    assert whole["choices"][0]["text"] == "" and whole["choices"][0]["refusal"]
    assert whole["choices"][0]["finish_reason"] == "content_filter"
    chunks = events(live, "/v1/completions", harmful)
    assert "".join(c["choices"][0]["text"] for c in chunks) == ""
    assert chunks[-1]["choices"][0]["finish_reason"] == "content_filter"
    ids = ask(live, {"prompt": "Once upon a time"}, "/tokenize")["tokens"]
    assert ask(live, {**body, "prompt": ids}, "/v1/completions")["choices"][0]["text"] == plain["choices"][0]["text"]
    refused(live, {**body, "prompt": [99999]}, 400, "invalid_message", "/v1/completions")


def test_moderation_reports_the_probability_of_harm_and_flags_what_it_cannot_read(live: Live) -> None:
    texts = [f"text number {number}" for number in range(40)]
    found = ask(live, {"input": texts}, "/v1/moderations")
    alone = [ask(live, {"input": text}, "/v1/moderations")["results"][0] for text in texts[:3]]
    scores = [result["category_scores"]["harmful"] for result in found["results"]]
    assert scores[:3] == pytest.approx([one["category_scores"]["harmful"] for one in alone], abs=1e-4)
    assert len(set(scores)) > 5 and all(0 <= score <= 1 for score in scores)
    assert all(result["flagged"] == (result["category_scores"]["harmful"] > 1.0) for result in found["results"])
    too_long = ask(live, {"input": "word " * 2000}, "/v1/moderations")["results"][0]
    assert too_long["flagged"] and too_long["error"] == "too_long"
    assert too_long["category_scores"]["harmful"] == 1.0


def test_a_client_may_tighten_and_never_loosen(models: ModelSet) -> None:
    head = HARMFUL.detector.__class__("detector", "response", threshold=0.3)  # type: ignore[union-attr]
    policy = Policy({"protector": HARMFUL.__class__(head), "ecso": GUARDS["ecso"]}, "protector")
    with serving(engine_of(models, 200), policy) as live:
        for guard in ({"policy": "off"}, {"release": "window"}, {"release": "audit"}, {"threshold": 0.29}):
            refused(live, chat(guard=guard), 400, "invalid_guard")
        refused(live, chat(guard={"policy": "protector", "published": True}), 400, "invalid_value")
        assert ask(live, chat(guard={"threshold": 1.0}))["guard"]["outcome"] == "refused"
        assert ask(live, chat(guard={"threshold": 1.0}))["guard"]["verdicts"][0]["threshold"] == 1.0
        assert ask(live, chat())["guard"]["verdicts"][0]["threshold"] == 0.3
        assert ask(live, chat(guard={"policy": "ecso"}))["guard"]["policy"] == "ecso"
        with live.client() as client:
            offer = client.get("/offer").json()
    assert [(one["policy"], one["threshold"]) for one in offer["guards"]] == [("protector", 0.3), ("ecso", 0.0)]
    assert offer["guards"][0]["releases"] == ["verdict"]


def test_health_tells_alive_from_ready(models: ModelSet) -> None:
    engine = engine_of(models, 200)
    with serving(engine) as live, live.client() as client:
        assert client.get("/health").json() == {"status": "alive"}
        assert client.get("/ready").json() == {"status": "ready"}

        def broken(*_: Any) -> Any:
            raise RuntimeError("the text of somebody")

        engine.scheduler.schedule = broken  # type: ignore[method-assign]
        said = client.post("/v1/chat/completions", json=chat())
        assert said.status_code == 503 and said.json()["error"]["code"] == "engine_stopped"
        assert "somebody" not in said.text and said.headers["retry-after"]
        assert client.get("/ready").status_code == 503
        assert client.get("/health").status_code == 503
        assert client.get("/version").status_code == 200


def test_a_lost_batch_is_a_typed_error_and_the_next_request_is_answered(models: ModelSet) -> None:
    engine = engine_of(models, 200)
    run = engine.runner.run

    def broken(*_: Any) -> Any:
        raise RuntimeError("the text of somebody")

    with serving(engine) as live:
        engine.runner.run = broken  # type: ignore[method-assign]
        message = refused(live, chat(), 500, "pass_failed")
        assert "somebody" not in message
        with live.client() as client:
            streamed = client.post("/v1/chat/completions", json=chat(stream=True)).text
        assert "pass_failed" in streamed and "somebody" not in streamed and "[DONE]" not in streamed
        engine.runner.run = run  # type: ignore[method-assign]
        assert ask(live, chat())["guard"]["outcome"] == "clean"
        assert live.metric("stockade_requests_total", outcome="PassError") == 2
    assert_empty(engine)


def test_a_deadline_is_a_typed_error_streamed_or_not(live: Live) -> None:
    body = chat(timeout=0.001, max_tokens=64)
    refused(live, body, 504, "deadline_exceeded")
    with live.client() as client:
        response = client.post("/v1/chat/completions", json={**body, "timeout": 0.02, "stream": True})
    assert "deadline_exceeded" in response.text and "[DONE]" not in response.text


def test_metrics_count_requests_verdicts_tokens_and_no_unscreened_character(live: Live) -> None:
    before = live.metric("stockade_requests_total", outcome="refused", endpoint="chat")
    ask(live, chat(guard={"policy": "harmful"}))
    assert live.metric("stockade_requests_total", outcome="refused", endpoint="chat") == before + 1
    assert live.metric("stockade_guard_added_seconds_count") > 0
    assert live.metric("stockade_tokens_total", kind="generated", model="mllm") > 0
    assert live.metric("stockade_first_token_seconds_count") > 0
    assert live.metric("stockade_unscreened_characters_total") == 0
    assert live.metric("stockade_verdicts_total", harmful="true") > 0
    assert live.metric("stockade_ready") == 1


def test_unscreened_characters_are_counted_where_the_operator_allows_them(models: ModelSet) -> None:
    with serving(engine_of(models, 200)) as live:
        chunks = events(live, "/v1/chat/completions", chat(guard={"policy": "harmful", "release": "audit"}))
        assert chunks[-1]["guard"]["outcome"] == "flagged"
        count = chunks[-1]["guard"]["unscreened_characters"]
        assert count > 0 and live.metric("stockade_unscreened_characters_total") == count


def test_tokens_of_texts_and_chats(live: Live) -> None:
    found = ask(live, {"prompt": "Hello"}, "/tokenize")
    assert found["count"] == len(found["tokens"]) > 0 and found["max_model_len"] == 512
    talk = ask(live, {"messages": [{"role": "user", "content": "Hello"}]}, "/tokenize")
    assert talk["count"] > found["count"]
    refused(live, {}, 400, "invalid_value", "/tokenize")


def test_the_page_and_the_docs_are_there(live: Live) -> None:
    with live.client() as client:
        page = client.get("/")
        assert page.status_code == 200 and "stockade" in page.text
        assert "default-src 'none'" in page.headers["content-security-policy"]
        described = client.get("/openapi.json").json()
    assert {"/v1/chat/completions", "/v1/moderations", "/tokenize", "/metrics"} <= set(described["paths"])
    answers = described["paths"]["/v1/chat/completions"]["post"]["responses"]
    assert set(answers) == {"200", "4XX", "5XX"}


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_of_another_model_is_judged_and_mended(live: Live, stream: bool) -> None:
    def judged(policy: str, answer: str) -> tuple[str | None, str | None, Any]:
        body = chat("Hi", guard={"policy": policy, "answer": answer})
        if not stream:
            whole = ask(live, body)
            message = whole["choices"][0]["message"]
            return message["content"], message["refusal"], whole["guard"]
        chunks = events(live, "/v1/chat/completions", body)
        return shown(chunks) or None, shown(chunks, "refusal") or None, chunks[-1]["guard"]

    content, refusal, guard = judged("harmless", "What somebody said.")
    assert (content, refusal) == ("What somebody said.", None)
    assert (guard["outcome"], guard["rounds"], len(guard["verdicts"])) == ("clean", 0, 1)
    content, refusal, guard = judged("harmful", "What somebody said.")
    assert content is None and refusal and "somebody" not in refusal
    assert (guard["outcome"], guard["rounds"], len(guard["verdicts"])) == ("refused", 1, 2)
    rewrite = [one for one in guard["passes"] if one["label"] == "rewrite" and not one["failed"]]
    assert [one["verdict"] for one in rewrite] == guard["verdicts"][1:]
    assert judged("off", "said")[0] == "said"
    refused(live, chat("Hi", guard={"answer": "word " * 5000}), 400, "context_length_exceeded")
