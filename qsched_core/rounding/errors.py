"""What keeps weights from being calibrated."""

from __future__ import annotations


class RoundingError(ValueError):
    """Weights that can't be calibrated as asked; the message names the layer or value and the fix."""
