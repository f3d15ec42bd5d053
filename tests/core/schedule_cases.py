"""Schedules and JSON values for property tests."""

from __future__ import annotations

from hypothesis import strategies as st

from qsched_core.correction import ScalarCorrection
from qsched_core.schedule import QSchedule
from qsched_core.solvers import SOLVERS
from qsched_core.trajectory import Trajectory

SIGMAS = (1.0, 0.9, 0.75, 0.5, 0.0)


def scalar_schedule(sigmas, c_x, c_eps, solver="euler", flow=True, provenance=None) -> QSchedule:
    """A schedule of two scalars a step for one solver."""
    trajectory = Trajectory.of(sigmas, solver, flow)
    return QSchedule(
        trajectory, ScalarCorrection(c_x, c_eps), {} if provenance is None else provenance
    )


RAMPED = scalar_schedule(SIGMAS, (1.0, 1.1, 1.2, 1.3), (0.9, 0.8, 0.7, 0.6))

coefficients = st.floats(0.25, 4.0)
text = st.text(st.characters(exclude_categories=("Cs",)), max_size=8)
plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**64) + 1, 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | text,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(text, inner, max_size=4),
    max_leaves=8,
)


@st.composite
def schedules(draw, apart: float = 0.0, most: int = 16):
    """Any schedule; its sigmas differ by more than a relative ``apart``."""
    steps = draw(st.integers(1, most))
    flow = draw(st.booleans())
    if apart:
        top = draw(st.floats(0.5, 1.0) if flow else st.floats(0.5, 80.0))
        shares = st.lists(st.floats(0.1, 1 - apart), min_size=steps - 1, max_size=steps - 1)
        sigmas = [top]
        for share in draw(shares):
            sigmas.append(sigmas[-1] * share)
        sigmas.append(draw(st.sampled_from([0.0, sigmas[-1] * 0.1])))
    else:
        value = st.floats(0, 1.0 if flow else 80.0)
        sigmas = draw(st.lists(value, min_size=steps + 1, max_size=steps + 1, unique=True))
    column = st.lists(coefficients, min_size=steps, max_size=steps)
    return scalar_schedule(
        sorted(sigmas, reverse=True),
        draw(column),
        draw(column),
        draw(st.sampled_from(list(SOLVERS))),
        flow,
        draw(st.dictionaries(text, plain, max_size=3)),
    )
