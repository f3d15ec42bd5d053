"""What can go wrong in a calibration."""

from __future__ import annotations


class CalibrationError(ValueError):
    """A calibration that can not start or go on; the message says what to change."""
