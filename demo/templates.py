"""The templates of ``workflows/``, remade from the nodes' schemas: ``python -m demo.templates``.

Each is a graph for a published few-step model, with notes for the reader, a twin for scripts in
``workflows/api/`` and a thumbnail from the demo's pictures.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from devtools.graph_file import Graph, Model, Node, write
from devtools.server import ComfyServer, device_args

ROOT = Path(__file__).resolve().parent.parent
FOLDER, SHEET = ROOT / "workflows", ROOT / "docs" / "demo.png"
HUB = "https://huggingface.co"
PROMPT = (
    "a lighthouse on a cliff at dusk, warm light in its windows, waves below, detailed oil painting"
)


def _hub(path: str, directory: str) -> Model:
    """``owner/repository/file``, as the hub publishes it."""
    owner, repository, file = path.split("/", 2)
    url = f"{HUB}/{owner}/{repository}/resolve/main/{file}"
    return Model(file.rpartition("/")[2], url, directory)


@dataclass(frozen=True)
class Parts:
    """What a model's loaders give, and the settings it is made for."""

    model: tuple
    clip: tuple
    vae: tuple
    latent: str
    size: int
    scheduler: str


@dataclass(frozen=True)
class Family:
    """A published few-step model; ``load(graph, weight_format)`` adds its loaders in column 0.

    An empty format is ComfyUI's own loader.
    """

    name: str
    file: str
    load: Callable[[Graph, str], Parts]
    about: str

    def schedule(self, weight_format: str) -> str:
        """The file that Save Q-Sched Schedule makes for it."""
        return f"{self.file.removesuffix('.safetensors')}-{weight_format}-euler-4"


def _flux(graph: Graph, weight_format: str) -> Parts:
    repository = "black-forest-labs/FLUX.1-schnell"
    encoders = "comfyanonymous/flux_text_encoders"
    chosen = {"weight_format": weight_format} if weight_format else {"weight_dtype": "default"}
    model = graph.add(
        "QSchedLoadDiffusionModel" if weight_format else "UNETLoader", 0,
        unet_name="flux1-schnell.safetensors", **chosen,
        models=[_hub(f"{repository}/flux1-schnell.safetensors", "diffusion_models")],
    )  # fmt: skip
    clip = graph.add(
        "DualCLIPLoader", 0, clip_name1="t5xxl_fp16.safetensors", clip_name2="clip_l.safetensors",
        type="flux",
        models=[
            _hub(f"{encoders}/t5xxl_fp16.safetensors", "text_encoders"),
            _hub(f"{encoders}/clip_l.safetensors", "text_encoders"),
        ],
    )  # fmt: skip
    vae = graph.add(
        "VAELoader", 0, vae_name="ae.safetensors", models=[_hub(f"{repository}/ae.safetensors", "vae")]
    )  # fmt: skip
    return Parts(model[0], clip[0], vae[0], "EmptySD3LatentImage", 1024, "simple")


def _lightning(graph: Graph, weight_format: str) -> Parts:
    file = "sdxl_lightning_4step.safetensors"
    loader = graph.add(
        "QSchedLoadCheckpoint", 0, ckpt_name=file, weight_format=weight_format,
        models=[_hub(f"ByteDance/SDXL-Lightning/{file}", "checkpoints")],
    )  # fmt: skip
    return Parts(loader[0], loader[1], loader[2], "EmptyLatentImage", 1024, "sgm_uniform")


def _turbo(graph: Graph, weight_format: str) -> Parts:
    file, encoders = "sd3.5_large_turbo.safetensors", "Comfy-Org/stable-diffusion-3.5-fp8"
    loader = graph.add(
        "QSchedLoadCheckpoint", 0, ckpt_name=file, weight_format=weight_format,
        models=[_hub(f"stabilityai/stable-diffusion-3.5-large-turbo/{file}", "checkpoints")],
    )  # fmt: skip
    clip = graph.add(
        "DualCLIPLoader", 0, clip_name1="clip_g.safetensors", clip_name2="clip_l.safetensors",
        type="sd3",
        models=[
            _hub(f"{encoders}/text_encoders/clip_g.safetensors", "text_encoders"),
            _hub(f"{encoders}/text_encoders/clip_l.safetensors", "text_encoders"),
        ],
    )  # fmt: skip
    return Parts(loader[0], clip[0], loader[2], "EmptySD3LatentImage", 1024, "simple")


FLUX = Family("FLUX schnell", "flux1-schnell.safetensors", _flux, "FLUX.1 [schnell], Apache-2.0")
LIGHTNING = Family(
    "SDXL-Lightning", "sdxl_lightning_4step.safetensors", _lightning, "SDXL-Lightning, OpenRAIL++"
)
TURBO = Family(
    "SD3.5 Turbo", "sd3.5_large_turbo.safetensors", _turbo,
    "Stable Diffusion 3.5 Large Turbo, Stability Community License (accept it on the hub first)",
)  # fmt: skip


def _texts(graph: Graph, clip: tuple) -> tuple[Node, Node]:
    """The prompt, and a negative of nothing, which few-step models at cfg 1 never read."""
    positive = graph.add("CLIPTextEncode", 1, "Prompt", clip=clip, text=PROMPT)
    negative = graph.add("ConditioningZeroOut", 1, "No negative", conditioning=positive[0])
    return positive, negative


def _latent(graph: Graph, parts: Parts) -> Node:
    size = {"width": parts.size, "height": parts.size}
    return graph.add(parts.latent, 1, batch_size=1, **size)


def _picture(
    graph: Graph, column: int, parts: Parts, latent: Node, title: str, prefix: str
) -> Node:
    decoded = graph.add("VAEDecode", column, samples=latent[0], vae=parts.vae)
    return graph.add(
        "SaveImage", column, title, images=decoded[0], filename_prefix=f"qsched/{prefix}"
    )


def _corrected(graph: Graph, column: int, parts: Parts, texts, latent, title="", **more) -> Node:
    """KSampler (Q-Sched) with the settings that few-step models are made for."""
    return graph.add(
        "QSchedKSampler", column, title, model=parts.model, positive=texts[0][0],
        negative=texts[1][0], latent_image=latent[0], seed=42, steps=4, cfg=1.0, solver="euler",
        **more,
    )  # fmt: skip


def quantize(graph: Graph, family: Family) -> None:
    parts = family.load(graph, "recommended")
    texts = _texts(graph, parts.clip)
    sampler = graph.add(
        "KSampler", 2, model=parts.model, positive=texts[0][0], negative=texts[1][0],
        latent_image=_latent(graph, parts)[0], seed=42, steps=4, cfg=1.0, sampler_name="euler",
        scheduler=parts.scheduler, denoise=1.0,
    )  # fmt: skip
    _picture(graph, 2, parts, sampler, "The picture", "quantized")
    graph.note(
        0,
        "Quantize on load",
        f"**{family.about}.** The ordinary graph with one node swapped: the loader quantizes the "
        "model while it loads.\n\n"
        "*recommended* takes 8, 4 or 3 bits, whichever fits into the memory that is free, and the "
        "loader says what it chose. Missing files: the dialog that opens has the links.\n\n"
        "Next: *Learn a schedule*.",
    )


def calibrate_weights(graph: Graph, family: Family) -> None:
    parts = family.load(graph, "")
    prompts = graph.add("QSchedCalibrationPrompts", 1)
    size = {"width": parts.size, "height": parts.size}
    rounded = graph.add(
        "QSchedCalibrateWeights", 2, model=parts.model, clip=parts.clip, vae=parts.vae,
        prompts=prompts[0], solver="euler", scheduler=parts.scheduler, steps=4, cfg=1.0,
        weight_format="int3", **size,
    )  # fmt: skip
    name = family.file.removesuffix(".safetensors")
    graph.add(
        "QSchedSaveModel", 3, model=rounded[0],
        filename_prefix=f"diffusion_models/{name}-int3-calibrated",
    )  # fmt: skip
    graph.add("PreviewImage", 3, "Report", images=rounded[1])
    graph.add("PreviewAny", 3, "Report as text", source=rounded[2])
    graph.note(
        0,
        "Calibrate weights and save",
        f"**{family.about}.** Once, with the full-precision model: every layer is rounded for the "
        "inputs that it really gets. The file has 3 bits a weight and stays nearer to the original "
        "than plain rounding does; the report says by how much on prompts that it never saw.\n\n"
        "It takes long and needs room for the whole model. A stopped run goes on where it was.",
    )
    graph.note(
        3,
        "Afterwards",
        "Press R: *Load Diffusion Model (Quantized)* opens the file, with *recommended* as it was "
        "saved.",
    )


def learn(graph: Graph, family: Family) -> None:
    parts = family.load(graph, "nf4")
    prompts = graph.add("QSchedCalibrationPrompts", 1)
    named = graph.info["QSchedJAQObjective"]["input"]["required"]["clip_name"][1]["options"]
    scorer = next(label for label in named if label.startswith("ViT-B-32/"))
    objective = graph.add("QSchedJAQObjective", 1, clip_name=scorer)
    size = {"width": parts.size, "height": parts.size}
    learned = graph.add(
        "QSchedJAQCalibrator", 2, model=parts.model, clip=parts.clip, vae=parts.vae,
        prompts=prompts[0], objective=objective[0], solver="euler", scheduler=parts.scheduler,
        steps=4, cfg=1.0, **size,
    )  # fmt: skip
    saved = graph.add("QSchedSaveSchedule", 3, schedule=learned[0])
    graph.add("PreviewImage", 3, "Report", images=learned[1])
    graph.add("PreviewAny", 3, "Report as text", source=learned[2])
    graph.add("QSchedShowSchedule", 4, schedule=saved[0])
    graph.note(
        0,
        "Learn a schedule",
        f"**{family.about}.** Learns two numbers a sampling step for this model, format, solver and "
        "step count, and says whether they help on prompts that the search never saw.\n\n"
        "It takes the time of a few hundred pictures. A stopped run goes on where it was when you "
        "queue it again.",
    )
    graph.note(
        1,
        "The scorer is downloaded once",
        "Switch **allow_download** on to agree: 0.6 GB, MIT, kept in `models/clip_score`. Or choose "
        "an open_clip file that is there already.",
    )
    graph.note(
        3,
        "Where it goes",
        f"Into `models/qsched`, as `{family.schedule('nf4')}.json`. Press R, then "
        "*Use a schedule* finds it.",
    )


def use(graph: Graph, family: Family) -> None:
    parts = family.load(graph, "nf4")
    texts, latent = _texts(graph, parts.clip), _latent(graph, parts)
    loaded = graph.add(
        "QSchedLoadSchedule", 0, schedule_name=f"{family.schedule('nf4')}.json"
    )  # fmt: skip
    plain = _corrected(
        graph, 2, parts, texts, latent, "Plain: no schedule", scheduler=parts.scheduler
    )
    _picture(graph, 2, parts, plain, "Plain", "plain")
    better = _corrected(graph, 3, parts, texts, latent, "Corrected", schedule=loaded[0])
    _picture(graph, 3, parts, better, "Corrected", "corrected")
    graph.note(
        0,
        "Use a schedule",
        f"**{family.about}.** The same seed twice: the plain solver, and the one that the schedule "
        "corrects.\n\n"
        "The schedule comes from *Learn a schedule*: run that first, then press R here. *as learned* "
        "takes steps and noise levels from the schedule.",
    )


def image_to_image(graph: Graph, family: Family) -> None:
    parts = family.load(graph, "nf4")
    loaded = graph.add(
        "QSchedLoadSchedule", 0, schedule_name=f"{family.schedule('nf4')}.json"
    )  # fmt: skip
    texts = _texts(graph, parts.clip)
    image = graph.add("LoadImage", 1, "Your picture", image="example.png")
    size = {"width": parts.size, "height": parts.size}
    scaled = graph.add(
        "ImageScale", 1, image=image[0], upscale_method="lanczos", crop="center", **size
    )
    encoded = graph.add("VAEEncode", 1, pixels=scaled[0], vae=parts.vae)
    changed = _corrected(
        graph, 2, parts, texts, encoded, "Image to image", schedule=loaded[0], denoise=0.6
    )
    _picture(graph, 2, parts, changed, "Changed", "img2img")
    around = graph.add("SolidMask", 3, "Keep", value=0.0, **size)
    inside = graph.add(
        "SolidMask", 3, "Paint anew", value=1.0, width=parts.size // 2, height=parts.size // 2
    )
    mask = graph.add(
        "MaskComposite", 3, "A square in the middle", destination=around[0], source=inside[0],
        x=parts.size // 4, y=parts.size // 4, operation="add",
    )  # fmt: skip
    masked = graph.add("SetLatentNoiseMask", 3, samples=encoded[0], mask=mask[0])
    painted = _corrected(graph, 4, parts, texts, masked, "Inpaint", schedule=loaded[0])
    _picture(graph, 4, parts, painted, "Inpainted", "inpaint")
    graph.note(
        0,
        "Image to image, and inpainting",
        f"**{family.about}.** Coefficients belong to noise levels: with *denoise* below 1 the "
        "trajectory is entered in its middle, with the coefficients that belong there. Known pixels "
        "are never corrected.\n\n"
        "The schedule comes from *Learn a schedule*.",
    )
    graph.note(
        3,
        "Your own mask",
        "Right-click *Your picture*, *Open in Mask Editor*, and connect its MASK instead of the "
        "square.",
    )


def custom(graph: Graph, family: Family) -> None:
    parts = family.load(graph, "recommended")
    texts, latent = _texts(graph, parts.clip), _latent(graph, parts)
    ramp = graph.add(
        "QSchedRamp", 2, model=parts.model, solver="euler", scheduler=parts.scheduler, steps=4
    )
    sampler = graph.add("QSchedSampler", 2, schedule=ramp[0], solver="euler")
    sigmas = graph.add("QSchedSigmas", 2, schedule=ramp[0])
    noise = graph.add("RandomNoise", 3, noise_seed=42)
    guider = graph.add("BasicGuider", 3, model=parts.model, conditioning=texts[0][0])
    made = graph.add(
        "SamplerCustomAdvanced", 3, noise=noise[0], guider=guider[0], sampler=sampler[0],
        sigmas=sigmas[0], latent_image=latent[0],
    )  # fmt: skip
    _picture(graph, 4, parts, made, "The picture", "custom")
    graph.note(
        0,
        "SamplerCustomAdvanced",
        f"**{family.about}.** A corrected solver as SAMPLER and its noise levels as SIGMAS, for any "
        "guider.",
    )
    graph.note(
        2,
        "By hand, or learned",
        "The ramp's four numbers are 1: the plain solver. Nudge them, or put *Load Q-Sched Schedule* "
        "in its place.",
    )


@dataclass(frozen=True)
class Template:
    """A template's file name is the title that the browser of templates shows."""

    title: str
    family: Family
    build: Callable[[Graph, Family], None]
    rows: tuple[str, str]  # of the demo's contact sheet, for the thumbnail

    @property
    def name(self) -> str:
        return f"{self.title} - {self.family.name}"

    def graph(self, info) -> Graph:
        graph = Graph(info)
        self.build(graph, self.family)
        return graph


# The rows of the demo's contact sheet, as a template's reader calls them.
FULL, TWO, TWO_LEARNED, TWO_CALIBRATED, FOUR = (
    "full precision", "2 bits", "2 bits + schedule", "2 bits, calibrated", "4 bits",
)  # fmt: skip
ROWS = (
    FULL, TWO, TWO_LEARNED, TWO_CALIBRATED, f"{TWO_CALIBRATED} + schedule", FOUR,
    f"{FOUR}, calibrated",
)  # fmt: skip
LEFT, TOP, CELL = 180, 66, 144  # pixels of the sheet: left of and above its pictures, and a picture
TEMPLATES = (
    Template("1 Quantize on load", FLUX, quantize, (FULL, FOUR)),
    Template("1 Quantize on load", LIGHTNING, quantize, (FULL, FOUR)),
    Template("2 Calibrate weights and save", FLUX, calibrate_weights, (TWO, TWO_CALIBRATED)),
    Template("3 Learn a schedule", FLUX, learn, (TWO, TWO_LEARNED)),
    Template("3 Learn a schedule", LIGHTNING, learn, (TWO, TWO_LEARNED)),
    Template("4 Use a schedule", FLUX, use, (TWO, TWO_LEARNED)),
    Template("4 Use a schedule", LIGHTNING, use, (TWO, TWO_LEARNED)),
    Template("5 Image to image and inpaint", LIGHTNING, image_to_image, (TWO, TWO_LEARNED)),
    Template("6 SamplerCustomAdvanced", TURBO, custom, (FULL, FOUR)),
)


def thumbnail(template: Template):
    """A picture 512 x 512: two rows of the demo's contact sheet, and what they show."""
    from PIL import Image

    from qsched_core.canvas import GREY, INK, Canvas

    sheet = Image.open(SHEET).convert("RGB")
    canvas = Canvas(512, 2)
    canvas.text(24, 22, template.title, INK, 30, width=464)
    canvas.text(24, 64, template.family.name, GREY, 24, width=464)
    y = 106
    for name in template.rows:
        canvas.text(24, y, name, INK, 18)
        for place, column in enumerate((3, 4, 7)):
            left, top = LEFT + CELL * column + 2, TOP + CELL * ROWS.index(name) + 2
            picture = sheet.crop((left, top, left + CELL - 4, top + CELL - 4))
            canvas.picture(24 + 158 * place, y + 26, picture, 148, 148)
        y += 196
    return canvas.finish(512)


def make(info, folder: Path = FOLDER) -> None:
    """Write every template, its twin and its thumbnail below ``folder``."""
    (folder / "api").mkdir(parents=True, exist_ok=True)
    for template in TEMPLATES:
        write(template.graph(info), template.name, folder, folder / "api")
        thumbnail(template).save(folder / f"{template.name}.jpg", quality=85)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    comfyui = os.environ.get("COMFYUI_PATH", str(ROOT / ".host" / "ComfyUI-0.30.0"))
    parser.add_argument("--comfyui", type=Path, default=Path(comfyui))
    arguments = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as base,
        ComfyServer(arguments.comfyui, Path(base), extra_args=device_args()) as server,
    ):
        make(server.object_info())
    print(f"{len(TEMPLATES)} templates in {FOLDER}")


if __name__ == "__main__":
    main()
