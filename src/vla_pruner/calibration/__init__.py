"""Calibration: how far each way of pruning moves the action on recorded observations, and which is fast enough."""

from vla_pruner.calibration.agreement import Agreement, agreement
from vla_pruner.calibration.command import calibrate
from vla_pruner.calibration.errors import CalibrationError
from vla_pruner.calibration.recordings import Recordings, find_recordings
from vla_pruner.calibration.result import ArmCalibration, Calibration
from vla_pruner.calibration.settings import CalibrateSettings

__all__ = [
    "Agreement",
    "ArmCalibration",
    "CalibrateSettings",
    "Calibration",
    "CalibrationError",
    "Recordings",
    "agreement",
    "calibrate",
    "find_recordings",
]
