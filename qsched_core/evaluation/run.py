"""The evaluation: several arms, the same prompts and seeds in each, a part of them at a time."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import combinations
from pathlib import Path
from typing import Any

import torch

from ..correction import correction_to_json
from ..files import check_folder
from ..objective import Scores
from ..prompts import PromptSet
from ..source import Measure, Source, in_levels
from ..statistics import paired_interval
from ..study.journal import fingerprint
from ..trajectory import Candidate
from ..workspace import remove_abandoned
from .base import FeatureSpace
from .frechet import FEWEST, MOST, few_images, frechet_difference, moments
from .results import BLOCK, REFERENCES, ArmResult, Comparison, Distance, DistanceChange, Evaluation
from .study import ArmStudy, EvaluationError, Part, keep_features
from .study import kept_features as read_features

VERSION = 2  # part of every arm's name; raise it when the content of the files changes
CORE = Path(__file__).resolve().parents[1]
SOURCE_BYTES = 2**27  # of model outputs kept by a source; no prompt returns once its part is done
PART = 16  # prompts made and kept at a time; part of the name, as batches round differently


@dataclass(frozen=True)
class Arm:
    """One way of making the pictures: a model, its trajectory and the correction on it.

    ``code`` is plain JSON: the versions of the programs that make the pictures.  ``label`` is what
    a reader sees.
    """

    name: str
    source: Source
    candidate: Candidate
    label: str = ""
    code: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        object.__setattr__(self, "label", self.label or self.name)


@dataclass(frozen=True)
class Progress:
    """After each part: prompts done of ``total`` over all arms, and whether it was read from disk."""

    done: int
    total: int
    arm: Arm
    resumed: bool


def evaluate(
    arms: Sequence[Arm],
    prompts: PromptSet,
    objective: Measure,
    spaces: Sequence[FeatureSpace],
    folder: str | Path,
    *,
    baseline: str | None = None,
    references: torch.Tensor | None = None,
    part: int = PART,
    notes: Sequence[str] = (),
    on_progress: Callable[[Progress], None] | None = None,
    on_step: Callable[[Arm, int], None] | None = None,
) -> Evaluation:
    """Make and score the pictures of every arm; compare the arms, prompt by prompt.

    ``folder`` keeps every finished part of every arm.  The same call continues a run that was killed,
    to the same numbers.  Finished parts are not made again, also those of an arm that another
    evaluation had.  Pictures are scored and kept in 256 levels, as files hold them: what comes back from disk
    is what was scored, and memory holds those of one part.  Neighbouring arms of one source share
    batches.

    Frechet distances are measured from the arm ``baseline`` and from ``references``
    [m, height, width, 3], where given; ``notes`` are the caller's remarks on them.  ``on_step(arm, images)``
    is called after each sampling step of a part that makes so many images.

    EvaluationError before any picture is made if two arms are the same or ``folder`` can't hold the
    result; later if the disk fails.  Exceptions of sources and objective pass through; finished
    parts stay.
    """
    _check(arms, baseline, references, part)
    root, names = Path(folder), [space.name for space in spaces]
    studies = [
        ArmStudy(root / arm_name(arm, prompts, objective, spaces, part)[:24]) for arm in arms
    ]
    starts = range(0, len(prompts), part)
    done: list[dict[int, Part]] = []
    for study in studies:
        remove_abandoned(study.folder)
        read = {s: study.load(s, min(part, len(prompts) - s), names) for s in starts}
        done.append({start: kept for start, kept in read.items() if kept is not None})
    missing = sum(arm.source.width * arm.source.height * 3 * (len(prompts) - _count(parts))
                  for arm, parts in zip(arms, done, strict=True))  # fmt: skip
    try:
        check_folder(root, missing)
    except OSError as error:
        raise EvaluationError(str(error)) from None
    report = _Report(len(arms) * len(prompts), on_progress)
    new = [0] * len(arms)
    for group in _groups(arms):
        for start in starts:
            few = prompts.part(start, start + part)
            todo = [k for k in group if start not in done[k]]
            for k in group:
                if k not in todo:
                    report(arms[k], len(few), resumed=True)
            if not todo:
                continue
            making = _made([arms[k] for k in todo], start, few, objective, spaces, on_step)
            for k, (kept, *pictures) in zip(todo, making, strict=True):
                studies[k].keep(kept, *pictures)
                done[k][start] = kept
                new[k] += len(few)
                report(arms[k], len(few), resumed=False)
    results = tuple(
        _result(arm, study, tuple(parts[s] for s in starts), *rest)
        for arm, study, parts, *rest in zip(arms, studies, done, new, strict=True)
    )
    distances, changes = _distances(results, spaces, baseline, references, root)
    return Evaluation(
        prompts,
        results,
        tuple(_compared(*pair) for pair in combinations(results, 2)),
        distances,
        changes,
        (*_notes(results, spaces, distances), *(notes if distances else ())),
    )


def arm_name(
    arm: Arm, prompts: PromptSet, objective: Measure, spaces: Sequence[FeatureSpace], part: int
) -> str:
    """SHA-256 (hex) of everything that an arm's scores, features and pictures depend on."""
    return fingerprint(
        {
            "version": VERSION,
            "code": source_hash(CORE),
            "source": arm.source.describe(),
            "made_by": dict(arm.code),
            "trajectory": arm.candidate.trajectory.to_json(),
            "correction": correction_to_json(arm.candidate.correction),
            "prompts": prompts.hash,
            "objective": objective.describe(),
            "spaces": [dict(space.description) for space in spaces],
            "part": part,
        }
    )


@cache
def source_hash(folder: Path) -> str:
    """SHA-256 (hex) of the Python sources below ``folder``: changed code may give other numbers."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(f"{path.relative_to(folder).as_posix()}\n".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _check(arms, baseline, references, part) -> None:
    names = [arm.name for arm in arms]
    if not names or len(set(names)) < len(names):
        raise EvaluationError(f"arms={names} must be at least one, each with a name of its own")
    if baseline is not None and baseline not in names:
        raise EvaluationError(f"baseline={baseline!r} is not one of the arms {names}")
    if part < 1:
        raise EvaluationError(f"part={part} must be at least 1")
    if references is not None and (references.ndim != 4 or references.shape[-1] != 3):
        raise EvaluationError(
            f"reference images have shape {list(references.shape)}; [n, height, width, 3] is needed"
        )
    if references is not None and len(references) < 2:
        raise EvaluationError("one reference image gives no Frechet distance; give at least 2")


class _Report:
    def __init__(self, total: int, on_progress):
        self.done, self.total, self.on_progress = 0, total, on_progress

    def __call__(self, arm: Arm, count: int, resumed: bool) -> None:
        self.done += count
        if self.on_progress is not None:
            self.on_progress(Progress(self.done, self.total, arm, resumed))


def _count(parts: Mapping[int, Part]) -> int:
    return sum(len(part) for part in parts.values())


def _groups(arms: Sequence[Arm]) -> list[list[int]]:
    """Positions of the arms, neighbours with one source together."""
    groups: list[list[int]] = []
    for k, arm in enumerate(arms):
        if groups and arms[groups[-1][-1]].source is arm.source:
            groups[-1].append(k)
        else:
            groups.append([k])
    return groups


def _made(arms: Sequence[Arm], start: int, prompts: PromptSet, objective, spaces, on_step):
    """The part that begins at ``start``, its features and its pictures, for arms that share a source."""
    source = arms[0].source
    count = len(prompts) * len(arms)
    step = None if on_step is None else lambda: on_step(arms[0], count)
    began, counted = time.perf_counter(), source.nfe
    pictures = source.images(prompts, [arm.candidate for arm in arms], step)
    sampling = (time.perf_counter() - began) / len(arms)
    share, rest = divmod(source.nfe - counted, len(arms))
    for k, made in enumerate(pictures):
        began = time.perf_counter()
        images = in_levels(made)
        scores = objective.score(images, prompts.prompts)
        features = {space.name: space.encode(images).float().cpu() for space in spaces}
        seconds = sampling + time.perf_counter() - began
        yield Part(start, scores, seconds, share + (k < rest)), features, images


def _result(arm: Arm, study: ArmStudy, parts: tuple[Part, ...], new_images: int) -> ArmResult:
    return ArmResult(
        arm.name,
        arm.label,
        Scores.join([part.scores for part in parts]),
        sum(part.seconds for part in parts),
        sum(part.nfe for part in parts),
        new_images,
        study,
        parts,
    )


def _compared(before: ArmResult, after: ArmResult) -> Comparison:
    gains = {}
    if len(before.scores) > 1:
        gains = {n: paired_interval(v, after.columns[n]) for n, v in before.columns.items()}
    return Comparison(before.name, after.name, gains)


def _distances(
    results: Sequence[ArmResult],
    spaces: Sequence[FeatureSpace],
    baseline: str | None,
    references: torch.Tensor | None,
    root: Path,
) -> tuple[tuple[Distance, ...], tuple[DistanceChange, ...]]:
    if len(results[0].scores) < 2:
        return (), ()
    found, changes = [], []
    for space in spaces:
        name = space.name
        sets = {arm.name: partial(arm.features, name) for arm in results}
        targets = [target for target in sets if target == baseline]
        if references is not None:
            given = reference_features(references, space, root)
            sets[REFERENCES] = partial(given.split, BLOCK)
            targets.append(REFERENCES)
        known = {key: moments(features()) for key, features in sets.items()} if targets else {}
        for target in targets:
            arms, other = [arm.name for arm in results if arm.name != target], known[target]
            for arm in arms:
                own = known[arm]
                value = own.distance(other)
                found.append(Distance(name, own.dim, arm, target, own.count, other.count, value))
            if len(arms) < 2 or not FEWEST <= known[arms[0]].count <= MOST:
                continue
            for before, after in combinations(arms, 2):
                three = (torch.cat(list(sets[key]())) for key in (before, after, target))
                change = frechet_difference(*three, paired=target == baseline)
                changes.append(DistanceChange(name, before, after, target, change))
    return tuple(found), tuple(changes)


def reference_features(images: torch.Tensor, space: FeatureSpace, root: Path) -> torch.Tensor:
    """Features of images [n, height, width, 3]; they are kept below ``root`` and made only once."""
    digest = hashlib.sha256(str(list(images.shape)).encode())
    for image in images:
        digest.update(image.float().cpu().contiguous().numpy())
    name = fingerprint({"images": digest.hexdigest(), "space": dict(space.description)})
    path = root / f"references-{name[:24]}.safetensors"
    features = read_features(path)
    if features is None:
        features = torch.cat([space.encode(p).float().cpu() for p in images.split(PART)])
        keep_features(path, features)
    return features


def _notes(results, spaces, distances):
    count = len(results[0].scores)
    if count < 2:
        yield "one prompt gives no interval and no Frechet distance; evaluate more"
    for space in spaces:
        given = [distance for distance in distances if distance.space == space.name]
        if given:
            fewest = min(min(d.images, d.against_images) for d in given)
            few = few_images(fewest, given[0].dimensions)
            if few:
                yield f"{space.name}: {few}"
            if space.note:
                yield space.note
