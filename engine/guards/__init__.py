"""Guards as plain Python: prompts, detectors, remedies and the loop. Nothing here runs a model."""

from ..passes import ReleaseMode
from .cascade import Calibration, Cascade, calibrate
from .detectors import Bindable, Detector, Screening
from .guard import Guard
from .heads import HarmHead, Probe
from .loop import guarded
from .remedies import Detoxify, EyesClosed, Prefilling, Refuse, Remedy, Starting
from .self_judge import SelfJudge

__all__ = [
    "Bindable",
    "Calibration",
    "Cascade",
    "Detector",
    "Detoxify",
    "EyesClosed",
    "Guard",
    "HarmHead",
    "Prefilling",
    "Probe",
    "Refuse",
    "ReleaseMode",
    "Remedy",
    "Screening",
    "SelfJudge",
    "Starting",
    "calibrate",
    "guarded",
]
