"""Few-step solvers with a correction hook, in k-diffusion's signature and sigma-space.

Each is ``sample_x(model, x, sigmas, extra_args, callback, disable, *, correction, ...)`` where
``model(x, sigma * ones, **extra_args)`` returns the guided prediction D of the clean latent and
``correction`` is a :class:`~qsched_core.precondition.Correction` or None.  With None, or with
coefficients of exactly 1, each equals ComfyUI's sampler of the same name bit for bit (ComfyUI has
no tcd).
"""

from .ancestral import sample_euler_ancestral
from .base import NoiseSampler, check_sigmas, default_noise_sampler, log_snr
from .ddim import sample_ddim
from .dpmpp import sample_dpmpp_2m, sample_dpmpp_sde
from .euler import sample_euler
from .lcm import sample_lcm
from .registry import SOLVERS, ModelFacts, Option, Solver, get_solver
from .tcd import sample_tcd

__all__ = [
    "SOLVERS",
    "ModelFacts",
    "NoiseSampler",
    "Option",
    "Solver",
    "check_sigmas",
    "default_noise_sampler",
    "get_solver",
    "log_snr",
    "sample_ddim",
    "sample_dpmpp_2m",
    "sample_dpmpp_sde",
    "sample_euler",
    "sample_euler_ancestral",
    "sample_lcm",
    "sample_tcd",
]
