"""What keeps weights from being calibrated."""

from __future__ import annotations

from ..errors import plainly_named


@plainly_named
class RoundingError(ValueError):
    """Weights that can't be calibrated as asked; the message names the layer or value and the fix."""
