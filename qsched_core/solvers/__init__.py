"""Few-step solvers with a correction hook, in sigma-space.

Each is a factory of updates (one step from a corrected prediction) under one loop, ``integrate``;
``get_solver(name).function`` is the solver alone in k-diffusion's signature, where
``model(x, sigma * ones, **extra_args)`` returns the guided prediction D of the clean latent and
``correction`` is a :class:`~qsched_core.correction.StepCorrection` or None.  With None, or with one
that changes nothing, each equals ComfyUI's sampler of the same name bit for bit (ComfyUI has no
tcd, dpm_2m or lms_2).
"""

from .ancestral import sample_euler_ancestral
from .base import NoiseSampler, check_sigmas, default_noise_sampler
from .ddim import sample_ddim
from .dpmpp import sample_dpm_2m, sample_dpmpp_2m, sample_dpmpp_sde
from .euler import sample_euler
from .lcm import sample_lcm
from .lms import sample_lms_2
from .registry import SOLVERS, ModelInfo, Option, Solver, get_solver
from .res import sample_res_multistep
from .sequence import BoundSolver, sample_steps
from .tcd import sample_tcd

__all__ = [
    "SOLVERS",
    "BoundSolver",
    "ModelInfo",
    "NoiseSampler",
    "Option",
    "Solver",
    "check_sigmas",
    "default_noise_sampler",
    "get_solver",
    "sample_ddim",
    "sample_dpm_2m",
    "sample_dpmpp_2m",
    "sample_dpmpp_sde",
    "sample_euler",
    "sample_euler_ancestral",
    "sample_lcm",
    "sample_lms_2",
    "sample_res_multistep",
    "sample_steps",
    "sample_tcd",
]
