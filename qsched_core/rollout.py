"""Many candidates, one batch: few-step trajectories that share what they can.

A model evaluation at step i depends on the coefficients before i alone: the first is the same for
all candidates, and candidates with a common beginning share more.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch

from .precondition import BatchCorrection, ScalarCorrection
from .recent import Recent
from .solvers import ModelFacts, NoiseSampler, Solver, get_solver

MEMO_BYTES = 2**30


def tile(x: torch.Tensor, times: int) -> torch.Tensor:
    """[n, ...] to [times * n, ...], samples varying fastest."""
    return x.repeat(times, *[1] * (x.ndim - 1))


def per_sample_noise(
    solver: Solver, x: torch.Tensor, sigmas: torch.Tensor, seeds: Sequence[int], candidates: int
) -> NoiseSampler:
    """Noise for a batch [candidates * samples, ...] in which every sample has its own seed.

    A sample draws what ``solver`` would draw for it alone, and every candidate gets the same noise.
    """
    draws = [solver.noise(x[i : i + 1], sigmas, seed) for i, seed in enumerate(seeds)]
    return lambda sigma, sigma_next: tile(
        torch.cat([draw(sigma, sigma_next) for draw in draws]), candidates
    )


class EvaluationMemo:
    """Model outputs by what went into the model: equal inputs are evaluated once.

    Candidates that agree on their first steps' coefficients share those steps' latents, and so the
    model's outputs there: all candidates share the first one, those that differ in the last step
    alone share every one.  Outputs are kept on the CPU, the least recently used given up beyond
    ``max_bytes``.
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

    A candidate all of whose latents were evaluated before, or are another candidate's, is not
    evaluated.  ``evaluations`` counts latents that really went through the model.
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
    """Final latents [candidates, samples, ...] and what they cost."""

    latents: torch.Tensor
    evaluations: int


def rollout(
    model,
    x: torch.Tensor,
    sigmas: torch.Tensor,
    corrections: Sequence[ScalarCorrection],
    *,
    solver: str,
    facts: ModelFacts,
    seeds: Sequence[int],
    options: Mapping[str, float] | None = None,
    samples: Sequence[Hashable] | None = None,
    memo: EvaluationMemo | None = None,
    extra_args: dict | None = None,
    callback=None,
) -> Rollout:
    """Run every correction on the same initial latents x [samples, ...] in one batch.

    ``model(x, sigma, **extra_args)`` predicts the guided clean latent for any batch that is a
    multiple of the samples, samples varying fastest.  ``seeds`` has one seed a sample, for the
    stochastic solvers; ``options`` are the solver's own.  ``samples`` says what each sample's
    outputs depend on beside latent and sigma (prompt and seed; its position by default), so that
    ``memo`` may serve several rollouts of one model.  Each candidate's latents are what it would get
    alone, up to the rounding of a batched model evaluation.
    """
    entry = get_solver(solver)
    candidates = len(corrections)
    named = range(len(x)) if samples is None else samples
    shared = SharedEvaluations(model, named, memo or EvaluationMemo())
    arguments = entry.bind(facts, **(options or {}))
    if entry.stochastic:
        arguments["noise_sampler"] = per_sample_noise(entry, x, sigmas, seeds, candidates)
    out = entry.function(
        shared,
        tile(x, candidates),
        sigmas,
        extra_args=extra_args,
        callback=callback,
        correction=BatchCorrection.of(corrections),
        **arguments,
    )
    return Rollout(out.unflatten(0, (candidates, x.shape[0])), shared.evaluations)
