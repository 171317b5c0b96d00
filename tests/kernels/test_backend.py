"""Which kernels run where: by device, by what is installed, by STOCKADE_KERNELS."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch

from stockade.kernels import backend

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def nothing_asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in (backend.VARIABLE, "TRITON_INTERPRET"):
        monkeypatch.delenv(name, raising=False)
    backend._warn.cache_clear()
    yield
    backend._warn.cache_clear()


def gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")


def without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "find_spec", lambda name: None if name == "triton" else find_spec(name))


def test_the_cpu_runs_plain_torch_and_no_fused_layers() -> None:
    assert backend.chosen(CPU) == "reference"
    assert backend.fused(CPU) is None


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0), (12, 0)])
def test_gpus_that_can_run_triton_do(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    gpu(monkeypatch, capability)
    monkeypatch.setattr(backend, "find_spec", lambda name: object())
    assert (backend.chosen(CUDA), backend.fused(CUDA)) == ("triton", "triton")


def test_an_old_gpu_falls_back_with_one_warning_that_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(monkeypatch, (7, 5))
    monkeypatch.setattr(backend, "find_spec", lambda name: object())
    with pytest.warns(UserWarning, match="a GPU has compute capability 7.5, and 8.0 is the least"):
        assert backend.chosen(CUDA) == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backend.chosen(CUDA) == "reference"
        assert backend.fused(CUDA) is None


def test_a_gpu_without_triton_falls_back_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(monkeypatch, (9, 0))
    without_triton(monkeypatch)
    with pytest.warns(UserWarning, match="triton is not installed"):
        assert backend.chosen(CUDA) == "reference"


def test_the_variable_overrides(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(monkeypatch, (9, 0))
    monkeypatch.setenv(backend.VARIABLE, "reference")
    assert (backend.chosen(CUDA), backend.fused(CUDA)) == ("reference", "reference")
    assert (backend.chosen(CPU), backend.fused(CPU)) == ("reference", "reference")
    monkeypatch.setattr(backend, "find_spec", lambda name: object())
    monkeypatch.setenv(backend.VARIABLE, "triton")
    with pytest.raises(backend.KernelsUnavailable, match="only in its interpreter"):
        backend.chosen(CPU)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert (backend.chosen(CPU), backend.fused(CPU)) == ("triton", "triton")
    without_triton(monkeypatch)
    with pytest.raises(backend.KernelsUnavailable, match="triton is not installed"):
        backend.chosen(CUDA)
    monkeypatch.setenv(backend.VARIABLE, "cuda")
    with pytest.raises(backend.KernelsUnavailable, match="'cuda'; it may be triton or reference"):
        backend.chosen(CPU)
