"""The commands, as a user runs them: results, resume after kill -9, exit codes, one-line errors."""

from __future__ import annotations

import copy
import csv
import json
import os
import subprocess
import sys
import time
from io import BytesIO
from pathlib import Path

import plain_task
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny_clip import CONFIG

from qsched_core.cli import calibrate, evaluate
from qsched_core.correction import ScalarCorrection
from qsched_core.schedule import QSchedule
from qsched_core.trajectory import Trajectory

open_clip = pytest.importorskip("open_clip", reason="the objective needs open_clip")
pytest.importorskip("optuna", reason="the search needs optuna")

FILE = Path(plain_task.__file__)
ROOT = FILE.parents[2]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Arguments that every command of these tests has."""
    folder = tmp_path_factory.mktemp("inputs")
    torch.manual_seed(0)
    model = open_clip.CLIP(**copy.deepcopy(CONFIG["model_cfg"]))
    save_file(
        model.state_dict(), folder / "tiny.safetensors", {"open_clip_config": json.dumps(CONFIG)}
    )
    lists = {
        "calibration": [f"thing {i}" for i in range(6)],
        "heldout": [f"other {i}" for i in range(20)],
    }
    (folder / "prompts.json").write_text(json.dumps(lists))
    return [
        "--task", f"{FILE}:quantized", "--scorer", str(folder / "tiny.safetensors"),
        "--prompts", str(folder / "prompts.json"),
    ]  # fmt: skip


def start(program: str, arguments: list[str], sleep: float = 0.0) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", f"qsched_core.{program}", *arguments],
        cwd=ROOT,
        env=os.environ | {"PLAIN_TASK_SLEEP": str(sleep), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def killed_when(process: subprocess.Popen, ready) -> None:
    deadline = time.monotonic() + 120
    while not ready():
        assert process.poll() is None and time.monotonic() < deadline, process.stdout.read()
        time.sleep(0.01)
    process.kill()
    process.wait()


def trials(folder: Path) -> int:
    return sum(path.read_bytes().count(b'"scores"') for path in folder.glob("*.journal"))


def test_a_calibration_killed_half_way_continues_to_the_same_schedule(inputs, tmp_path, capsys):
    search = [*inputs, "--search", "grid", "--budget", "16", "--no-guard"]
    whole = [*search, "--folder", str(tmp_path / "whole"), "--out", str(tmp_path / "whole.json")]
    assert calibrate.main(whole) == 0
    assert "17 trials (0 not made in this run)" in capsys.readouterr().out
    out, folder = tmp_path / "deep" / "schedule.json", tmp_path / "killed"
    again = [*search, "--folder", str(folder), "--out", str(out)]
    killed_when(start("calibrate", again, sleep=0.05), lambda: trials(folder) >= 2)
    done = trials(folder)
    assert 2 <= done < 17 and not out.exists()
    assert calibrate.main(again) == 0
    text = capsys.readouterr().out
    assert f"17 trials ({done} not made in this run)" in text and f"schedule: {out}" in text
    made, expected = QSchedule.load(out), QSchedule.load(tmp_path / "whole.json")
    assert made.correction == expected.correction and not made.is_identity
    assert made.provenance["model"]["model"] == "quantized"


def test_a_reference_gives_control_and_pre_check(inputs, tmp_path, capsys):
    controlled = [
        *inputs, "--search", "grid", "--budget", "16", "--no-guard", "--folder", str(tmp_path),
        "--reference-task", f"{FILE}:full", "--picture", str(tmp_path / "report.png"),
    ]  # fmt: skip
    assert calibrate.main([*controlled, "--out", str(tmp_path / "schedule.json")]) == 0
    text = capsys.readouterr().out
    assert "control: " in text and "pre-check: the best correction of a step removes 100.0%" in text
    provenance = QSchedule.load(tmp_path / "schedule.json").provenance
    assert provenance["control"]["lost"]["n"] == 20
    assert provenance["precheck"]["total"] == pytest.approx(1, abs=1e-4)
    for name, reason in (("other_steps", "noise levels"), ("other_model", "other weights")):
        wrong = [*controlled, "--reference-task", f"{FILE}:{name}"]
        assert calibrate.main([*wrong, "--out", str(tmp_path / "x.json")]) == 1
        assert reason in capsys.readouterr().err


def test_a_shared_study_is_searched_once(inputs, tmp_path, capsys):
    shared = [
        *inputs, "--search", "grid", "--budget", "4", "--folder", str(tmp_path),
        "--storage", f"sqlite:///{tmp_path}/study.db", "--study", "ours",
    ]  # fmt: skip
    for name, found in (("one", 0), ("two", 5)):
        assert calibrate.main([*shared, "--out", str(tmp_path / f"{name}.json")]) == 0
        assert f"5 trials ({found} not made" in capsys.readouterr().out
    one, two = (QSchedule.load(tmp_path / f"{name}.json") for name in ("one", "two"))
    assert one.correction == two.correction


def test_a_picture_that_claims_to_be_huge_is_named(tmp_path):
    picture = BytesIO()
    Image.new("RGB", (4, 4)).save(picture, "BMP")
    data = bytearray(picture.getvalue())
    data[18:26] = (10**5).to_bytes(4, "little") * 2  # width and height
    (tmp_path / "huge.bmp").write_bytes(data)
    with pytest.raises(ValueError, match=r"huge\.bmp can't be read as a picture: Image size"):
        evaluate.read_pictures(tmp_path)


def parts(folder: Path) -> int:
    return len(list(folder.glob("*/part-*.safetensors")))


def test_an_evaluation_killed_half_way_continues_to_the_same_numbers(inputs, tmp_path, capsys):
    schedule, pictures = tmp_path / "schedule.json", tmp_path / "pictures"
    sigmas = plain_task.quantized("cpu").sigmas
    QSchedule(Trajectory.of(sigmas), ScalarCorrection((1.0,) * 3, (1.5,) * 3)).save(
        schedule
    )  # 0.6 of the way becomes 0.9
    pictures.mkdir()
    for i in range(3):
        Image.new("RGB", (40 + i, 30), (80 * i, 90, 200)).save(pictures / f"{i}.png")
    asked = [
        *inputs, "--reference-task", f"{FILE}:full", "--schedule", str(schedule),
        "--reference-images", str(pictures),
    ]  # fmt: skip

    def arguments(name):
        files = {"--json": "json", "--csv": "csv", "--picture": "png", "--folder": "studies"}
        given = [[flag, str(tmp_path / f"{name}.{end}")] for flag, end in files.items()]
        return [*asked, *(part for pair in given for part in pair)]

    assert evaluate.main(arguments("whole")) == 0
    folder = tmp_path / "killed.studies"
    killed_when(start("evaluate", arguments("killed"), 0.1), lambda: parts(folder) >= 2)
    assert 2 <= parts(folder) < 6 and not (tmp_path / "killed.json").exists()
    capsys.readouterr()
    assert evaluate.main(arguments("killed")) == 0
    text = capsys.readouterr().out
    whole, killed = (json.loads((tmp_path / f"{n}.json").read_text()) for n in ("whole", "killed"))
    assert 0 < killed["new_images"] < whole["new_images"] == 60
    assert list(killed["arms"]) == ["baseline", "quantized", "schedule"]
    for name, arm in whole["arms"].items():
        assert killed["arms"][name]["scores"]["jaq"] == pytest.approx(
            arm["scores"]["jaq"], abs=1e-5
        )
    # with the schedule it makes the full model's steps
    near = {(d["arm"], d["against"]): d["value"] for d in killed["frechet"]}
    assert near["schedule", "baseline"] < 1e-6 < near["quantized", "baseline"]
    assert ("schedule", "reference images") in near
    assert "quantized + schedule against quantized" in text and "note: open_clip: " in text
    rows = list(csv.DictReader((tmp_path / "killed.csv").open()))
    assert len(rows) == 60
    assert Image.open(tmp_path / "killed.png").width == 1200
    assert evaluate.main([*arguments("killed"), "--on", "calibration"]) == 0


def test_a_schedule_of_another_solver_is_told_and_one_of_another_kind_refused(
    inputs, tmp_path, capsys
):
    sigmas, moved = plain_task.quantized("cpu").sigmas, ScalarCorrection((1.0,) * 3, (1.5,) * 3)
    other = [*inputs, "--folder", str(tmp_path), "--schedule"]
    QSchedule(Trajectory.of(sigmas, "tcd"), moved).save(tmp_path / "tcd.json")
    assert evaluate.main([*other, str(tmp_path / "tcd.json")]) == 0
    assert "learned for solver 'tcd', not 'euler'" in capsys.readouterr().out
    QSchedule(Trajectory.of(sigmas, flow=False), moved).save(tmp_path / "epsilon.json")
    assert evaluate.main([*other, str(tmp_path / "epsilon.json")]) == 1
    assert "learned for an epsilon model but this is a flow model" in capsys.readouterr().err


@pytest.mark.parametrize(
    "program,change,reason",
    [
        ("calibrate", {"--task": "nowhere.py:task"}, "no file nowhere.py"),
        ("calibrate", {"--device": "abacus"}, "device='abacus'"),
        ("calibrate", {"--scorer": "none.safetensors"}, "none.safetensors does not exist"),
        ("calibrate", {"--prompts": "none.json"}, "none.json"),
        ("calibrate", {"--heldout": "more.txt"}, "leave --heldout out"),
        ("calibrate", {"--quality": "beauty"}, "quality='beauty' is unknown"),
        ("calibrate", {"--budget": "-1"}, "budget=-1"),
        ("calibrate", {"--storage": "sqlite:///x.db"}, "study is empty"),
        ("calibrate", {"--out": "."}, ". is a folder"),
        ("evaluate", {"--schedule": "none.json"}, "none.json"),
        ("evaluate", {"--reference-images": "none"}, "none is no folder"),
        ("evaluate", {"--csv": "{file}/table.csv"}, "can't be written"),
        ("evaluate", {"--reference-task": f"{FILE}:broken"}, "gave str"),
    ],
    ids=lambda value: "".join(value) if isinstance(value, dict) else None,
)
def test_an_error_is_one_line_and_exit_code_1(
    inputs, tmp_path, capsys, monkeypatch, program, change, reason
):
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    command = {"calibrate": calibrate, "evaluate": evaluate}[program]
    arguments = [*inputs, *(["--out", "schedule.json"] if program == "calibrate" else [])]
    for flag, value in change.items():
        arguments += [flag, value.format(file=tmp_path / "file")]
    assert command.main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and reason in error
    assert not parts(tmp_path / "qsched-studies") and not trials(tmp_path / "qsched-studies")


def test_prompts_from_text_files_and_from_the_bundle(inputs, tmp_path):
    from qsched_core.cli.common import parser, prompts_of
    from qsched_core.prompts import bundled_prompts

    for name in ("one", "two"):
        (tmp_path / name).write_text(f"# {name}\na {name} thing\n\nanother {name}\n")
    asked = parser("calibrate", "").parse_args
    files = ["--prompts", str(tmp_path / "one"), "--heldout", str(tmp_path / "two")]
    prompts = prompts_of(asked(["--task", "x:y", *files, "--prompt-seed", "4"]))
    assert prompts.calibration.prompts == ("a one thing", "another one")
    assert prompts.heldout.prompts == ("a two thing", "another two")
    assert prompts_of(asked(["--task", "x:y", "--prompt-seed", "4"])) == bundled_prompts(4)
    with pytest.raises(ValueError, match=r"has no line \[heldout\]"):
        prompts_of(asked(["--task", "x:y", *files[:2]]))
    both = tmp_path / "both.txt"
    both.write_text("a one thing\nanother one\n[heldout]\na two thing\nanother two\n")
    one_file = prompts_of(asked(["--task", "x:y", "--prompts", str(both), "--prompt-seed", "4"]))
    assert one_file == prompts
    bad = tmp_path / "bad.json"
    bad.write_text('{"calibration": "a"}')
    with pytest.raises(ValueError, match=r"bad\.json must be JSON"):
        prompts_of(asked(["--task", "x:y", "--prompts", str(bad)]))


def test_an_interrupt_says_how_to_go_on(capsys):
    from qsched_core.cli.common import run

    def stopped():
        raise KeyboardInterrupt

    assert run(stopped) == 130
    assert "the same command goes on" in capsys.readouterr().err


def test_bad_arguments_are_exit_code_2(inputs, capsys):
    with pytest.raises(SystemExit) as stop:
        calibrate.main(inputs)  # no --out
    assert stop.value.code == 2 and "--out" in capsys.readouterr().err
