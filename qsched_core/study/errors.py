"""What can go wrong in a calibration."""

from __future__ import annotations

from ..errors import plainly_named


@plainly_named
class CalibrationError(ValueError):
    """A calibration that can not start or go on; the message says what to change."""
