"""Kernels compiled for GPUs that are not here: the gates, and the committed table against a few compiled anew."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import triton

from stockade.kernels.triton.compiled import (
    PAGE,
    TARGETS,
    Compiled,
    compile_all,
    faults,
    wanted_everywhere,
)
from stockade.kernels.triton.variants import all_variants

VARIANTS = list(all_variants())
SPOTS = [
    *(("attention, decode", "32 x 100", target) for target in ("sm_80", "gfx942")),
    ("attention, decode", "32 x 100, fp8 pages", "sm_90"),
    ("attention, prefill", "32 x 64", "sm_90"),
    ("attention, merge", "32 x 128", "sm_100"),
    ("pooled head", "3200, norm, bias", "sm_90"),
]


def rows() -> dict[tuple[str, str], dict[str, str]]:
    """The committed table: (kernel, variant) -> target -> cell."""
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.count(" | ") == 1 + len(TARGETS)]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[1:]]
    return {(kernel, what): dict(zip(TARGETS, found, strict=True)) for kernel, what, *found in cells}


def test_the_table_has_every_variant_for_every_target_and_no_spills() -> None:
    table = rows()
    assert list(table) == [(variant.kernel, variant.what) for variant in VARIANTS]
    for number, target in wanted_everywhere():
        cell = table[VARIANTS[number].kernel, VARIANTS[number].what][target]
        assert cell
        assert target == "gfx942" or "stack" not in cell


def test_a_few_variants_compiled_now_are_good_and_as_the_table_has_them() -> None:
    numbers = {(variant.kernel, variant.what): number for number, variant in enumerate(VARIANTS)}
    found = compile_all([(numbers[kernel, what], target) for kernel, what, target in SPOTS], processes=1)
    table = rows()
    as_written = f"Triton {triton.__version__}:" in PAGE.read_text(encoding="utf-8")
    for (kernel, what, target), result in zip(SPOTS, found, strict=True):
        assert faults(VARIANTS[numbers[kernel, what]], TARGETS[target], result) == []
        if as_written:  # another compiler allots other registers
            assert table[kernel, what][target] == str(result)


GOOD = Compiled(128, 0, 1024, Counter(HGMMA=24), 0, Counter({128: 48}), Counter({32: 8, 128: 4}))


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"stack": 16}, "16 bytes of stack"),
        ({"local": 3}, "3 local loads"),
        ({"copies": Counter({128: 40, 64: 8})}, "copies of"),
        ({"copies": Counter()}, "copies of"),
        ({"loads": Counter({16: 2})}, "loads of"),
        ({"matrix": Counter(HMMA=64)}, "not by HGMMA"),
    ],
)
def test_a_gate_says_what_is_no_good(bad: dict[str, object], said: str) -> None:
    prefill = next(variant for variant in VARIANTS if variant.groups)
    assert faults(prefill, TARGETS["sm_90"], GOOD) == []
    (found,) = faults(prefill, TARGETS["sm_90"], replace(GOOD, **bad))
    assert said in found


def test_fp8_variants_are_compiled_where_there_is_fp8() -> None:
    wanted = wanted_everywhere()
    for number, variant in enumerate(VARIANTS):
        targets = {target for index, target in wanted if index == number}
        assert targets == ({"sm_90", "sm_100"} if variant.fp8 else set(TARGETS))
