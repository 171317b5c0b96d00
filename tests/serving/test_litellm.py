"""LiteLLM's own proxy in front of a model that nobody guards, with the guardrail asking a stockade server.

Skipped without LiteLLM. It may live in an environment of its own, whose Python LITELLM_PYTHON names.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

import stockade
from stockade.engine.models.loader import ModelSet
from tests.engine.screened import engine_of
from tests.serving.live import Live, serving

PYTHON = os.environ.get("LITELLM_PYTHON", sys.executable)
GUARDRAIL = "stockade.engine.serving.litellm_guardrail.StockadeGuardrail"
KEY = "sk-" + secrets.token_hex(32)
pytestmark = pytest.mark.slow


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture(scope="module")
def guard(models: ModelSet) -> Iterator[Live]:
    with serving(engine_of(models, 200)) as found:
        yield found


@pytest.fixture(scope="module")
def proxy(guard: Live, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    there = subprocess.run([PYTHON, "-c", "import litellm.proxy.proxy_cli"], capture_output=True, timeout=120)
    if there.returncode:
        pytest.skip("LiteLLM's proxy is not installed (LITELLM_PYTHON names an environment that has it)")
    upstream = {"model": "openai/tiny", "api_base": f"{guard.url}/v1", "api_key": "none",
                "extra_body": {"guard": {"policy": "off"}, "ignore_eos": True}}  # fmt: skip
    kinds = {
        "cleared": {"api_base": guard.url, "model": "tiny", "policy": "harmless"},
        "blocked": {"api_base": guard.url, "model": "tiny", "policy": "harmful"},
        "gone": {"api_base": f"http://127.0.0.1:{free_port()}"},
        "unguarded": {"api_base": guard.url, "model": "tiny", "policy": "off"},
        "wrong": {"api_base": guard.url, "model": "another"},
    }
    config = {
        "model_list": [{"model_name": "anybody", "litellm_params": upstream}],
        "guardrails": [
            {"guardrail_name": name, "litellm_params": {"guardrail": GUARDRAIL, "mode": "post_call", **more}}
            for name, more in kinds.items()
        ],
        "litellm_settings": {"num_retries": 0},
    }
    file = tmp_path_factory.mktemp("litellm") / "config.yaml"
    file.write_text(json.dumps(config))  # which is YAML, too
    port = free_port()
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(stockade.__file__).parents[1]),
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "LITELLM_MASTER_KEY": KEY,
    }
    command = [PYTHON, "-m", "litellm.proxy.proxy_cli", "--config", str(file), "--host", "127.0.0.1"]
    command += ["--port", str(port)]
    headers = {"Authorization": f"Bearer {KEY}"}
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment) as process:
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, headers=headers) as client:
                ends = time.monotonic() + 150
                while True:
                    try:
                        if client.get("/health/liveliness").status_code == 200:
                            break
                    except httpx.TransportError:
                        time.sleep(0.2)
                    assert process.poll() is None and time.monotonic() < ends
                yield client
        finally:
            process.terminate()
            process.wait(30)


def said(proxy: httpx.Client, guardrail: str | None, stream: bool) -> tuple[int, str, str | None]:
    """(status, text, finish reason or error)."""
    body: dict[str, Any] = {
        "model": "anybody", "stream": stream, "max_tokens": 12, "temperature": 0,
        "messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}],
    }  # fmt: skip
    if guardrail is not None:
        body["guardrails"] = [guardrail]
    reply = proxy.post("/v1/chat/completions", json=body)
    if reply.status_code != 200:
        return reply.status_code, "", reply.json()["error"]["message"]
    if not stream:
        choice = reply.json()["choices"][0]
        return 200, choice["message"]["content"], choice["finish_reason"]
    lines = [json.loads(line[6:]) for line in reply.text.splitlines() if line.startswith("data: {")]
    choices = [choice for line in lines for choice in line["choices"]]
    text = "".join(choice["delta"].get("content") or "" for choice in choices)
    return 200, text, choices[-1]["finish_reason"]


@pytest.mark.parametrize("stream", [False, True])
def test_answers_of_any_model_go_through_the_guard(proxy: httpx.Client, guard: Live, stream: bool) -> None:
    plain = said(proxy, None, stream)
    assert plain[0] == 200 and plain[1]
    assert said(proxy, "cleared", stream) == plain
    status, text, reason = said(proxy, "blocked", stream)
    assert (status, reason) == (200, "content_filter") and "Sorry" in text and plain[1] not in text


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("guardrail", ["gone", "unguarded", "wrong"])
def test_without_a_verdict_nothing_goes_out(proxy: httpx.Client, guardrail: str, stream: bool) -> None:
    status, text, error = said(proxy, guardrail, stream)
    assert status == 503 and not text and error is not None and "no verdict" in error


def test_an_engine_in_the_proxy_s_own_process_judges_too() -> None:
    pytest.importorskip("litellm.integrations.custom_guardrail", reason="LiteLLM is not installed beside stockade")
    from litellm.types.utils import ModelResponse

    from stockade.engine.serving.litellm_guardrail import StockadeGuardrail

    async def judged(text: str) -> str:
        answer = ModelResponse(choices=[{"message": {"role": "assistant", "content": text}}])
        asked = {"messages": [{"role": "user", "content": "Hi"}]}
        return (await guardrail.async_post_call_success_hook(asked, None, answer)).choices[0].message.content

    guardrail = StockadeGuardrail(engine="smol", guardrail_name="here", event_hook="post_call")
    kind = "Bread rises because yeast makes carbon dioxide, which the dough holds back."
    assert asyncio.run(judged(kind)) == kind
    with pytest.raises(ValueError, match="either"):
        StockadeGuardrail(engine="smol", api_base="http://127.0.0.1:8000")
