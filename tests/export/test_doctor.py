"""What `stockade doctor` says of ONNX Runtime."""

from __future__ import annotations

import pytest

from stockade import doctor


def test_the_execution_providers_are_told() -> None:
    (fact,) = doctor._onnx_runtime()
    assert fact.status == "ok" and "CPUExecutionProvider" in fact.text


def test_two_runtimes_clash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_installed", lambda name: True)
    (fact,) = doctor._onnx_runtime()
    assert fact.status == "missing" and "both" in fact.text
    assert fact.remedy is not None and "pip uninstall" in fact.remedy


def test_without_one_nothing_is_told_and_both_are_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_installed", lambda name: False)
    assert not list(doctor._onnx_runtime())
