"""Damaged workflows posted to a real server: it answers each at once, and stays as it was.

What it accepts is stopped again after a moment: a workflow may ask for any amount of work.
"""

from __future__ import annotations

import json
import random
import shutil
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

from devtools.server import PACK_NAME, ComfyServer, ServerError
from qsched_core.files import write_atomic

from . import graphs, mutate
from .cases import Failure, Outcome, Setting
from .kinds import GOLDEN

ATTACK = "workflows"
MODEL = "int8.safetensors"
SECONDS = 2.0  # for an answer; a busy machine gets another chance
RUNS = 0.5  # seconds that an accepted workflow has before it is stopped
OURS = (
    f"custom_nodes/{PACK_NAME}/"  # in a traceback; the host may lie in a folder of the pack's name
)
ENDS = 120.0  # seconds within which it must have stopped
# Errors of this pack, and of what its docstrings name beside them.
DOCUMENTED = ("qsched.", "ValueError", "FileExistsError", "InterruptProcessingException")

SCHEDULE = {
    "format": "qsched", "version": 1, "solver": "euler", "flow": True, "sigmas": [1.0, 0.75, 0.0],
    "correction": {"kind": "scalar", "c_x": [1.0, 1.0], "c_eps": [1.05, 1.0]},
}  # fmt: skip


def samples() -> list[bytes]:
    """Whole workflows with this pack's nodes, small enough to be run."""
    schedule = json.dumps(SCHEDULE)
    text = graphs.sampling("nf4", 1)
    text["4"] = graphs.node("QSchedScheduleFromText", text=schedule)
    text["8"] = graphs.node("QSchedEditSchedule", schedule=["4", 0], step=0, mode="add")
    text["9"] = graphs.node("QSchedShowSchedule", schedule=["8", 0])
    text["10"] = graphs.node("QSchedSaveSchedule", schedule=["8", 0], name="mutants/x")
    text["11"] = graphs.node("QSchedQuantizationReport", model=["1", 0])
    files = {
        "1": graphs.node(
            "QSchedLoadDiffusionModel", unet_name=MODEL, weight_format="int8", layers=""
        ),
        "2": graphs.node("QSchedQuantizationReport", model=["1", 0]),
        "3": graphs.node("QSchedLoadSchedule", schedule_name="of a user.json"),
        "4": graphs.node("QSchedShowSchedule", schedule=["3", 0]),
    }
    made = [
        graphs.sampling("int8", 1), text, graphs.evaluating("nf4", 1), graphs.calibrating("int2", 1),
        graphs.saving("int8", "mutants/model", "joint_blocks.0=keep"), graphs.wired("nf4", 1),
        graphs.ranking("int2", 1), graphs.rounding("int3"), files,
    ]  # fmt: skip
    return [json.dumps(prompt).encode() for prompt in made]


def place(base: Path) -> None:
    """The files that the samples name, in a server's base folder."""
    graphs.models(base)
    models = base / "models" / "diffusion_models"
    models.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(GOLDEN / "models" / MODEL, models / MODEL)
    write_atomic(base / "models" / "qsched" / "of a user.json", json.dumps(SCHEDULE))


def mutant_of(found: list[bytes], seed: int, index: int) -> bytes:
    """The body of a POST: a mutated workflow; one in twenty bodies is damaged as a whole."""
    chance = random.Random(f"{seed}/workflow/{index}")
    data = mutate.of_json(chance.choice(found), chance)
    while kills_the_host(data):
        data = mutate.of_json(chance.choice(found), chance)
    body = b'{"prompt": ' + data + b"}"
    return mutate.of_bytes(body, chance) if chance.random() < 0.05 else body


def kills_the_host(data: bytes) -> bool:
    """Whether a node has no inputs at all: ComfyUI's (0.30.0) worker ends of it, whoever's node it is.

    The node must be one that no output needs; then it is not validated, and its key is built all the same.
    """
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        return False
    nodes = content.values() if isinstance(content, dict) else ()
    return any(
        isinstance(node, dict) and not isinstance(node.get("inputs"), dict) for node in nodes
    )


def _post(server: ComfyServer, body: bytes) -> tuple[int, bytes]:
    request = urllib.request.Request(
        f"{server.url}/prompt", body, {"Content-Type": "application/json"}
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=60) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def problem_of(server: ComfyServer, body: bytes) -> str:
    """Post it: "", or what is wrong with the answer or with the run."""
    for attempt in range(3):
        began = time.monotonic()
        try:
            status, answer = _post(server, body)
        except OSError as error:
            return f"no answer: {type(error).__name__}: {error}"
        took = time.monotonic() - began
        if took < SECONDS:
            break
        time.sleep(attempt)
    else:
        return f"the answer took {took:.1f} s, three times"
    if status not in (200, 400):
        # the host's own reader of workflows fails so, before it asks a node of this pack
        last = server.log_tail(40).rpartition("Traceback (most recent")[2]
        return f"status {status}: {last[-600:]}" if OURS in last else ""
    content = json.loads(answer)
    for found in (content.get("node_errors") or {}).values():
        for error in found["errors"]:
            # A link to nowhere makes the host's own check raise, for any pack's node.
            trace = "".join(error.get("extra_info", {}).get("traceback", ()))
            if error["type"] == "exception_during_validation" and OURS in trace:
                return f"validation raised: {error['details'][:300]}"
    return _stopped(server, content["prompt_id"]) if "prompt_id" in content else ""


def _stopped(server: ComfyServer, prompt_id: str) -> str:
    """Let it run for a moment, stop it, and look at what it raised."""
    began, told = time.monotonic(), False
    while time.monotonic() - began < ENDS:
        entry = server.get(f"/history/{prompt_id}").get(prompt_id)
        if entry is not None:
            return _raised(entry)
        if time.monotonic() - began > RUNS and not told:
            server.request("/queue", {"clear": True})
            server.interrupt()
            told = True
        if told and not any(server.get("/queue").values()):
            return ""  # it was taken out of the queue before it began
        time.sleep(0.02)
    return f"it did not stop within {ENDS:.0f} s"


def _raised(entry: dict) -> str:
    for kind, detail in entry["status"]["messages"]:
        if kind == "execution_error" and detail["node_type"].startswith("QSched"):
            name = detail["exception_type"]
            if not name.startswith(DOCUMENTED):
                return f"{detail['node_type']}: undocumented {name}: {detail['exception_message'][:300]}"
    return ""


def run(setting: Setting) -> Outcome:
    found, failures, accepted = samples(), [], 0
    with tempfile.TemporaryDirectory(dir=setting.work) as name:
        base = Path(name)
        place(base)
        with graphs.server(base) as server:
            for body in found:
                server.run(json.loads(body))
            before = _files(base)
            for index in range(setting.size):
                body = mutant_of(found, setting.seed, index)
                problem = problem_of(server, body)
                if problem:
                    case = {"seed": setting.seed, "index": index}
                    failures.append(Failure(ATTACK, case, problem, body))
                if server.process.poll() is not None:
                    failures.append(Failure(ATTACK, {"index": index}, "the server died", body))
                    break
            accepted = len(server.get("/history"))
            outside = _files(base) - before
    failures += [Failure(ATTACK, {"path": path}, f"a file outside: {path}") for path in outside]
    setting.tell(f"  {setting.size} workflows, {accepted} of them ran, {len(failures)} failures")
    note = f"damaged workflows posted to a real server; {accepted} of them were valid and ran"
    return Outcome(setting.size, failures, note)


def _files(base: Path) -> set[str]:
    """Files that no workflow may write: all but outputs, studies, schedules, and the host's own."""
    allowed = ("output", "temp", "user", "models/qsched")
    names = (path.relative_to(base).as_posix() for path in base.rglob("*") if path.is_file())
    return {name for name in names if not name.startswith((*allowed, "custom_nodes", "server-"))}


def again(failure: Failure) -> str:
    with tempfile.TemporaryDirectory() as name:
        place(Path(name))
        with graphs.server(Path(name)) as server:
            try:
                return problem_of(server, failure.data)
            except ServerError as error:
                return str(error)
