"""Loader nodes: MODELs and text encoders with quantized weights."""

from __future__ import annotations

import numpy as np
import torch
from comfy_api.latest import io, ui

from ..qsched_core.files import check_prefix
from ..qsched_core.formats.chart import draw
from ..qsched_core.formats.overrides import parse_overrides
from ..qsched_core.formats.recommend import RECOMMENDED, ordered
from ..qsched_core.formats.recommend import table as format_table
from ..qsched_core.formats.report import table
from .host.progress import on_node
from .host.weights import loading, recommended
from .host.weights.files import model_path, weight_files
from .host.weights.provenance import INFO, describe, layer_rows, model_info, report_title
from .host.weights.saving import next_paths, save_model, workflow_metadata
from .host.weights.text import quantize_text_encoder
from .wired import text_only, wired

ALIASES = (
    "quantize", "quantized", "nf4", "4-bit", "8-bit", "2-bit", "int8", "fp8", "low vram",
    "bitsandbytes", "bnb", "less memory",
)  # fmt: skip
QUANTIZED = "The model with quantized weights; it goes where any model goes."


def _format_input():
    """Workflows store the values, so these stay plain names; the tooltip has the table."""
    device = recommended.compute_device()
    return io.Combo.Input(
        "weight_format",
        options=[RECOMMENDED, *ordered(device)],
        default=RECOMMENDED,
        tooltip=f"{RECOMMENDED}: the most precise of a few that fits into the memory that is free; "
        f"the node says which. Those that run here ({device}) come first; bits are of a weight, "
        f"scales included.\n{format_table(device)}",
    )


def _layers_input():
    return io.String.Input(
        "layers",
        default="",
        optional=True,
        advanced=True,
        tooltip="Other formats by layer name, e.g. img_in|final_layer=fp16; *mlp*=nf4. fp16 keeps a "
        "layer as the file has it. The last clause that matches a layer wins.",
    )


def _info_output():
    return io.String.Output(
        display_name="info",
        tooltip="Format, sizes before and after, and what the layers run on, to be read.",
    )


def _check_layers(layers: str | None) -> bool | str:
    """What is wrong with the overrides, where they are not wired; True if nothing is.

    The loaders ask for this input alone: ComfyUI gives an error for each that is asked for.
    """
    try:
        parse_overrides(layers or "")
    except ValueError as error:
        return str(error)
    return True


def _said(note: str, info) -> str:
    """What was chosen, where the choice was ours, and what came of it."""
    return f"{note}\n{describe(info)}" if note else describe(info)


class QSchedLoadDiffusionModel(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="QSchedLoadDiffusionModel",
            display_name="Load Diffusion Model (Quantized)",
            category="QSched/loading",
            description="Load a full-precision diffusion model and quantize it while it loads.",
            search_aliases=[*ALIASES, "load unet", "unet loader", "gguf", "load diffusion model"],
            inputs=[
                io.Combo.Input(
                    "unet_name",
                    options=weight_files("diffusion_models"),
                    tooltip="A file of models/diffusion_models in full precision (fp16, bf16), or "
                    "one that Save Quantized Model wrote.",
                ),
                _format_input(),
                _layers_input(),
            ],
            outputs=[io.Model.Output(tooltip=QUANTIZED), _info_output()],
        )

    @classmethod
    @text_only
    def validate_inputs(cls, layers=""):
        return _check_layers(layers)

    @classmethod
    def execute(cls, unet_name, weight_format, layers="") -> io.NodeOutput:
        path = model_path("diffusion_models", unet_name, "unet_name")
        request, note = recommended.for_file(path, weight_format, layers)
        model = loading.load_diffusion_model(path, request)
        text = _said(note, model_info(model))
        return io.NodeOutput(model, text, ui=on_node(text))


class QSchedLoadCheckpoint(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="QSchedLoadCheckpoint",
            display_name="Load Checkpoint (Quantized)",
            category="QSched/loading",
            description="Load a checkpoint; its diffusion model is quantized while it loads, the "
            "text encoder and the VAE stay as they are.",
            search_aliases=[*ALIASES, "checkpoint loader", "load checkpoint", "sdxl", "sd1.5"],
            inputs=[
                io.Combo.Input(
                    "ckpt_name",
                    options=weight_files("checkpoints"),
                    tooltip="A file of models/checkpoints in full precision (fp16, bf16), or one "
                    "that Save Quantized Model wrote.",
                ),
                _format_input(),
                _layers_input(),
            ],
            outputs=[
                io.Model.Output(tooltip=QUANTIZED),
                io.Clip.Output(tooltip="The text encoder, as the file has it."),
                io.Vae.Output(tooltip="The VAE, as the file has it."),
                _info_output(),
            ],
        )

    @classmethod
    @text_only
    def validate_inputs(cls, layers=""):
        return _check_layers(layers)

    @classmethod
    def execute(cls, ckpt_name, weight_format, layers="") -> io.NodeOutput:
        path = model_path("checkpoints", ckpt_name, "ckpt_name")
        request, note = recommended.for_file(path, weight_format, layers)
        model, clip, vae = loading.load_checkpoint(path, request)
        text = _said(note, model_info(model))
        return io.NodeOutput(model, clip, vae, text, ui=on_node(text))


class QSchedQuantizeModel(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="QSchedQuantizeModel",
            display_name="Quantize Model",
            category="QSched/loading",
            description="A quantized copy of a model that is already loaded; the model itself stays "
            "as it is. LoRAs on it are merged before the rounding.",
            search_aliases=[*ALIASES, "quantise", "compress model", "lora"],
            inputs=[
                io.Model.Input("model", tooltip="A model in full precision; LoRAs may be on it."),
                _format_input(),
                _layers_input(),
            ],
            outputs=[io.Model.Output(tooltip=QUANTIZED), _info_output()],
        )

    @classmethod
    @text_only
    def validate_inputs(cls, layers=""):
        return _check_layers(layers)

    @classmethod
    @wired("model")
    def execute(cls, model, weight_format, layers="") -> io.NodeOutput:
        module, device = model.model.diffusion_model, model.load_device
        request, note = recommended.for_module(module, device, weight_format, layers)
        model = loading.quantize_model(model, request)
        text = _said(note, model_info(model))
        return io.NodeOutput(model, text, ui=on_node(text))


class QSchedQuantizeTextEncoder(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="QSchedQuantizeTextEncoder",
            display_name="Quantize Text Encoder",
            category="QSched/loading",
            description="A quantized copy of a text encoder; it encodes in full precision from "
            "quantized weights. LoRAs on it are merged before the rounding.",
            search_aliases=[*ALIASES, "t5", "t5xxl", "clip", "quantize clip", "gguf clip"],
            inputs=[
                io.Clip.Input("clip", tooltip="A text encoder in full precision."),
                _format_input(),
                _layers_input(),
            ],
            outputs=[
                io.Clip.Output(tooltip="The text encoder with quantized weights."),
                _info_output(),
            ],
        )

    @classmethod
    @text_only
    def validate_inputs(cls, layers=""):
        return _check_layers(layers)

    @classmethod
    @wired("clip")
    def execute(cls, clip, weight_format, layers="") -> io.NodeOutput:
        patcher = clip.patcher
        request, note = recommended.for_module(
            patcher.model, patcher.load_device, weight_format, layers
        )
        clip = quantize_text_encoder(clip, request)
        text = _said(note, clip.patcher.model_options[INFO])
        return io.NodeOutput(clip, text, ui=on_node(text))


class QSchedQuantizationReport(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="QSchedQuantizationReport",
            display_name="Quantization Report",
            category="QSched/loading",
            description="Where a model's precision goes: format, bits, size and relative weight "
            "error of every layer, as text and as a picture.",
            search_aliases=[
                "model size",
                "layer error",
                "quantization error",
                "bits",
                "inspect model",
            ],
            inputs=[io.Model.Input("model", tooltip="Any model, quantized or not.")],
            outputs=[
                io.Image.Output(
                    display_name="picture", tooltip="Size and error of every layer, drawn."
                ),
                io.String.Output("table", tooltip="The same as text, a line a layer."),
            ],
            is_output_node=True,
        )

    @classmethod
    @wired("model")
    def execute(cls, model) -> io.NodeOutput:
        rows = layer_rows(model.model.diffusion_model)
        picture = draw(rows, report_title(model))
        image = torch.from_numpy(np.asarray(picture).astype(np.float32) / 255).unsqueeze(0)
        shown = ui.PreviewImage(image, cls=cls).as_dict() | on_node(table(rows))
        return io.NodeOutput(image, table(rows), ui=shown)


class QSchedSaveModel(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="QSchedSaveModel",
            display_name="Save Quantized Model",
            category="QSched/loading",
            description="Save a quantized model to ComfyUI's output folder, where its loaders find "
            "it; with clip and vae as a checkpoint. Native formats open in plain ComfyUI.",
            search_aliases=["save model", "export", "gguf", "save checkpoint", "nf4", "4-bit"],
            inputs=[
                io.Model.Input("model", tooltip="A quantized model."),
                io.String.Input(
                    "filename_prefix",
                    default="diffusion_models/quantized",
                    tooltip="Folder and name below ComfyUI's output folder; a number is added.",
                ),
                io.Boolean.Input(
                    "merge_loras",
                    default=True,
                    optional=True,
                    tooltip="Merge the model's LoRAs into the file, or leave them out.",
                ),
                io.Clip.Input("clip", optional=True, tooltip="With it the file is a checkpoint."),
                io.Vae.Input("vae", optional=True, tooltip="With it the file is a checkpoint."),
            ],
            outputs=[io.String.Output(display_name="path", tooltip="The file that was written.")],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
            is_output_node=True,
        )

    @classmethod
    @text_only
    def validate_inputs(cls, filename_prefix=None):
        try:
            if filename_prefix is not None:  # not wired
                check_prefix(filename_prefix)
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    @wired("model", "clip", "vae")
    def execute(
        cls, model, filename_prefix, merge_loras=True, clip=None, vae=None
    ) -> io.NodeOutput:
        paths = next_paths(filename_prefix)
        extra = workflow_metadata(cls.hidden)
        path, saved = save_model(model, paths, clip, vae, merge_loras, extra)
        opens = "plain ComfyUI" if saved["kind"] == "native" else "this pack's loader nodes"
        text = f"{path}\n{describe(saved)}\n{saved['kind']}: {opens} can open it"
        return io.NodeOutput(str(path), ui=on_node(text))


NODES = (
    QSchedLoadDiffusionModel,
    QSchedLoadCheckpoint,
    QSchedQuantizeModel,
    QSchedQuantizeTextEncoder,
    QSchedQuantizationReport,
    QSchedSaveModel,
)
