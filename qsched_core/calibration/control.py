"""The control: what the learned coefficients do to the model that was not quantized.

Coefficients that raise an objective need not repair anything: they may sharpen any picture.  On the
unquantized model there is nothing to repair, so what they gain there is no repair.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..objective import Scores
from ..statistics import Interval, paired_interval


@dataclass(frozen=True)
class Control:
    """Held-out scores of the unquantized model at c = 1 and with the best coefficients.

    All are gains in JAQ, paired by prompt.  ``gain``: the unquantized model's.  ``own``: the
    quantized model's.  ``repair`` = ``own`` - ``gain``.  ``lost``: what quantization cost at
    c = 1.
    """

    before: Scores
    after: Scores
    gain: Interval
    repair: Interval
    lost: Interval
    own: Interval

    @classmethod
    def of(cls, before: Scores, after: Scores, quantized: tuple[Scores, Scores]) -> Control:
        """From the scores of the reference, and those of the quantized model before and after."""
        gains = [np.subtract(b.jaq, a.jaq).tolist() for a, b in ((before, after), quantized)]
        return cls(
            before,
            after,
            paired_interval(before.jaq, after.jaq),
            paired_interval(*gains),
            paired_interval(quantized[0].jaq, before.jaq),
            paired_interval(quantized[0].jaq, quantized[1].jaq),
        )

    @property
    def kind(self) -> str:
        """ "repair", "sharpening" (no more than any model gains) or "unclear"."""
        if self.repair.low > 0 and self.own.low > 0:
            return "repair"
        return "sharpening" if self.gain.low > 0 else "unclear"

    @property
    def text(self) -> str:
        said = {
            "repair": "the gain is more than the unquantized model's: repair",
            "sharpening": (
                "the unquantized model gains too, and the difference can't be told from 0: no repair "
                "can be told from what these coefficients do to any picture"
            ),
            "unclear": "whether this is repair can't be told on these prompts",
        }[self.kind]
        return (
            f"control: {said} (unquantized model's gain {self.gain}; the quantized model's beyond "
            f"it {self.repair}; quantization cost {self.lost})"
        )

    def to_dict(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "text": self.text,
            "before": self.before.means(),
            "after": self.after.means(),
            "gain": self.gain.to_dict(),
            "repair": self.repair.to_dict(),
            "lost": self.lost.to_dict(),
        }
