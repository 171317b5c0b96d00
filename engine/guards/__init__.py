"""Guards as plain Python: prompts, detectors, remedies and the loop. Nothing here runs a model."""

from ..passes import ReleaseMode
from .cascade import Calibration, Cascade, calibrate
from .detectors import Bindable, Detector, Screening
from .generative import GenerativeGuard
from .guard import Guard
from .heads import HarmHead, Probe
from .loop import guarded
from .remedies import Detoxify, EyesClosed, Prefilling, Refuse, Remedy, Starting
from .self_judge import SelfJudge
from .templates import TEMPLATES

__all__ = [
    "TEMPLATES",
    "Bindable",
    "Calibration",
    "Cascade",
    "Detector",
    "Detoxify",
    "EyesClosed",
    "GenerativeGuard",
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
