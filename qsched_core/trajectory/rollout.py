"""Many candidates, one batch: few-step trajectories that share what they can.

A model evaluation at step i depends on the coefficients before i alone: the first is the same for
all candidates, and candidates with a common beginning share more.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch

from ..correction import StepCorrection
from ..recent import Recent
from ..solvers import ModelInfo, NoiseSampler, sample_steps
from ..solvers.base import NoiseSource
from .trajectory import Candidate

MEMO_BYTES = 2**30


def tile(x: torch.Tensor, times: int) -> torch.Tensor:
    """[n, ...] to [times * n, ...], samples varying fastest."""
    return x.repeat(times, *[1] * (x.ndim - 1))


def per_sample_noise(
    source: NoiseSource, x: torch.Tensor, sigmas: torch.Tensor, seeds: Sequence[int], copies: int
) -> NoiseSampler:
    """Noise for a batch [copies * samples, ...] in which every sample has its own seed.

    A sample draws from ``source`` what it would draw alone, and every copy gets the same noise.
    """
    draws = [source(x[i : i + 1], sigmas, seed) for i, seed in enumerate(seeds)]
    return lambda sigma, sigma_next: tile(
        torch.cat([draw(sigma, sigma_next) for draw in draws]), copies
    )


class EvaluationMemo:
    """Model outputs by what went into the model: equal inputs are evaluated once.

    Candidates with equal coefficients in their first steps have equal latents there, and so equal
    model outputs.  All candidates share the first output; candidates that differ only in the last
    step share all of them.  Outputs are kept on the CPU; beyond ``max_bytes`` the least recently used
    are dropped.
    """

    def __init__(self, max_bytes: int = MEMO_BYTES):
        self._kept: Recent[torch.Tensor] = Recent(max_bytes)

    @staticmethod
    def key(sample: Hashable, sigma: float, x: torch.Tensor) -> bytes:
        """What identifies an evaluation of ``sample`` (its prompt and seed) at latent x."""
        digest = hashlib.blake2b(repr((sample, sigma)).encode(), digest_size=16)
        digest.update(x.detach().cpu().contiguous().view(torch.uint8).numpy())
        return digest.digest()

    def get(self, key: bytes) -> torch.Tensor | None:
        return self._kept.get(key)

    def put(self, key: bytes, output: torch.Tensor) -> None:
        if self._kept.get(key) is None:
            self._kept.put(key, output.detach().cpu().clone(), output.nbytes)


class SharedEvaluations:
    """Wraps a model for one rollout of ``candidates`` x ``samples`` latents, samples fastest.

    A candidate is not evaluated if all its latents were evaluated before, or are another
    candidate's.  ``evaluations`` counts latents that really went through the model.
    """

    def __init__(self, model, samples: Sequence[Hashable], memo: EvaluationMemo):
        self.model, self.samples, self.memo = model, samples, memo
        self.evaluations = 0

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, **extra_args) -> torch.Tensor:
        known = self.memo
        parts, level = x.split(len(self.samples)), float(sigma[0])
        keys = [
            tuple(
                known.key(sample, level, row)
                for sample, row in zip(self.samples, part, strict=True)
            )
            for part in parts
        ]
        outputs: dict[tuple[bytes, ...], torch.Tensor] = {}
        for candidate in dict.fromkeys(keys):
            rows = [known.get(key) for key in candidate]
            if all(row is not None for row in rows):
                outputs[candidate] = torch.stack(rows).to(x)
        new = [k for k, key in enumerate(keys) if key not in outputs and key not in keys[:k]]
        if new:
            batch = torch.cat([parts[k] for k in new])
            made = self.model(batch, sigma[: len(batch)], **extra_args)
            self.evaluations += len(batch)
            for k, part in zip(new, made.split(len(self.samples)), strict=True):
                outputs[keys[k]] = part
                for key, row in zip(keys[k], part, strict=True):
                    known.put(key, row)
        return torch.cat([outputs[key] for key in keys])


@dataclass(frozen=True)
class Rollout:
    """Final latents [candidates, samples, ...], and the model evaluations (NFE) they cost."""

    latents: torch.Tensor
    nfe: int


def rollout(
    model,
    x: torch.Tensor,
    sigmas: torch.Tensor,
    candidates: Sequence[Candidate],
    *,
    info: ModelInfo,
    seeds: Sequence[int],
    samples: Sequence[Hashable] | None = None,
    memo: EvaluationMemo | None = None,
    extra_args: dict | None = None,
    callback=None,
) -> Rollout:
    """Run candidates of one trajectory on the same initial latents x [samples, ...] in one batch.

    ``model(x, sigma, **extra_args)`` predicts the guided clean latent for any batch that is a
    multiple of the samples, samples varying fastest.  ``sigmas`` [steps + 1] are the trajectory's on
    the model's device; ``info`` is what its solvers need to know of the model.  ``seeds`` has one
    seed a sample, for the stochastic solvers.  ``samples`` says what each sample's outputs depend on
    beside latent and sigma (prompt and seed; its position by default), so that ``memo`` may serve
    several rollouts of one model.  Each candidate's latents are what it would get alone, up to the
    rounding of a batched model evaluation.  ValueError where the trajectories differ:
    :func:`by_trajectory` groups them.
    """
    trajectory, copies = candidates[0].trajectory, len(candidates)
    if any(candidate.trajectory != trajectory for candidate in candidates):
        raise ValueError("the candidates have several trajectories; roll out one at a time")
    named = range(len(x)) if samples is None else samples
    shared = SharedEvaluations(model, named, memo or EvaluationMemo())
    out = sample_steps(
        trajectory.bind(info),
        shared,
        tile(x, copies),
        sigmas,
        extra_args,
        callback,
        correction=_stacked(candidates),
        noise=lambda source: per_sample_noise(source, x, sigmas, seeds, copies),
    )
    return Rollout(out.unflatten(0, (copies, x.shape[0])), shared.evaluations)


def by_trajectory(candidates: Sequence[Candidate]) -> list[list[int]]:
    """Groups of candidates (their positions) that can be rolled out together, in order of appearance."""
    groups: dict[Hashable, list[int]] = {}
    for position, candidate in enumerate(candidates):
        key = (candidate.trajectory, candidate.correction.kind)
        groups.setdefault(key, []).append(position)
    return list(groups.values())


def _stacked(candidates: Sequence[Candidate]) -> StepCorrection:
    corrections = [candidate.correction for candidate in candidates]
    return type(corrections[0]).stack(corrections)
