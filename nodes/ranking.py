"""The ranking node: a schedule that is learned by a person's eye."""

from __future__ import annotations

from comfy_api.latest import io, ui

from ..qsched_core.calibration.beside import beside
from ..qsched_core.prompts import PromptError, PromptSet
from ..qsched_core.schedule import QSchedule
from ..qsched_core.search import CalibrationSettings
from ..qsched_core.search.ranking import CANDIDATES, LEAST, MOST, SPREAD, Rules, ranked
from ..qsched_core.study.errors import CalibrationError
from ..qsched_core.study.rankings import RankingStudy
from .choices import own_inputs
from .host.folders import studies_folder
from .host.pictures import as_tensor
from .host.progress import on_node
from .host.ranking import sheet
from .inputs import (
    negative_input,
    option_inputs,
    source_of,
    trajectory_inputs,
    with_options,
)
from .types import MAX_SEED, Objective, Prompts, Schedule
from .wired import text_only, wired

MOST_PROMPTS = 4
MOST_TEXT = 2**16  # characters: text out of a workflow is read on the thread that serves every page


class QSchedRankCandidates(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        sampled = [i for i in trajectory_inputs() if i.id not in ("prompts", "objective")]
        return io.Schema(
            node_id="QSchedRankCandidates",
            display_name="Rank Candidates",
            category="QSched/calibration",
            description=(
                "Learn coefficients by your own eye: it shows numbered pictures, you write the best "
                "first and queue again. The rankings are kept, so that you can go on another day."
            ),
            search_aliases=["rank", "by eye", "preference", "compare pictures", "human feedback"],
            inputs=[
                *sampled[:3],
                io.String.Input(
                    "prompts", default="", multiline=True,
                    tooltip=f"One a line, {MOST_PROMPTS} at most: each candidate is shown with all.",
                ),
                io.String.Input(
                    "ranking", default="",
                    tooltip='The best of the pictures that were shown, the best first: "4: 3 1 5" ranks '
                    'round 4, with 3 before 1 before 5 before the others. "=" between equals; "4: 0" '
                    "if none is better. Empty shows the round again.",
                ),
                io.String.Input(
                    "study", default="by eye", tooltip="Another name begins anew, from c = 1."
                ),
                *sampled[3:],
                io.Int.Input(
                    "seed", default=0, min=0, max=MAX_SEED,
                    control_after_generate=io.ControlAfterGenerate.fixed,
                    tooltip="Of the pictures' noise, and of the random changes. Keep it fixed.",
                ),
                io.Int.Input(
                    "candidates", default=CANDIDATES, min=LEAST, max=MOST, optional=True,
                    tooltip="Pictures in a round.",
                ),
                io.Float.Input(
                    "spread", default=SPREAD, min=0.01, max=1.0, step=0.01, optional=True,
                    advanced=True,
                    tooltip="How far the random changes go, as a share of the ramp's range.",
                ),
                negative_input(),
                *option_inputs(),
                Objective.Input(
                    "objective", optional=True,
                    tooltip="With it and heldout the report has the best's JAQ beside your rankings. "
                    "It overrules nothing.",
                ),
                Prompts.Input(
                    "heldout", optional=True,
                    tooltip="From Calibration Prompts: its held-out ones, for the objective.",
                ),
            ],
            outputs=[
                Schedule.Output(display_name="schedule", tooltip="The best so far."),
                io.Image.Output(
                    display_name="pictures", tooltip="The numbered pictures, and what to write."
                ),
                io.String.Output(
                    display_name="report", tooltip="What to write, and the best coefficients so far."
                ),
            ],
            is_output_node=True,
            accept_all_inputs=True,
        )  # fmt: skip

    @classmethod
    @own_inputs
    @text_only
    def validate_inputs(cls, prompts=None):
        """One input alone, for ComfyUI gives an error for each that is asked for here."""
        try:
            if prompts is not None:
                _prompts(prompts, 0)
        except (CalibrationError, PromptError) as error:
            return str(error)
        return True

    @classmethod
    @with_options
    @wired("model", "clip", "vae", "objective", heldout="prompts")
    def execute(
        cls, model, clip, vae, prompts, ranking, study, solver, scheduler, steps, cfg, width, height,
        seed, candidates=CANDIDATES, spread=SPREAD, negative="", objective=None, heldout=None,
        options=None,
    ) -> io.NodeOutput:  # fmt: skip
        if not study.strip():
            raise CalibrationError("study is empty; give it a name")
        if (objective is None) != (heldout is None):
            lacks = "objective" if objective is None else "heldout"
            raise CalibrationError(f"{lacks} is not connected; objective and heldout go together")
        rules, members = Rules(candidates, spread, seed=seed), _prompts(prompts, seed)
        source = source_of(
            model, clip, vae, solver, scheduler, steps, cfg, width, height, negative, options
        )
        space = CalibrationSettings("ranking").plan(source.trajectory).ramp()
        about = {
            "study": study, **source.describe(), "prompts": members.hash, "seed": seed,
            "candidates": candidates, "spread": spread, "box": space.bounds,
        }  # fmt: skip
        with RankingStudy(studies_folder(), about) as kept:
            found = ranked(kept, space, rules, ranking)
            best, judged = space.candidate(found.round.best), None
            if objective is not None:
                judged = beside(kept, source, objective, best, heldout.heldout)
        schedule = QSchedule(
            best.trajectory,
            best.correction,
            {
                "source": "ranking",
                **source.describe(),
                "rankings": {
                    "by": "a person",
                    "count": found.rankings,
                    "study": study,
                    **({} if judged is None else {"beside": judged.to_dict()}),
                },
            },
        )
        pictures = source.images(members, [space.candidate(p) for p in found.round.points])
        picture = as_tensor(sheet(pictures, found, members.prompts))
        report = f"{found.note}\n{found.rankings} rankings so far, kept in {kept.path}\n"
        report += f"the best so far: {schedule.describe()}"
        if judged is not None:
            report += f"\n{judged.text}"
        shown = ui.PreviewImage(picture, cls=cls).as_dict() | on_node(report)
        return io.NodeOutput(schedule, picture, report, ui=shown)


def _prompts(text: str, seed: int) -> PromptSet:
    """The lines of ``text``, all with one seed; CalibrationError for none or too many.

    PromptError for one that is no Unicode text."""
    if len(text) > MOST_TEXT:
        raise CalibrationError(
            f"prompts has {len(text)} characters; at most {MOST_TEXT} are read: write 1 to "
            f"{MOST_PROMPTS} prompts, one a line"
        )
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not 1 <= len(lines) <= MOST_PROMPTS:
        raise CalibrationError(
            f"prompts has {len(lines)} lines; write 1 to {MOST_PROMPTS}, one prompt a line"
        )
    return PromptSet(tuple(lines), (seed,) * len(lines))


NODES = (QSchedRankCandidates,)
