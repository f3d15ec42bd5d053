"""Inputs that are a word or a number, and graphs of before, which have a plain number there."""

from __future__ import annotations

import io
import json

import pytest
from PIL import Image

from devtools.graph_file import DYNAMIC
from devtools.server import ServerError

TEXT = json.dumps(
    {
        "format": "qsched", "version": 1, "solver": "euler", "flow": True,
        "sigmas": [1.0, 0.75, 0.5, 0.25, 0.0],
        "correction": {"kind": "scalar", "c_x": [1.1, 1.0, 1.0, 1.0], "c_eps": [1.0] * 4},
        "provenance": {},
    }
)  # fmt: skip


def node(class_type: str, **inputs) -> dict:
    return {"class_type": class_type, "inputs": inputs}


def sampled(**more) -> dict:
    """A picture of the demo's model by a solver that draws noise."""
    return {
        "1": node("CheckpointLoaderSimple", ckpt_name="qsched_demo.safetensors"),
        "2": node("CLIPTextEncode", clip=["1", 1], text="a red circle"),
        "3": node("EmptySD3LatentImage", width=96, height=96, batch_size=1),
        "4": node(
            "QSchedKSampler", model=["1", 0], seed=5, steps=3, cfg=1.0, positive=["2", 0],
            negative=["2", 0], latent_image=["3", 0], denoise=1.0, scheduler="simple",
            **{"solver": "euler_ancestral"} | more,
        ),
        "5": node("VAEDecode", samples=["4", 0], vae=["1", 2]),
        "6": node("SaveImage", images=["5", 0], filename_prefix="choices"),
        "8": node("PrimitiveFloat", value=0.25),
        "9": node("PrimitiveInt", value=3),
        "10": node("PrimitiveFloat", value=3.0),
    }  # fmt: skip


def picture(server, **more) -> bytes:
    """Its pixels: the file has the graph, too."""
    (made,) = server.run(sampled(**more))["outputs"]["6"]["images"]
    return Image.open(io.BytesIO(server.image(made))).tobytes()


def test_a_solvers_option_is_its_own_or_a_number_in_graphs_of_today_and_before(server):
    own = picture(server)
    chosen = picture(server, **{"eta": "number", "eta.number": 0.25})
    assert chosen != own
    for same in ({"eta": "solver's own"}, {"eta": -1.0}, {"eta": -1, "gamma": "solver's own"}):
        assert picture(server, **same) == own
    wired = [{"eta": ["8", 0]}, {"eta": "number", "eta.number": ["8", 0]}]
    for same in ({"eta": 0.25}, {"eta": "0.25", "gamma": -1.0}, *wired):
        assert picture(server, **same) == chosen


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"eta": 7}, r'eta=7 must be "solver\'s own" or a number from 0 to 1'),
        ({"eta": -0.5}, "eta=-0.5 must be"),
        ({"eta": "much"}, "eta='much' must be"),
        ({"eta": 10**400}, "eta=1000.* must be"),
        ({"eta": "nan"}, "eta='nan' must be"),
        ({"eta": {"eta": "number"}}, "eta=.* must be"),
        ({"eta": ["9", 0]}, "eta=3 must be"),
        ({"eta": "number", "eta.number": ["10", 0]}, "eta=3.0 must be"),
        ({"eta": "number", "eta.number": 7}, r"eta\.number"),
        ({"eta": "number"}, r"Required input is missing.*number"),
        ({"gamma": 0.5}, "gamma=0.5 is no option of solver euler_ancestral"),
    ],
)
def test_another_is_refused_with_what_it_may_be(server, given, said):
    with pytest.raises(ServerError, match=said):
        server.run(sampled(**given))


def edited(server, **step) -> list[float]:
    prompt = {
        "1": node("QSchedScheduleFromText", text=TEXT),
        "2": node("QSchedEditSchedule", schedule=["1", 0], mode="add", c_x=0.5, c_eps=0.0, **step),
        "3": node("QSchedShowSchedule", schedule=["2", 0]),
    }
    return json.loads(server.run(prompt)["outputs"]["3"]["text"][0])["correction"]["c_x"]


def test_an_edit_is_of_one_step_or_of_all(server):
    assert edited(server, step=2) == [1.1, 1.5, 1.0, 1.0]
    assert edited(server, **{"step": "one step", "step.number": 2}) == [1.1, 1.5, 1.0, 1.0]
    for step in (0, "all steps"):
        assert edited(server, step=step) == [1.6, 1.5, 1.5, 1.5]


def test_sigmas_are_as_many_as_the_schedule_has_or_a_number(server):
    def levels(**steps) -> str:
        prompt = {
            "1": node("CheckpointLoaderSimple", ckpt_name="qsched_demo.safetensors"),
            "2": node("QSchedScheduleFromText", text=TEXT),
            "3": node("QSchedSigmas", schedule=["2", 0], model=["1", 0], **steps),
            "4": node("PreviewAny", source=["3", 0]),
        }
        return server.run(prompt)["outputs"]["4"]["text"][0]

    four, six = levels(), levels(steps=6)
    assert four != six
    assert levels(steps=0) == levels(steps="as the schedule") == levels(steps=4) == four
    assert levels(**{"steps": "number", "steps.number": 6}) == six


def test_every_number_of_before_has_its_choice(server, repo_root):
    """tests/golden/nodes.json says what the inputs were."""
    golden = json.loads((repo_root / "tests/golden/nodes.json").read_text(encoding="utf-8"))
    info, changed = server.object_info(), set()
    for name, before in golden.items():
        for group in ("required", "optional"):
            for entry in before[group]:
                if "was" not in entry:
                    continue
                kind, options = info[name]["input"][group][entry["name"]]
                changed.add(entry["name"])
                assert kind == DYNAMIC
                (field,) = (
                    o["inputs"]["required"].get("number")
                    for o in options["options"]
                    if o["inputs"]["required"]
                )
                assert field[0] == entry["was"]["type"]
                assert field[1]["min"] <= field[1]["default"] <= field[1]["max"]
                # What stood for the word is no number that the field takes, but for eta and gamma.
                assert not field[1]["min"] <= 0 or entry["name"] in ("eta", "gamma")
    assert changed == {"eta", "gamma", "budget", "low", "high", "level_grid", "steps", "step"}


def test_a_prompt_that_a_page_of_before_queued_is_taken(server, repo_root):
    """What the page shows of the same workflow: tests/browser/test_old_workflows.py."""
    path = repo_root / "tests/golden/workflows/numbers-for-words-api.json"
    prompt = json.loads(path.read_text(encoding="utf-8"))
    content = json.loads(server.request("/prompt", {"prompt": prompt}))
    server.request("/queue", {"clear": True})
    server.interrupt()
    assert content["node_errors"] == {}
