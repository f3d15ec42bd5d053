"""Schedules as a user handles them: as text, file, picture and metadata, through a real server."""

from __future__ import annotations

import io
import json
import time

import numpy as np
import pytest
from PIL import Image

from devtools.server import ComfyServer, ServerError
from qsched_core.correction import ScalarCorrection
from qsched_core.schedule import QSchedule
from qsched_core.trajectory import Trajectory

SCHEDULE = QSchedule(
    Trajectory.of((1.0, 0.9, 0.75, 0.5, 0.0)),
    ScalarCorrection((1.02, 1.01, 1.0, 1.0), (0.95, 1.03, 0.98, 1.0)),
    {"source": "calibration", "verdict": "helps", "model": {"source": "demo"}},
)


def node(kind: str, **inputs) -> dict:
    return {"class_type": kind, "inputs": inputs}


def from_text(text: str | list | None = None) -> dict:
    return node("QSchedScheduleFromText", text=SCHEDULE.to_json() if text is None else text)


def sampled(schedule: dict, **sampler) -> dict:
    """The demo model sampled with the schedule of node 5; 8 saves the picture."""
    return {
        "1": node("CheckpointLoaderSimple", ckpt_name="qsched_demo.safetensors"),
        "2": node("CLIPTextEncode", clip=["1", 1], text="a red circle on a white background"),
        "3": node("CLIPTextEncode", clip=["1", 1], text=""),
        "4": node("EmptySD3LatentImage", width=96, height=96, batch_size=1),
        "5": schedule,
        "6": node(
            "QSchedKSampler", model=["1", 0], schedule=["5", 0], seed=5, steps=4, cfg=1.0,
            solver="euler", scheduler="simple", positive=["2", 0], negative=["3", 0],
            latent_image=["4", 0], denoise=1.0, **sampler,
        ),
        "7": node("VAEDecode", samples=["6", 0], vae=["1", 2]),
        "8": node("SaveImage", images=["7", 0], filename_prefix="schedules"),
    }  # fmt: skip


def shown(schedule: dict, *others: tuple[str, dict]) -> dict:
    """Show Schedule (9) of the schedule of node 5."""
    return {"5": schedule, "9": node("QSchedShowSchedule", schedule=["5", 0]), **dict(others)}


def text_of(server, prompt: dict) -> str:
    """The text that Show Schedule gives for a prompt."""
    return server.run(prompt)["outputs"]["9"]["text"][0]


def picture(server, prompt: dict, key: str = "8") -> np.ndarray:
    entry = server.run(prompt, timeout=300)["outputs"][key]["images"][0]
    return np.asarray(Image.open(io.BytesIO(server.image(entry))).convert("RGB"))


def listed(server) -> list[str]:
    info = server.get("/object_info/QSchedLoadSchedule")["QSchedLoadSchedule"]
    kind, options = info["input"]["required"]["schedule_name"]
    return options["options"] if kind == "COMBO" else kind


@pytest.fixture(scope="module")
def learned(server) -> QSchedule:
    """Coefficients at the demo model's own sigmas, so that no sigma has to be interpolated."""
    ramp = node(
        "QSchedRamp", model=["1", 0], solver="euler", scheduler="simple", steps=4,
        x_start=0.95, x_end=1.0, eps_start=1.06, eps_end=1.0,
    )  # fmt: skip
    model = node("CheckpointLoaderSimple", ckpt_name="qsched_demo.safetensors")
    return QSchedule.from_json(text_of(server, shown(ramp, ("1", model))))


def test_a_schedule_goes_through_its_text_unchanged(server):
    assert QSchedule.from_json(text_of(server, shown(from_text()))) == SCHEDULE


def test_the_text_can_be_wired(server):
    prompt = shown(from_text(["20", 0]))
    prompt["20"] = node("PrimitiveStringMultiline", value=SCHEDULE.to_json())
    assert QSchedule.from_json(text_of(server, prompt)) == SCHEDULE
    prompt["20"]["inputs"]["value"] = "{}"
    with pytest.raises(ServerError, match=r"QSchedScheduleFromText.*text: not a schedule"):
        server.run(prompt)


def test_the_output_of_show_schedule_is_the_input_of_from_text(server):
    prompt = shown(from_text())
    prompt["21"] = from_text(["9", 1])
    prompt["22"] = node("QSchedShowSchedule", schedule=["21", 0])
    again = server.run(prompt)["outputs"]["22"]["text"][0]
    assert again == SCHEDULE.to_json()


def test_the_page_leaves_the_texts_braces_alone(server):
    info = server.object_info()["QSchedScheduleFromText"]
    options = info["input"]["required"]["text"][1]
    assert options["dynamicPrompts"] is False
    assert options["multiline"] is True


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "text: not a schedule: the text is empty"),
        ("{'format': 'qsched'}", "not valid JSON"),
        (SCHEDULE.to_json().replace("1.03", "7.5"), "c_eps[1]=7.5 is outside"),
        (SCHEDULE.to_json().replace("0.75", "NaN"), "NaN is not a number"),
        (SCHEDULE.to_json()[:-9], "copy the whole text"),
    ],
)
def test_a_text_that_is_no_schedule_is_refused_before_anything_runs(server, text, named):
    with pytest.raises(ServerError) as error:
        server.queue(sampled(from_text(text)))
    assert "QSchedScheduleFromText" in str(error.value)
    assert named in str(error.value)


def test_text_and_file_give_the_same_picture(server, learned):
    expected = picture(server, sampled(from_text(learned.to_json()), mode="strict"))
    save = shown(from_text(learned.to_json()))
    save["10"] = node("QSchedSaveSchedule", schedule=["5", 0], name="shared/a v1.5", overwrite=True)
    server.run(save)
    loaded = node("QSchedLoadSchedule", schedule_name="shared/a v1.5.json")
    assert np.array_equal(picture(server, sampled(loaded, mode="strict")), expected)
    loaded = node("QSchedLoadSchedule", schedule_name="shared\\a v1.5.json")  # from Windows
    assert np.array_equal(picture(server, sampled(loaded, mode="strict")), expected)
    plain = from_text(QSchedule.identity(learned.trajectory).to_json())
    assert not np.array_equal(picture(server, sampled(plain)), expected)


def test_a_pictures_metadata_gives_its_schedule_and_the_picture_again(server, learned):
    prompt = sampled(from_text(learned.to_json()))
    workflow = {"nodes": [{"id": 5, "type": "QSchedScheduleFromText", "widgets_values": [
        learned.to_json()]}], "links": [], "version": 0.4}  # fmt: skip
    queued = server.queue(prompt, extra_data={"extra_pnginfo": {"workflow": workflow}})
    saved = server.wait(queued, 300)["outputs"]["8"]["images"][0]
    made = Image.open(io.BytesIO(server.image(saved)))
    carried = json.loads(made.info["prompt"])
    assert QSchedule.from_json(carried["5"]["inputs"]["text"]) == learned
    (shared,) = json.loads(made.info["workflow"])["nodes"]
    assert QSchedule.from_json(shared["widgets_values"][0]) == learned
    carried["8"]["inputs"]["filename_prefix"] = "again"
    carried["6"]["inputs"]["denoise"] = 0.99995  # the same sigmas, yet nothing from the cache
    assert np.array_equal(picture(server, carried), np.asarray(made.convert("RGB")))


def test_show_schedule_draws_it(server):
    prompt = shown(from_text())
    prompt["10"] = node("SaveImage", images=["9", 0], filename_prefix="shown")
    prompt["11"] = node("PreviewAny", source=["9", 2])
    outputs = server.run(prompt)["outputs"]
    (preview,) = outputs["9"]["images"]
    drawn = Image.open(io.BytesIO(server.image(preview)))
    assert drawn.width == 1200
    assert drawn.mode == "RGB"  # opaque: the page's theme does not shine through
    saved = Image.open(io.BytesIO(server.image(outputs["10"]["images"][0])))
    assert saved.size == drawn.size
    summary = outputs["11"]["text"][0]
    assert "step 2: sigma 0.9000  c_x 1.0100  c_eps 1.0300" in summary
    assert "verdict: helps" in summary


def edited(**edit) -> dict:
    inputs = {"step": 2, "mode": "add", "c_x": 0.0, "c_eps": 0.0} | edit
    prompt = shown(node("QSchedEditSchedule", schedule=["4", 0], **inputs))
    return prompt | {"4": from_text()}


def test_edit_schedule_nudges_a_step(server):
    result = QSchedule.from_json(text_of(server, edited(c_eps=-0.02)))
    assert result.correction.c_eps == (0.95, 1.03 - 0.02, 0.98, 1.0)
    assert result.correction.c_x == SCHEDULE.correction.c_x
    assert result.provenance["original"]["provenance"] == SCHEDULE.provenance
    assert "verdict" not in result.provenance
    result = QSchedule.from_json(text_of(server, edited(step=0, mode="multiply", c_x=1.1)))
    assert result.correction.c_x == tuple(c * 1.1 for c in SCHEDULE.correction.c_x)
    result = QSchedule.from_json(text_of(server, edited(step=4, mode="set", c_x=0.9)))
    assert (result.correction.c_x[3], result.correction.c_eps) == (0.9, SCHEDULE.correction.c_eps)
    assert QSchedule.from_json(text_of(server, edited())) == SCHEDULE


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        ({"step": 5, "c_x": 0.1}, "step=5 is not in the schedule; choose 1 to 4"),
        ({"step": 1, "c_eps": 3.9}, "c_eps of step 1=4.85 is outside"),
        ({"step": 1, "mode": "set", "c_x": 0.1}, "c_x of step 1=0.1 is outside"),
        ({"step": -1}, "step"),
        ({"mode": "scale"}, "mode: 'scale' not in"),
    ],
)
def test_an_edit_that_can_not_be_made_is_refused_with_its_value(server, edit, named):
    with pytest.raises(ServerError) as error:
        server.run(edited(**edit))
    assert named in str(error.value)


def test_files_appear_in_the_list_while_the_server_runs(server):
    folder = server.base / "models" / "qsched"
    before = set(listed(server))
    time.sleep(0.05)
    SCHEDULE.save(folder / "copied there.json")
    SCHEDULE.save(folder / "sub" / "deeper" / "there.json")
    (folder / "sub" / "note.txt").write_text("no schedule")
    (folder / "half.json.0123.partial").write_text("{")
    assert set(listed(server)) - before == {"copied there.json", "sub/deeper/there.json"}
    (folder / "copied there.json").unlink()
    assert "copied there.json" not in listed(server)
    loaded = node("QSchedLoadSchedule", schedule_name="sub/deeper/there.json")
    assert QSchedule.from_json(text_of(server, shown(loaded))) == SCHEDULE


def test_a_file_that_was_replaced_is_read_again(server):
    path = server.base / "models" / "qsched" / "replaced.json"
    prompt = shown(node("QSchedLoadSchedule", schedule_name="replaced.json"))
    for schedule in (SCHEDULE, SCHEDULE.edited({"c_x": 0.01}, 1)):
        schedule.save(path)
        assert QSchedule.from_json(text_of(server, prompt)) == schedule
    path.write_text("{")
    with pytest.raises(ServerError, match="not valid JSON"):
        server.run(prompt)


@pytest.mark.parametrize(
    "name", ["../../secret.json", "/etc/hostname", "gone.json", "", "sub", "..\\..\\secret.json"]
)
def test_only_schedules_of_the_folder_are_read(server, name):
    SCHEDULE.save(server.base / "secret.json")
    with pytest.raises(ServerError, match="schedule_name="):
        server.run(shown(node("QSchedLoadSchedule", schedule_name=name)))


def saving(name: str, overwrite: bool | None = None, schedule: QSchedule = SCHEDULE) -> dict:
    inputs = {"schedule": ["5", 0], "name": name}
    if overwrite is not None:
        inputs["overwrite"] = overwrite
    return {"5": from_text(schedule.to_json()), "10": node("QSchedSaveSchedule", **inputs)}


@pytest.mark.parametrize(
    "name", ["", "..", "../out", "/tmp/out", "C:\\out", "a.", "a/../../b", "con", "a\0b", "x" * 999]
)
def test_odd_names_are_refused_and_write_nothing(server, name):
    folder = server.base / "models" / "qsched"
    before = sorted(folder.rglob("*"))
    with pytest.raises(ServerError, match="name="):
        server.run(saving(name))
    assert sorted(folder.rglob("*")) == before
    assert not list(server.base.glob("**/out*.json"))


def test_unicode_names_are_kept(server):
    server.run(saving("\u6a21\u578b \u00e9"))
    assert "\u6a21\u578b \u00e9.json" in listed(server)


def test_a_file_is_replaced_only_if_asked(server):
    path = server.base / "models" / "qsched" / "kept.json"
    server.run(saving("kept"))
    other = SCHEDULE.edited({"c_x": 0.01}, 1)
    with pytest.raises(ServerError, match=r"name='kept': .*exists.*overwrite"):
        server.run(saving("kept", schedule=other))
    wired = saving(["20", 0], schedule=other)  # known only when it runs
    wired["20"] = node("PrimitiveString", value="kept")
    with pytest.raises(ServerError, match=r"name='kept': .*exists.*overwrite"):
        server.run(wired)
    assert QSchedule.load(path) == SCHEDULE
    server.run(saving("kept", overwrite=True, schedule=other))
    assert QSchedule.load(path) == other


def custom(sigmas: dict, schedule: dict) -> dict:
    """SamplerCustom with the sigmas of node 21."""
    prompt = sampled(schedule)
    prompt["20"] = node("QSchedSampler", schedule=["5", 0], solver="euler", mode="strict")
    prompt["21"] = sigmas
    prompt["6"] = node(
        "SamplerCustom", model=["1", 0], add_noise=True, noise_seed=5, cfg=1.0,
        positive=["2", 0], negative=["3", 0], sampler=["20", 0], sigmas=["21", 0],
        latent_image=["4", 0],
    )  # fmt: skip
    prompt["7"]["inputs"]["samples"] = ["6", 0]
    return prompt


def test_a_schedules_own_sigmas_sample_as_the_ksampler(server, learned):
    schedule = from_text(learned.to_json())
    expected = picture(server, sampled(schedule))
    for inputs in (
        {"schedule": ["5", 0]},
        {"schedule": ["5", 0], "model": ["1", 0]},
        {"model": ["1", 0], "scheduler": "simple", "steps": 4, "denoise": 1.0},
    ):
        made = picture(server, custom(node("QSchedSigmas", **inputs), schedule))
        assert np.array_equal(made, expected)


@pytest.mark.parametrize("scheduler", ["simple", "sgm_uniform", "karras", "beta", "normal"])
@pytest.mark.parametrize("denoise", [1.0, 0.5])
def test_a_models_sigmas_are_basic_schedulers(server, learned, scheduler, denoise):
    same = {"model": ["1", 0], "scheduler": scheduler, "steps": 6, "denoise": denoise}
    schedule = from_text(QSchedule.identity(learned.trajectory).to_json())
    pictures = []
    for kind in ("QSchedSigmas", "BasicScheduler"):
        prompt = custom(node(kind, **same), schedule)
        prompt["20"]["inputs"]["mode"] = "interpolate"
        pictures.append(picture(server, prompt))
    assert np.array_equal(*pictures)


def test_half_of_the_schedule_is_img2img_at_learned_sigmas(server, learned):
    """denoise 0.5 of 4 steps is KSampler's last 2 of 4: all of them learned, so strict passes."""
    schedule = from_text(learned.to_json())
    ours = custom(node("QSchedSigmas", schedule=["5", 0], denoise=0.5), schedule)
    core = sampled(schedule, mode="strict")
    core["6"]["inputs"] |= {"steps": 2, "denoise": 0.5}
    assert np.array_equal(picture(server, ours), picture(server, core))


@pytest.mark.parametrize(
    ("inputs", "named"),
    [
        ({}, "schedule and model are both missing"),
        ({"schedule": ["5", 0], "steps": 6}, "steps=6 needs a model"),
        ({"model": ["1", 0]}, "steps is as the schedule, but there is none"),
        ({"schedule": ["5", 0], "denoise": 0.0}, "denoise=0.0 must be above 0"),
        ({"model": ["1", 0], "steps": 4, "scheduler": "none"}, "scheduler"),
    ],
)
def test_sigmas_that_can_not_be_given_are_refused(server, learned, inputs, named):
    with pytest.raises(ServerError) as error:
        server.run(custom(node("QSchedSigmas", **inputs), from_text(learned.to_json())))
    assert named in str(error.value)


@pytest.mark.full
def test_folders_of_extra_model_paths_are_used_too(comfyui_path, server_args, tmp_path):
    extra, base = tmp_path / "elsewhere", tmp_path / "base"
    SCHEDULE.save(extra / "deep" / "theirs.json")
    SCHEDULE.save(base / "models" / "qsched" / "ours.json")
    config = tmp_path / "paths.yaml"
    config.write_text(f"mine:\n  base_path: {tmp_path.as_posix()}\n  qsched: elsewhere\n")
    arguments = (*server_args, "--extra-model-paths-config", str(config))
    with ComfyServer(comfyui_path, base, extra_args=arguments) as server:
        assert listed(server) == ["deep/theirs.json", "ours.json"]
        for name in listed(server):
            prompt = shown(node("QSchedLoadSchedule", schedule_name=name))
            assert QSchedule.from_json(text_of(server, prompt)) == SCHEDULE
        server.run(saving("new"))
        assert (extra / "new.json").is_file()  # the first folder, which is also looked in first
        assert "new.json" in listed(server)
