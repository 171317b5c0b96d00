"""What this machine has and what the engine makes of it: facts for `stockade doctor`. Changes nothing on it."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    import torch
    from packaging.requirements import Requirement

Status = Literal["ok", "note", "missing"]
SMOL_BYTES = 300_000_000
ONNX_RUNTIMES = ("onnxruntime", "onnxruntime-gpu")  # either, not both


class Fact(NamedTuple):
    """status: "missing" is something the package needs, "note" something only a part of it needs."""

    topic: str
    text: str
    status: Status = "ok"
    remedy: str | None = None


@dataclass(frozen=True)
class Diagnosis:
    """Facts in three groups, in the order they are told."""

    machine: list[Fact]
    used: list[Fact]
    packages: list[Fact]

    @property
    def healthy(self) -> bool:
        return all(fact.status != "missing" for fact in (*self.machine, *self.used, *self.packages))


def examine() -> Diagnosis:
    """Look at the machine and the packages, and let an engine with a tiny random model answer on it."""
    packages = list(_packages())
    if any(fact.status == "missing" for fact in packages if fact.topic == "torch"):
        return Diagnosis(list(_hardware()), [], packages)
    return Diagnosis([*_hardware(), *_devices()], [*_engine(), *_onnx_runtime(), _cache(), *_smol()], packages)


def cpu_model() -> str:
    """The name of the processor, as /proc/cpuinfo or the platform gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.lower().startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _hardware() -> Iterator[Fact]:
    yield Fact("system", f"{platform.system()} {platform.machine()}, Python {platform.python_version()}")
    yield Fact("processor", f"{cpu_model()}, {cores()} cores for this process")
    names = os.sysconf_names if hasattr(os, "sysconf_names") else {}
    if "SC_PHYS_PAGES" in names and "SC_AVPHYS_PAGES" in names:
        page = os.sysconf("SC_PAGE_SIZE")
        total, free = os.sysconf("SC_PHYS_PAGES") * page, os.sysconf("SC_AVPHYS_PAGES") * page
        yield Fact("memory", f"{_size(total)}, {_size(free)} of it free")


def _devices() -> Iterator[Fact]:
    import torch

    bf16, amx = torch.cpu._is_avx512_bf16_supported(), torch.cpu._is_amx_tile_supported()
    yield Fact("bf16 on the CPU", f"AVX-512 BF16: {_yes(bf16)}, AMX: {_yes(amx)}")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            found = torch.cuda.get_device_properties(index)
            capability = f"compute capability {found.major}.{found.minor}"
            yield Fact(f"cuda:{index}", f"{found.name}, {_size(found.total_memory)}, {capability}")
    else:
        why = "this torch is built without CUDA" if torch.version.cuda is None else "no GPU that torch can use"
        yield Fact("CUDA", f"none: {why}; the CPU is used")


def _engine() -> Iterator[Fact]:
    """What an engine chooses by itself, seen on one that answers."""
    from .engine.engine import Engine
    from .engine.guards import Guard
    from .engine.sampling import SamplingParams

    try:
        engine = Engine("tiny-llama", "tiny-llama", "tiny-llama")
        guard = Guard.protector(template="response")
        engine.chat(["Hello."], guard=guard, sampling=SamplingParams(max_tokens=4))
        engine.check_integrity()
    except Exception as error:  # whatever it is, this is the place to tell it
        yield Fact("engine", f"does not work: {type(error).__name__}: {error}", "missing")
        return
    dtype = str(engine.models["mllm"].backbone.decoder.dtype).removeprefix("torch.")
    yield Fact("device", f"{engine.device}, {dtype}")
    if engine.device.type == "cpu":
        yield _native()
    yield from _kernels(engine.device)
    yield _eight_bits(engine.device)
    yield Fact("page pool (kv_bytes)", _size(engine.pool.arena.nbytes))
    yield Fact("self-test", "a tiny random model answered under a guard")


def _native() -> Fact:
    from .engine.models.bundles import default_cache
    from .kernels.native import Native, load

    library = load(default_cache())
    if isinstance(library, Native):
        return Fact("native CPU kernels", "compiled; bf16 layers run on AMX")
    return Fact("native CPU kernels", f"none: {library}; PyTorch runs instead", "note")


def _kernels(device: torch.device) -> Iterator[Fact]:
    """Which kernels an engine runs on each device, and why not Triton's."""
    import torch

    from .kernels import backend

    for each in dict.fromkeys((device, torch.device("cpu"))):
        topic = f"kernels on {each}"
        try:
            runs = backend.chosen(each)
        except backend.KernelsUnavailable as error:
            yield Fact(topic, str(error), "missing")
            continue
        why = "as " + backend.VARIABLE + " asks" if backend.asked() else backend.missing_for_triton(each)
        if runs == "triton":
            yield Fact(topic, f"Triton {metadata.version('triton')}" + (f", {why}" if why else ""))
        else:
            yield Fact(topic, f"plain torch; {why}", "note" if each.type == "cuda" else "ok")


def _eight_bits(device: torch.device) -> Fact:
    """Which weights and pages of 8 bits an engine can have here."""
    from .engine.models.eight_bits import missing_for

    if (missing := missing_for("fp8", device)) is None:
        return Fact("8 bits", "weights int8 or fp8, pages fp8")
    if device.type == "cpu":
        return Fact("8 bits", "weights int8; pages fp8, slowly (fp8 weights need a GPU)")
    return Fact("8 bits", f"weights int8; no fp8: {missing}")


def _onnx_runtime() -> Iterator[Fact]:
    """What runs exported detectors. Two packages bring the same module: the one installed last takes its place."""
    names = [name for name in ONNX_RUNTIMES if _installed(name)]
    if not names:
        return
    if len(names) > 1:
        remedy = f"pip uninstall -y {' '.join(names)} && pip install {names[-1]}, or {names[0]} for the CPU alone"
        yield Fact("ONNX Runtime", f"{' and '.join(names)} are both installed and clash", "missing", remedy)
        return
    import onnxruntime

    providers = ", ".join(onnxruntime.get_available_providers())
    yield Fact("ONNX Runtime", f"{onnxruntime.__version__} ({names[0]}); execution providers: {providers}")


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def _cache() -> Fact:
    from .engine.models.bundles import default_cache

    folder = default_cache()
    there = next(place for place in (folder, *folder.parents) if place.exists())
    if not os.access(there, os.W_OK):
        remedy = "set STOCKADE_CACHE to a folder that can be written"
        return Fact("cache", f"{folder}: {there} cannot be written", "missing", remedy)
    free = shutil.disk_usage(there).free
    status: Status = "ok" if free > SMOL_BYTES or any(folder.glob("smol-*")) else "missing"
    advice = None if status == "ok" else "make room, or set STOCKADE_CACHE to a folder elsewhere"
    return Fact("cache", f"{folder}, {_size(free)} free", status, advice)


def _smol() -> Iterator[Fact]:
    from .engine.errors import CheckpointError
    from .engine.models.bundles import smol_gguf
    from .engine.models.heads import load_head
    from .engine.models.sources import SMOL_DETECTOR

    try:
        smol_gguf()
        spec = load_head(SMOL_DETECTOR).spec
        yield Fact("bundle smol", f"SmolLM2-135M-Instruct; detector: layer {spec.layer}, {spec.pooling} pooling")
    except CheckpointError as error:
        what, _, command = str(error).partition(": ")
        yield Fact("bundle smol", what, "missing", command or None)


def _packages() -> Iterator[Fact]:
    """What the installed package says it requires, with the versions found; what only its extras need is noted."""
    from packaging.requirements import Requirement

    try:
        required = [Requirement(text) for text in metadata.requires("stockade") or []]
    except metadata.PackageNotFoundError:
        yield Fact("stockade", "not installed, only on the path", "missing", "pip install -e .")
        return
    extras = metadata.metadata("stockade").get_all("Provides-Extra") or []
    wanted: dict[str, tuple[Requirement, list[str]]] = {}
    for one in required:
        core = one.marker is None or one.marker.evaluate({"extra": ""})
        parts = [extra for extra in extras if one.marker and one.marker.evaluate({"extra": extra})]
        if core:
            wanted[one.name] = (one, [])
        elif parts:
            wanted.setdefault(one.name, (one, []))[1].extend(parts)
    there = [name for name in ONNX_RUNTIMES if _installed(name)]
    for requirement, parts in wanted.values():
        if requirement.name in ONNX_RUNTIMES and there and requirement.name not in there:
            continue  # the other one does
        yield _package(requirement, parts)


def _package(requirement: Requirement, parts: list[str]) -> Fact:
    """parts: the extras that need it; none where the package itself does."""
    absent: Status = "note" if parts else "missing"
    why = f" (for stockade[{', '.join(parts)}])" if parts else ""
    command = f"pip install '{requirement.name}{requirement.specifier}'"
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return Fact(requirement.name, f"not installed{why}", absent, command)
    if requirement.specifier.contains(version, prereleases=True):
        return Fact(requirement.name, f"{version}{why}")
    return Fact(requirement.name, f"{version}, needed is {requirement.specifier}{why}", absent, command)


def _size(count: int) -> str:
    return f"{count / (1 << 30):.1f} GiB"


def _yes(value: bool) -> str:
    return "yes" if value else "no"
