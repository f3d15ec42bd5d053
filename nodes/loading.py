"""Loader nodes: MODELs whose linear layers are quantized."""

from __future__ import annotations

import folder_paths
from comfy_api.latest import io, ui

from ..qsched_core.formats import get, names
from . import host_loading as host


def _format_input():
    lines = "\n".join(f"{name}: {get(name).title}" for name in names())
    return io.Combo.Input("weight_format", options=list(names()), default="nf4", tooltip=lines)


def _layers_input():
    return io.String.Input(
        "layers",
        default="",
        optional=True,
        tooltip="Other formats by layer name, e.g. img_in|final_layer=fp16; *mlp*=nf4. fp16 keeps a "
        "layer as the file has it. The last clause that matches a layer wins.",
    )


def _check(weight_format, layers) -> str | None:
    try:
        host.Request(weight_format, layers)
    except ValueError as error:
        return str(error)
    return None


def _check_file(folder: str, label: str, name: str, weight_format: str, layers: str):
    try:
        request = host.Request(weight_format, layers)
        host.check_file(host.model_path(folder, name, label), request)
    except (ValueError, OSError) as error:
        return str(error)
    return True


class QSchedLoadDiffusionModel(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="QSchedLoadDiffusionModel",
            display_name="Load Diffusion Model (Quantized)",
            category="QSched/loading",
            description="Load a full-precision diffusion model and quantize it while it loads.",
            inputs=[
                io.Combo.Input(
                    "unet_name", options=folder_paths.get_filename_list("diffusion_models")
                ),
                _format_input(),
                _layers_input(),
            ],
            outputs=[io.Model.Output(), io.String.Output(display_name="info")],
        )

    @classmethod
    def validate_inputs(cls, unet_name, weight_format, layers=""):
        return _check_file("diffusion_models", "unet_name", unet_name, weight_format, layers)

    @classmethod
    def execute(cls, unet_name, weight_format, layers="") -> io.NodeOutput:
        path = host.model_path("diffusion_models", unet_name, "unet_name")
        model = host.load_diffusion_model(path, host.Request(weight_format, layers))
        text = host.describe(host.model_info(model))
        return io.NodeOutput(model, text, ui=ui.PreviewText(text))


class QSchedLoadCheckpoint(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="QSchedLoadCheckpoint",
            display_name="Load Checkpoint (Quantized)",
            category="QSched/loading",
            description="Load a checkpoint; its diffusion model is quantized while it loads, the "
            "text encoder and the VAE stay as they are.",
            inputs=[
                io.Combo.Input("ckpt_name", options=folder_paths.get_filename_list("checkpoints")),
                _format_input(),
                _layers_input(),
            ],
            outputs=[
                io.Model.Output(),
                io.Clip.Output(),
                io.Vae.Output(),
                io.String.Output(display_name="info"),
            ],
        )

    @classmethod
    def validate_inputs(cls, ckpt_name, weight_format, layers=""):
        return _check_file("checkpoints", "ckpt_name", ckpt_name, weight_format, layers)

    @classmethod
    def execute(cls, ckpt_name, weight_format, layers="") -> io.NodeOutput:
        path = host.model_path("checkpoints", ckpt_name, "ckpt_name")
        model, clip, vae = host.load_checkpoint(path, host.Request(weight_format, layers))
        text = host.describe(host.model_info(model))
        return io.NodeOutput(model, clip, vae, text, ui=ui.PreviewText(text))


class QSchedQuantizeModel(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="QSchedQuantizeModel",
            display_name="Quantize Model",
            category="QSched/loading",
            description="A quantized copy of a model that is already loaded; the model itself stays "
            "as it is. LoRAs on it are merged before the rounding.",
            inputs=[io.Model.Input("model"), _format_input(), _layers_input()],
            outputs=[io.Model.Output(), io.String.Output(display_name="info")],
        )

    @classmethod
    def validate_inputs(cls, weight_format, layers=""):
        return _check(weight_format, layers) or True

    @classmethod
    def execute(cls, model, weight_format, layers="") -> io.NodeOutput:
        model = host.quantize_model(model, host.Request(weight_format, layers))
        text = host.describe(host.model_info(model))
        return io.NodeOutput(model, text, ui=ui.PreviewText(text))


NODES = (QSchedLoadDiffusionModel, QSchedLoadCheckpoint, QSchedQuantizeModel)
