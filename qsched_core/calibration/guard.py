"""Does it help?  The guard acts on an interval of the gain on prompts that the search never saw."""

from __future__ import annotations

from dataclasses import dataclass

from ..statistics import Interval

MIN_PROMPTS = 6  # with fewer, the skewness of the gains can't be estimated


@dataclass(frozen=True)
class Verdict:
    """``kind`` is "helps", "no effect" or "overfitted"; ``text`` gives the numbers."""

    kind: str
    text: str
    keep_identity: bool


def judge(calibration: Interval | None, heldout: Interval | None, guard: bool) -> Verdict:
    """Judge the best candidate by its gains over c = 1 on the calibration and the held-out prompts.

    Both are None if nothing beat c = 1 in the search.  With ``guard`` the schedule stays at 1
    unless the held-out interval lies above 0.
    """
    if calibration is None or heldout is None:
        text = "no effect: no candidate scored above c = 1 on the calibration prompts; c stays at 1"
        return Verdict("no effect", text, True)
    numbers = f"held-out gain {heldout}; calibration gain {calibration}"
    enough = heldout.n >= MIN_PROMPTS
    if heldout.low > 0 and enough:
        return Verdict("helps", f"helps: {numbers}", False)
    if not enough:
        kind = "no effect"
        reason = f"{heldout.n} held-out prompts are too few to tell; give at least {MIN_PROMPTS}"
    elif calibration.low > 0:
        kind = "overfitted"
        reason = "the gain on the searched prompts does not carry over to prompts it never saw"
    else:
        kind, reason = "no effect", "the gain can't be told from chance"
    action = (
        "the guard keeps c = 1"
        if guard
        else "the guard is off, so the coefficients are returned all the same"
    )
    return Verdict(kind, f"{kind}: {reason} ({numbers}); {action}", guard)
