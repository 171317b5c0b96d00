"""Every kernel compiled ahead of time, for GPUs that need not be here: what it takes of them, and what is no good.

`python -m stockade.kernels.triton.compiled` compiles all variants and writes the table into `kernels/README.md`. What
is compiled is what the launchers launch: their own launches, with the divisibility that Triton finds in these.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from .common import Launch, Target
from .variants import Variant, all_variants

PAGE = Path(__file__).parents[1] / "README.md"
MARK = "<!-- written by python -m stockade.kernels.triton.compiled -->"
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TARGETS = {
    "sm_80": Target("cuda", 80, 108),
    "sm_90": Target("cuda", 90, 132),
    "sm_100": Target("cuda", 100, 148),
    "gfx942": Target("hip", "gfx942", 304),
}
# The instructions of matrix units: of a warp (HMMA, IMMA, QMMA), of a warp group (HGMMA), of an SM (UTC…MMA), MFMA.
MATRIX = re.compile(r"\b((?:H|I|Q)G?MMA|UTC\wMMA|v_mfma\w*)\b")


@dataclass(frozen=True)
class Compiled:
    """What one kernel takes. registers: of a thread. stack, shared: bytes, of a thread and of a program.

    matrix: instructions of matrix units, by name. local: loads and stores of what no register was left for.
    copies: NVIDIA's instructions that copy to shared memory, by the bits that each brings for a thread; loads: those
    that load into registers.
    """

    registers: int
    stack: int
    shared: int
    matrix: Counter[str]
    local: int
    copies: Counter[int]
    loads: Counter[int]

    def __str__(self) -> str:
        units = " ".join(f"{count} {name}" for name, count in sorted(self.matrix.items()))
        spilled = f", stack {self.stack} B" if self.stack else ""
        shared = f", {self.shared / 1024:.0f} KB" if self.shared >= 1024 else ""
        return f"{self.registers}{shared}{f', {units}' if units else ''}{spilled}"


def faults(variant: Variant, target: Target, found: Compiled) -> list[str]:
    """What of a compiled kernel is no good. Of AMD's nothing is known to be: no one has run them."""
    if target.backend != "cuda":
        return []
    said = []
    if found.stack or found.local:
        said.append(f"{found.stack} bytes of stack and {found.local} local loads and stores, not none")
    if variant.copy_bits is not None and (not found.copies or min(found.copies) < variant.copy_bits):
        said.append(f"copies of {dict(found.copies)} bits, not of {variant.copy_bits}")
    if variant.copy_bits is not None and (found.loads[8] or found.loads[16]):
        said.append(f"loads of {dict(found.loads)} bits")
    if variant.groups and target.arch == 90 and not found.matrix["HGMMA"]:
        said.append(f"products by {dict(found.matrix)}, not by HGMMA")
    return said


def compile_launch(launch: Launch, target: Target) -> Compiled:
    """Compile as Triton's own launch would on this target. Not under the interpreter."""
    gpu = GPUTarget(target.backend, target.arch, 64 if target.backend == "hip" else 32)
    backend = make_backend(gpu)
    asked = {"num_warps": launch.warps, "num_stages": launch.stages, "enable_fp_fusion": True}
    binder = create_function_from_signature(launch.kernel.signature, launch.kernel.params, backend)
    bound, specialization, options = binder(**launch.arguments, **asked)
    options, signature, constants, attributes = launch.kernel._pack_args(
        backend, asked, bound, specialization, options
    )
    source = ASTSource(launch.kernel, signature, constants, attributes)
    kernel = triton.compile(source, target=gpu, options=options.__dict__)
    return _of_amd(kernel) if target.backend == "hip" else _of_nvidia(kernel)


def _of_nvidia(kernel: Any) -> Compiled:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        code = _tool("nvdisasm", "-c", file.name)
    registers, stack = (int(_found(rf"{name}:(\d+)", usage)) for name in ("REG", "STACK"))
    local = len(re.findall(r"\b(?:LDL|STL)\b", code))
    matrix = Counter(MATRIX.findall(code))
    widths = (_widths(code, name) for name in ("LDGSTS", "LDG"))
    return Compiled(registers, stack, kernel.metadata.shared, matrix, local, *widths)


def _widths(code: str, name: str) -> Counter[int]:
    """Instructions of a name by the bits they move; 32 where none are named. LTC128B is a hint to the cache."""
    found: Counter[int] = Counter()
    for modifiers in re.findall(rf"\b{name}\b((?:\.\w+)*)", code):
        width = re.search(r"\.[US]?(8|16|64|128)(?!\w)", modifiers)
        found[int(width[1]) if width else 32] += 1
    return found


def _of_amd(kernel: Any) -> Compiled:
    code = kernel.asm["amdgcn"]

    def number(name: str) -> int:
        return int(_found(rf"\.{name}:\s+(\d+)", code))

    local = number("vgpr_spill_count") + number("sgpr_spill_count")
    stack, matrix = number("private_segment_fixed_size"), Counter(MATRIX.findall(code))
    return Compiled(number("vgpr_count"), stack, kernel.metadata.shared, matrix, local, Counter(), Counter())


def _found(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    assert match is not None, f"no {pattern} in what the compiler says"
    return match[1]


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([str(TOOLS / name), *arguments], check=True, capture_output=True, text=True).stdout


def compile_all(wanted: Sequence[tuple[int, str]], processes: int) -> list[Compiled]:
    """Variants by number in `all_variants`, each for a target by name, in so many processes of their own.

    The processes are fresh ones, so that kernels are compiled even where this one interprets them.
    """
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "0"
    try:
        with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
            return list(pool.map(_compile_one, *zip(*wanted, strict=True)))
    finally:
        if before is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = before


def _compile_one(number: int, name: str) -> Compiled:
    target = TARGETS[name]
    (launch,) = list(all_variants())[number].launches(target)
    return compile_launch(launch, target)


def wanted_everywhere() -> list[tuple[int, str]]:
    """Every variant for every target that has what it needs."""
    return [
        (number, name)
        for number, variant in enumerate(all_variants())
        for name, target in TARGETS.items()
        if not variant.fp8 or (target.backend == "cuda" and int(target.arch) >= 89)
    ]


def table_of(results: dict[tuple[int, str], Compiled]) -> str:
    """Markdown: a row a variant, a column a target."""
    lines = [f"| kernel | variant | {' | '.join(TARGETS)} |", "|---|---|" + "---|" * len(TARGETS)]
    for number, variant in enumerate(all_variants()):
        cells = [str(results.get((number, name), "")) for name in TARGETS]
        lines.append(f"| {variant.kernel} | {variant.what} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    """Compile everything, write the table; 1 where something is no good, which is said."""
    wanted = wanted_everywhere()
    results = dict(zip(wanted, compile_all(wanted, os.cpu_count() or 1), strict=True))
    head, _, _ = PAGE.read_text(encoding="utf-8").partition(MARK)
    table = f"Triton {triton.__version__}:\n\n{table_of(results)}"
    PAGE.write_text(f"{head}{MARK}\n\n{table}\n", encoding="utf-8")
    variants = list(all_variants())
    bad = [
        f"{variants[number].kernel}, {variants[number].what}, {name}: {'; '.join(said)}"
        for (number, name), found in results.items()
        if (said := faults(variants[number], TARGETS[name], found))
    ]
    print(table, *bad, sep="\n")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
