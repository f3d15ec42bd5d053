"""Two real servers on one folder and one database: nothing is overwritten, and they agree."""

from __future__ import annotations

import json
import re
import tempfile
from collections import Counter
from pathlib import Path

from devtools.server import ComfyServer, ServerError

from . import graphs
from .cases import Failure, Outcome, Setting

ATTACK = "servers"
FORMATS = ("int8", "nf4")  # the first server's and the second's: by these a file tells its writer


MOST_SAVES = 15  # of each: each has other layers, or ComfyUI would not run it again


def _saves(servers: tuple[ComfyServer, ...], count: int, base: Path) -> list[str]:
    """Problems of ``count`` saved models of each server, all under one name."""
    queued = []
    for number in range(count):  # in turn, so that both are at it all the time
        for server, form in zip(servers, FORMATS, strict=True):
            kept = (f"joint_blocks.{block}=keep" for block in range(4) if number >> block & 1)
            prompt = graphs.saving(form, "models/both", "; ".join(kept))
            queued.append((server, form, server.queue(prompt)))
    problems, written = [], []
    for server, form, prompt in queued:
        try:
            text = server.wait(prompt)["outputs"]["2"]["text"][0]
        except ServerError as error:
            problems.append(f"a save failed: {error}")
            continue
        written.append((Path(re.search(r"\S*both_\d+_\.safetensors", text)[0]), form))
    twice = [path for path, times in Counter(path for path, _ in written).items() if times > 1]
    problems += [f"{path.name} was reported as saved twice" for path in twice]
    for path, form in written:
        found = _format_of(path)
        if found != form:
            problems.append(f"{path.name} was saved in {form} and holds {found}")
    left = [p.name for p in (base / "output" / "models").iterdir() if ".partial" in p.name]
    return problems + [f"{name} was left behind" for name in left]


def _format_of(path: Path) -> str:
    from safetensors import safe_open

    try:
        with safe_open(path, framework="np") as file:
            return json.loads(file.metadata()["qsched"])["format"]
    except Exception as error:  # whatever a half file makes the library raise
        return f"nothing that opens ({type(error).__name__})"


def _search(servers: tuple[ComfyServer, ...], study: str) -> list[str]:
    """Problems of one search that both were given: the schedules must be one."""
    prompt = graphs.calibrating("int2", 0, storage="together", study=study)
    queued = [(server, server.queue(prompt)) for server in servers]
    reports = []
    for server, prompt_id in queued:
        try:
            entry = server.wait(prompt_id)
        except ServerError as error:
            return [f"a search failed: {error}"]
        reports.append(json.loads(entry["outputs"]["4"]["text"][0]))
    one, other = (json.loads(report["schedule"])["correction"] for report in reports)
    problems = [] if one == other else [f"the servers' schedules differ: {one}, {other}"]
    made = sum(report["new_trials"] for report in reports)
    trials = len(reports[0]["trials"])
    if made != trials:
        problems.append(f"{trials} trials were evaluated {made} times")
    return problems


def run(setting: Setting) -> Outcome:
    saves, searches = min(MOST_SAVES, max(1, setting.size)), max(1, setting.size // 4)
    problems: list[str] = []
    with tempfile.TemporaryDirectory(dir=setting.work) as name:
        base = Path(name)
        graphs.models(base)
        with graphs.server(base) as first, graphs.server(base) as second:
            both = (first, second)
            problems += _saves(both, saves, base)
            setting.tell(f"  {2 * saves} saves, {len(problems)} failures")
            for number in range(searches):
                problems += _search(both, f"study {setting.seed} {number}")
            setting.tell(f"  {searches} shared searches, {len(problems)} failures in all")
    case = {"size": setting.size, "seed": setting.seed}
    failures = [Failure(ATTACK, case, problem) for problem in problems]
    note = f"two servers, one folder, one database: {2 * saves} saves, {searches} searches"
    return Outcome(2 * saves + searches, failures, note)


def again(failure: Failure) -> str:
    with tempfile.TemporaryDirectory() as name:
        found = run(Setting(failure.case["size"], failure.case["seed"], Path(name)))
    return "; ".join(f.problem for f in found.failures)
