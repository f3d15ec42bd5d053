"""The node that rounds a model's weights for the inputs that its prompts give them."""

from __future__ import annotations

import json

from comfy_api.latest import io, ui

from ..qsched_core.formats.recommend import ordered
from ..qsched_core.formats.recommend import table as format_table
from ..qsched_core.rounding import GRIDS, calibrate_weights, figures, report, verdict
from ..qsched_core.rounding.budget import Budget
from ..qsched_core.rounding.picture import report_picture
from ..qsched_core.rounding.sized import calibrate_to_size, sized_figures, sized_report
from ..qsched_core.rounding.web import report_page
from .choices import own_inputs
from .host.folders import rounding_folder
from .host.pictures import as_tensor
from .host.progress import RoundingLive, on_node
from .host.weights import recommended
from .host.weights.calibrated import ComfySubject, ReportFile
from .host.weights.loading import Request
from .host.weights.provenance import model_info
from .inputs import (
    negative_input,
    option_inputs,
    source_of,
    trajectory_inputs,
    with_options,
)
from .types import MAX_SEED, Objective
from .wired import text_only, wired

OWN_SIZE = "of the format"
REPORT = "{model}-{format}-report"
WALKS = 3  # for a size: the mix, and the formats next to it
SIZES = {"bits a weight": "bits", "GB of the model": "gb"}


class QSchedCalibrateWeights(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        device = recommended.compute_device()
        formats = [name for name in ordered(device) if name in GRIDS]
        shared = [i for i in trajectory_inputs() if i.id not in ("model", "objective")]
        return io.Schema(
            node_id="QSchedCalibrateWeights",
            display_name="Calibrate Weights",
            category="QSched/loading",
            description=(
                "Quantize a model with weights that are rounded for the inputs they really get: the "
                "same size and speed, and pictures nearer to the unquantized model's. That is proven "
                "on the held-out prompts; where it fails, plain rounding is what comes out. A run "
                "that was stopped continues where it was when the same graph is queued again."
            ),
            search_aliases=[
                "calibrate",
                "gptq",
                "imatrix",
                "importance matrix",
                "quantize my model",
                "2-bit",
                "3-bit",
                "4-bit",
                "int2",
                "int3",
                "nf4",
                "gguf",
                "better quantization",
            ],
            inputs=[
                io.Model.Input("model", tooltip="The unquantized model. Its LoRAs are rounded in."),
                *shared,
                io.Combo.Input(
                    "weight_format",
                    options=formats,
                    default="int3",
                    tooltip="How the weights are stored; bits are of a weight, scales included.\n"
                    + format_table(device, formats),
                ),
                Objective.Input(
                    "objective",
                    optional=True,
                    tooltip="With it the report says what the rounding does to JAQ, too.",
                ),
                io.Int.Input(
                    "states_per_prompt",
                    default=4,
                    min=1,
                    max=1000,
                    optional=True,
                    tooltip="How many random steps of each prompt the weights are rounded for, at "
                    "most all. Many prompts with few steps are better than few with many.",
                ),
                io.Combo.Input(
                    "size",
                    options=[OWN_SIZE, *SIZES],
                    default=OWN_SIZE,
                    optional=True,
                    tooltip="Whose size the model gets: the format's, or a number of bits or GB. For "
                    "a number every layer gets a format of its own, from int2 to int8, by what each "
                    "costs the pictures; the mix is kept only if it beats the formats next to it in "
                    "size. That takes three walks.",
                ),
                io.Float.Input(
                    "amount",
                    default=3.0,
                    min=0.1,
                    max=1000.0,
                    step=0.1,
                    round=0.001,
                    optional=True,
                    tooltip="How many bits a weight, or GB (1e9 bytes), where size asks for a number.",
                ),
                io.String.Input(
                    "layers",
                    default="",
                    optional=True,
                    advanced=True,
                    tooltip="Other formats by layer name, e.g. img_in|final_layer=fp16; *mlp*=nf4. "
                    "fp16 keeps a layer as it is. The last clause that matches a layer wins.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=MAX_SEED,
                    optional=True,
                    advanced=True,
                    control_after_generate=io.ControlAfterGenerate.fixed,
                    tooltip="Of the choice of steps. Another one rounds anew.",
                ),
                negative_input(),
                *option_inputs(),
                io.String.Input(
                    "report_name",
                    default=REPORT,
                    optional=True,
                    advanced=True,
                    tooltip="Writes NAME.html into the output folder: figures, layers and pictures "
                    "in one page to post. {model} and {format} are filled in. Another report is "
                    "never replaced: the name gets a number. Empty writes nothing.",
                ),
            ],
            outputs=[
                io.Model.Output(
                    display_name="model",
                    tooltip="The model with calibrated weights, or plain ones where they are as good.",
                ),
                io.Image.Output(
                    display_name="report_image", tooltip="Figures, layers and pictures."
                ),
                io.String.Output(display_name="report", tooltip="The same figures as text."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
            accept_all_inputs=True,
        )

    @classmethod
    @own_inputs
    @text_only
    def validate_inputs(cls, weight_format=None):
        """One input alone, for ComfyUI gives an error for each that is asked for here."""
        if weight_format is None:  # wired: checked when it runs
            return True
        try:
            Request(weight_format).check_device()
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    @with_options
    @wired("model", "clip", "vae", "prompts", "objective")
    def execute(
        cls, model, clip, vae, prompts, solver, scheduler, steps, cfg, width, height, weight_format,
        objective=None, states_per_prompt=4, size=OWN_SIZE, amount=3.0, layers="", seed=0,
        negative="", report_name="", options=None,
    ) -> io.NodeOutput:  # fmt: skip
        request = Request(weight_format, layers)
        request.check_device()
        named = weight_format if size == OWN_SIZE else f"{amount:g}-{SIZES[size]}"
        file = ReportFile.of(report_name, model, named)

        walks = 1 if size == OWN_SIZE else WALKS
        live = RoundingLive(cls.hidden.unique_id, walks, prompts)

        def source(of):
            sampling = (solver, scheduler, steps, cfg, width, height, negative, options)
            made = source_of(of, clip, vae, *sampling, memory=0)
            made.on_encoded = live.prompt_encoded
            return made

        subject = ComfySubject(source(model), request, source)
        walk = {
            "states_per_prompt": min(states_per_prompt, subject.source.trajectory.steps),
            "seed": seed,
            "measure": objective,
            "samples": True,
            "on_block": live.block,
            "on_part": live.part,
            "limits": subject.limits(live.within),
        }
        given = (subject, prompts, request.policy, rounding_folder())
        content, lines = {}, []
        if size == OWN_SIZE:
            result = calibrate_weights(*given, **walk)
        else:
            found = calibrate_to_size(*given, Budget(**{SIZES[size]: amount}), **walk)
            result, lines = found.result, sized_report(found).splitlines()
            content = {"size": sized_figures(found)}
        made = subject.with_weights(result.weights)
        info = model_info(made)
        title = f"{file.model or 'model'}: {info['format']}"
        picture, text = report_picture(result, title), "\n".join([report(result), *lines])
        sizes = info["unquantized_bytes"], info["weight_bytes"]
        files = file.save(report_page(result, title, sizes, lines))
        live.finished(picture)
        shown = ui.PreviewImage(as_tensor(picture), cls=cls).as_dict()
        content |= {"report": text, "files": [str(path) for path in files]}
        said = [f"{line}." for line in (verdict(result), *result.remarks, *lines)]
        said += [f"report: {path}" for path in files]
        shown |= on_node("\n".join(said), json.dumps(figures(result) | content))
        return io.NodeOutput(made, as_tensor(picture), text, ui=shown)


NODES = (QSchedCalibrateWeights,)
