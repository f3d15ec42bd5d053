"""Inputs that are wired are not known when a graph is checked: the host gives None for them."""

from __future__ import annotations

import importlib
import inspect

import inside  # ComfyUI and the pack become importable
import pytest

folders = importlib.import_module("qsched_pack.nodes.host.folders")
loading = importlib.import_module("qsched_pack.nodes.loading")
objectives = importlib.import_module("qsched_pack.nodes.objective")
schedules = importlib.import_module("qsched_pack.nodes.schedules")
scoring = importlib.import_module("qsched_pack.nodes.host.scoring")
files = importlib.import_module("qsched_pack.nodes.host.weights.files")
wired = importlib.import_module("qsched_pack.nodes.wired")


FAMILIES = [
    path.stem
    for path in sorted((inside.REPO / "nodes").glob("*.py"))
    if "\nNODES = (" in path.read_text(encoding="utf-8")
]
LOADERS = (
    loading.QSchedLoadDiffusionModel,
    loading.QSchedLoadCheckpoint,
    loading.QSchedQuantizeModel,
    loading.QSchedQuantizeTextEncoder,
)


@pytest.mark.parametrize("node", LOADERS)
def test_a_wired_choice_of_layers_is_left_to_the_run(node):
    assert node.validate_inputs(layers="nonsense") is not True
    assert node.validate_inputs(layers=None) is True


def test_a_long_objective_is_not_shown_whole():
    with pytest.raises(wired.LinkError, match="JAQ Objective; connect it") as error:
        objectives.QSchedJAQScore.execute(images=None, objective="\u202ex" * 100_000, prompts="")
    assert len(str(error.value)) < 300 and str(error.value).isprintable()


folders.register_folders()  # as the pack does when it is loaded: schemas list files
NODES = {
    node.define_schema().node_id: node
    for module in FAMILIES
    for node in importlib.import_module(f"qsched_pack.nodes.{module}").NODES
}
LINKS = ("MODEL", "CLIP", "VAE", "SAMPLER", "QSCHED_SCHEDULE", "QSCHED_PROMPTS", "QSCHED_OBJECTIVE")
ASKED = [
    (name, each.id)
    for name, node in NODES.items()
    for each in node.define_schema().inputs
    if each.get_io_type() in LINKS
]


@pytest.mark.parametrize(("name", "asked"), ASKED)
@pytest.mark.parametrize("value", [3, {"patcher": 1}, "text", ["9", 0]])
def test_a_plain_value_where_a_link_belongs_is_named(name, asked, value):
    """Graphs for scripts can have one, and ComfyUI hands it on."""
    node = NODES[name]
    names = {each.id for each in node.define_schema().inputs}
    signature = inspect.signature(node.execute).parameters
    given = {n: None for n in signature if n in names} | {asked: value}
    with pytest.raises(wired.LinkError, match=f"^{asked}=") as error:
        node.execute(**given)
    assert type(error.value).__module__ == "qsched"


def test_there_are_links_to_ask_for():
    assert len(ASKED) > 30


@pytest.mark.parametrize("name", [["a", "b", "c"], 3, {"a": 1}, None, "x" * 5000])
def test_what_is_no_name_is_no_file(name):
    """Where a list has names, a graph for scripts may have anything."""
    for find in (
        folders.schedule_path,
        folders.input_file,
        folders.prompt_set,
        scoring.scorer_path,
    ):
        with pytest.raises(ValueError, match=r"name=|file=|source="):
            find(name)
    with pytest.raises(ValueError, match="unet_name="):
        files.model_path("diffusion_models", name, "unet_name")
    said = schedules.QSchedLoadSchedule.validate_inputs(schedule_name=name)
    assert said is True if name is None else "schedule_name=" in said


CHECKED = [
    (name, asked)
    for name, node in NODES.items()
    for asked in inspect.signature(node.validate_inputs).parameters
    if "validate_inputs" in vars(node) and asked not in ("denoise", "kwargs")
]


@pytest.mark.parametrize(("name", "asked"), CHECKED)
@pytest.mark.parametrize("value", [["a", "b", "c"], {"a": 1}, 3])
def test_what_is_no_text_is_told_before_a_graph_runs(name, asked, value):
    said = NODES[name].validate_inputs(**{asked: value})
    assert said == f"{asked}={value!r} must be text"
    assert NODES[name].validate_inputs(**{asked: None}) is True
