"""Loading nodes: diffusion models in a few bits a weight."""

from __future__ import annotations

import folder_paths
from comfy_api.latest import io, ui

from ..qsched_core.formats import FORMATS
from . import host_loading

FORMAT_TOOLTIP = (
    "nf4: 4-bit weights, the safe choice. int8: 8-bit weights and activations, a file saved from it "
    "opens in plain ComfyUI. w4a8: 4-bit weights, 8-bit activations. int2: 2-bit weights, needs a "
    "learned schedule."
)
LAYERS_TOOLTIP = (
    'Overrides by layer name: "img_in|final_layer=fp16; *mlp*=nf4". The first pattern that matches '
    "decides; empty keeps the defaults."
)


def _format_inputs():
    return [
        io.Combo.Input(
            "weight_format", options=list(FORMATS), default="nf4", tooltip=FORMAT_TOOLTIP
        ),
        io.String.Input("layers", default="", optional=True, tooltip=LAYERS_TOOLTIP),
    ]


def _validate(weight_format: str, layers: str = "") -> bool | str:
    try:
        host_loading.checked_policy(weight_format, layers)
    except ValueError as error:
        return str(error)
    return True


def _text(model) -> str:
    return model.attachments[host_loading.INFO].text()


class QSchedLoadDiffusionModel(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="QSchedLoadDiffusionModel",
            display_name="Load Diffusion Model (Quantized)",
            category="QSched/loading",
            description="Load a 16-bit diffusion model and quantize it on the way, layer by layer.",
            search_aliases=["nf4", "int8", "unet loader", "quantize"],
            inputs=[
                io.Combo.Input(
                    "unet_name", options=folder_paths.get_filename_list("diffusion_models")
                ),
                *_format_inputs(),
            ],
            outputs=[io.Model.Output(), io.String.Output(display_name="info")],
        )

    @classmethod
    def validate_inputs(cls, weight_format, layers=""):
        return _validate(weight_format, layers)

    @classmethod
    def execute(cls, unet_name, weight_format, layers="") -> io.NodeOutput:
        model = host_loading.load_diffusion_model(unet_name, weight_format, layers)
        return io.NodeOutput(model, _text(model), ui=ui.PreviewText(_text(model)))


class QSchedLoadCheckpoint(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="QSchedLoadCheckpoint",
            display_name="Load Checkpoint (Quantized)",
            category="QSched/loading",
            description=(
                "Load a checkpoint with its diffusion model quantized on the way; text encoder and "
                "VAE stay as they are."
            ),
            search_aliases=["nf4", "int8", "checkpoint", "quantize"],
            inputs=[
                io.Combo.Input("ckpt_name", options=folder_paths.get_filename_list("checkpoints")),
                *_format_inputs(),
            ],
            outputs=[
                io.Model.Output(),
                io.Clip.Output(),
                io.Vae.Output(),
                io.String.Output(display_name="info"),
            ],
        )

    @classmethod
    def validate_inputs(cls, weight_format, layers=""):
        return _validate(weight_format, layers)

    @classmethod
    def execute(cls, ckpt_name, weight_format, layers="") -> io.NodeOutput:
        model, clip, vae = host_loading.load_checkpoint(ckpt_name, weight_format, layers)
        return io.NodeOutput(model, clip, vae, _text(model), ui=ui.PreviewText(_text(model)))


class QSchedQuantizeModel(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="QSchedQuantizeModel",
            display_name="Quantize Model",
            category="QSched/loading",
            description=(
                "A quantized copy of a loaded model. The input model stays usable; LoRAs on it apply "
                "to the copy at run time."
            ),
            search_aliases=["nf4", "int8", "quantize"],
            inputs=[io.Model.Input("model"), *_format_inputs()],
            outputs=[io.Model.Output(), io.String.Output(display_name="info")],
        )

    @classmethod
    def validate_inputs(cls, weight_format, layers=""):
        return _validate(weight_format, layers)

    @classmethod
    def execute(cls, model, weight_format, layers="") -> io.NodeOutput:
        out = host_loading.quantize_model(model, weight_format, layers)
        return io.NodeOutput(out, _text(out), ui=ui.PreviewText(_text(out)))


NODES = (QSchedLoadDiffusionModel, QSchedLoadCheckpoint, QSchedQuantizeModel)
