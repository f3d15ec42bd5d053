"""The tiny task that calibrated rounding is tested on, and its calibration prompts' states."""

from __future__ import annotations

import pytest
import rounding_task
from rounding_cases import states_of


@pytest.fixture
def task():
    return rounding_task.task()


@pytest.fixture
def states(task):
    return states_of(task)
