"""Keys and what each may: who has none, who asks too often, who asks too much at once."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest

from stockade.engine.errors import BadInput, RateLimited, Unauthorized
from stockade.engine.models.loader import ModelSet
from stockade.engine.serving.limits import Doors, KeyLimits, read_keys
from tests.engine.screened import engine_of
from tests.serving.live import chat, serving

ONE, TWO = "a-key-of-somebody", "another-key-of-another"


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_only_a_known_key_opens() -> None:
    doors = Doors({"one": ONE, "two": TWO})
    assert doors.locked
    assert doors.tenant(f"Bearer {ONE}").name == "one"
    assert doors.tenant(f"bearer  {TWO} ").name == "two"
    for wrong in (None, "", "Bearer", "Bearer ", f"Basic {ONE}", ONE, f"Bearer {ONE}x", f"Bearer {ONE[:-1]}"):
        with pytest.raises(Unauthorized):
            doors.tenant(wrong)


def test_tenants_have_salts_of_their_own() -> None:
    doors = Doors({"one": ONE, "two": TWO})
    one, two = doors.tenant(f"Bearer {ONE}"), doors.tenant(f"Bearer {TWO}")
    assert one.salt != two.salt and one is doors.tenant(f"Bearer {ONE}")
    assert one.salt not in repr(one)
    assert Doors().tenant(None).salt != Doors().tenant(None).salt


def test_a_rate_allows_a_minute_s_requests_and_then_one_after_another() -> None:
    clock = Clock()
    tenant = Doors({"one": ONE}, KeyLimits(per_minute=3), clock).tenant(f"Bearer {ONE}")
    for _ in range(3):
        with tenant.request():
            pass
    with pytest.raises(RateLimited) as refused, tenant.request():
        pass
    assert refused.value.retry_after == pytest.approx(20)
    clock.now += 20
    with tenant.request():
        pass
    with pytest.raises(RateLimited), tenant.request():
        pass
    clock.now += 3600
    with ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(tenant.request())
        with pytest.raises(RateLimited):
            stack.enter_context(tenant.request())


def test_so_many_at_once_and_no_more_even_if_one_fails() -> None:
    tenant = Doors(None, KeyLimits(concurrent=2)).tenant(None)
    with tenant.request(), tenant.request(), pytest.raises(RateLimited), tenant.request():
        pass
    with pytest.raises(ZeroDivisionError), tenant.request():
        raise ZeroDivisionError
    assert tenant.under_way == 0


def test_wrong_limits_and_keys_are_refused(tmp_path: Path) -> None:
    for limits in ({"per_minute": 0}, {"concurrent": 0}, {"per_minute": float("nan")}):
        with pytest.raises(BadInput):
            KeyLimits(**limits)  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="at least"):
        Doors({"one": "short"})
    with pytest.raises(BadInput, match="somebody else"):
        Doors({"one": ONE, "two": ONE})
    file = tmp_path / "keys"
    file.write_text(f"# mine\none {ONE}\n\ntwo {TWO} # hers\n")
    assert read_keys(file) == {"one": ONE, "two": TWO}
    for text in ("", "one\n", f"one {ONE}\none {TWO}\n", f"one {ONE} three\n"):
        file.write_text(text)
        with pytest.raises(BadInput):
            read_keys(file)


def test_a_server_with_keys_lets_nobody_else_in_and_limits_each(models: ModelSet, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"one {ONE}\ntwo {TWO}\n")
    with serving(engine_of(models, 200), keys=file, per_minute=2) as live:
        with live.client() as nobody:
            for path in ("/v1/models", "/metrics"):
                said = nobody.get(path)
                assert said.status_code == 401 and said.json()["error"]["code"] == "invalid_api_key"
            assert nobody.post("/v1/chat/completions", json=chat()).status_code == 401
            assert [nobody.get(path).status_code for path in ("/", "/health", "/ready", "/version")] == [200] * 4
        with live.client(headers={"Authorization": f"Bearer {ONE}"}) as one:
            statuses = [one.post("/v1/chat/completions", json=chat(max_tokens=1)).status_code for _ in range(3)]
            assert statuses == [200, 200, 429]
            refused = one.post("/v1/chat/completions", json=chat())
            assert refused.json()["error"]["type"] == "rate_limit_error"
            assert 1 <= int(refused.headers["retry-after"]) <= 60
            assert one.get("/metrics").status_code == 200
        with live.client(headers={"Authorization": f"Bearer {TWO}"}) as two:
            said = two.post("/v1/chat/completions", json=chat(max_tokens=1))
            assert said.status_code == 200
            # the first tenant asked the same, and its pages are its own
            assert said.json()["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


def test_a_full_queue_says_when_to_come_again(models: ModelSet) -> None:
    with serving(engine_of(models, 200), max_requests=1) as live, live.client() as client:
        busy = chat(max_tokens=64, stream=True)
        with client.stream("POST", "/v1/chat/completions", json=busy) as first:
            assert first.status_code == 200
            with live.client() as other:
                said = other.post("/v1/chat/completions", json=chat())
            assert said.status_code == 429 and int(said.headers["retry-after"]) >= 1
            assert said.json()["error"]["code"] == "overloaded"
            assert live.metric("stockade_refused_requests_total", code="overloaded") == 1
            first.read()
        assert client.post("/v1/chat/completions", json=chat()).status_code == 200
