"""The evaluation node: what a schedule does on held-out prompts."""

from __future__ import annotations

import json
import time

import comfy.utils
from comfy_api.latest import io, ui

from ..qsched_core.precondition import ScalarCorrection
from ..qsched_core.search.guard import mean_interval, paired_interval
from . import host_scoring
from .options import OWN, chosen_options, option_inputs
from .trajectory import negative_input, objective_and_runner, trajectory_inputs
from .types import Schedule


class QSchedEvaluate(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="QSchedEvaluate",
            display_name="JAQ Evaluate",
            category="QSched/calibration",
            description=(
                "Score a model, with or without a schedule, on the held-out prompts: every image's "
                "terms, means with a 95 % bootstrap interval, and what it cost, as JSON."
            ),
            inputs=[
                *trajectory_inputs(),
                Schedule.Input(
                    "schedule", optional=True, tooltip="Without one, the base solver is scored."
                ),
                negative_input(),
                io.Boolean.Input(
                    "compare",
                    default=False,
                    optional=True,
                    tooltip="With a schedule: score the base solver too, and give the paired gain.",
                ),
                *option_inputs(),
            ],
            outputs=[
                io.String.Output(display_name="scores"),
                io.Image.Output(display_name="images"),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls, model, clip, vae, prompts, objective, solver, scheduler, steps, cfg, width, height,
        schedule=None, negative="", compare=False, eta=OWN, gamma=OWN,
    ) -> io.NodeOutput:  # fmt: skip
        sigmas, _, runner = objective_and_runner(
            model,
            clip,
            vae,
            objective,
            solver,
            scheduler,
            steps,
            cfg,
            width,
            height,
            negative,
            chosen_options(solver, eta, gamma),
        )
        identity = ScalarCorrection((1.0,) * steps, (1.0,) * steps)
        match = None if schedule is None else schedule.at(sigmas.tolist())
        chosen = identity if match is None else match.correction
        corrections = [chosen]
        if compare and chosen != identity:
            corrections.append(identity)
        started = time.perf_counter()
        batches = -(-len(prompts.heldout) * len(corrections) // runner.max_batch)
        bar = comfy.utils.ProgressBar(batches * steps, node_id=cls.hidden.unique_id)
        scored = host_scoring.ScoredRunner(
            runner, objective, on_step=lambda: bar.update(1), keep_images=True
        )
        heldout = prompts.heldout
        scores = scored(corrections, heldout)
        content = {
            "preset": objective.preset,
            "prompts": list(heldout.prompts),
            "seeds": list(heldout.seeds),
            "scores": scores[0].to_dict(),
            "means": scores[0].means(),
            "interval": mean_interval(scores[0].jaq).to_dict(),
            "c_x": list(chosen.c_x),
            "c_eps": list(chosen.c_eps),
            "note": "" if match is None else match.note,
            "model_evaluations": runner.model_evaluations,
            "seconds": time.perf_counter() - started,
            "provenance": host_scoring.graph_provenance(model, clip, vae, runner, objective),
        }
        if len(scores) > 1:
            content["base"] = {"scores": scores[1].to_dict(), "means": scores[1].means()}
            content["gain"] = paired_interval(scores[1].jaq, scores[0].jaq).to_dict()
        text = json.dumps(content)
        return io.NodeOutput(text, scored.images[chosen], ui=ui.PreviewText(text))


NODES = (QSchedEvaluate,)
