"""The device of these tests' servers, and how near equal pictures are there.

The CPU, unless QSCHED_TEST_DEVICE says "cuda": test_server_on_gpu.py does, where there is a GPU.
"""

from __future__ import annotations

import os

import pytest

ON_GPU = os.environ.get("QSCHED_TEST_DEVICE", "cpu") != "cpu"
# The pack computes in bf16 on CPUs where that is fast, and ComfyUI in 16 bits on GPUs: asked for
# fp32, all give the same pictures, and those of a plain-torch task.  tests/host has the others.
SERVER_ARGS = ("--fp32-unet", *(("--fp32-vae", "--fp32-text-enc") if ON_GPU else ("--cpu",)))
GPU_JAQ = 0.02  # a GPU's sums depend on the size of the batch, and TF32 is on in convolutions


def nearly(score, tolerance: float):
    """Equal to ``score``, a JAQ or a list of them, within ``tolerance`` on a CPU."""
    return pytest.approx(score, abs=max(tolerance, GPU_JAQ) if ON_GPU else tolerance)
