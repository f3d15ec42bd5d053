"""The pack inside a real server: it loads whole, its nodes are described, errors are readable."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import sys

import aiohttp
import pytest

from devtools.graph_file import DYNAMIC
from devtools.imports import imports_of
from devtools.server import PACK_NAME, ComfyServer, ServerError


@pytest.fixture(scope="module")
def nodes_of_pack(server) -> dict[str, dict]:
    return {k: v for k, v in server.object_info().items() if k.startswith("QSched")}


def test_pack_is_imported_whole(server):
    log = server.log.read_text(encoding="utf-8", errors="replace")
    assert PACK_NAME in log
    assert "IMPORT FAILED" not in log
    assert re.findall(r"the \w+ nodes are off.*", log) == []


def test_the_pack_imports_nothing_heavy_at_start(server):
    """What ComfyUI has not imported itself (optuna, open_clip, bitsandbytes, ...) waits for its use."""
    log = server.log.read_text(encoding="utf-8", errors="replace")
    began = log.split("To see the GUI go to")[0]
    found = imports_of(began, PACK_NAME)
    modules = {module.name for root in found for module in root.all()}
    assert any(
        name.endswith("nodes.calibration") or "qsched_core.search" in name for name in modules
    )
    packages = {name.partition(".")[0] for name in modules if PACK_NAME not in name}
    ours = {
        "comfy",
        "comfy_api",
        "comfy_extras",
        "comfyui_version",
        "folder_paths",
        "latent_preview",
    }
    assert packages - set(sys.stdlib_module_names) <= ours


def test_every_declared_node_is_served(nodes_of_pack, repo_root):
    declared = set()
    for path in (repo_root / "nodes").glob("*.py"):
        declared |= set(re.findall(r"node_id=\"(\w+)\"", path.read_text(encoding="utf-8")))
    assert declared
    assert set(nodes_of_pack) == declared


def test_the_nodes_of_an_earlier_version_are_still_there(nodes_of_pack, repo_root):
    """What it had: the same inputs first and in that order, for workflows store widgets by place."""
    golden = json.loads((repo_root / "tests/golden/nodes.json").read_text(encoding="utf-8"))
    assert set(nodes_of_pack) >= set(golden)
    for name, before in golden.items():
        node = nodes_of_pack[name]
        for group in ("required", "optional"):
            order = node["input_order"].get(group, [])
            assert order[: len(before[group])] == [i["name"] for i in before[group]], name
            for wanted in before[group]:
                kind, *more = node["input"][group][wanted["name"]]
                options = more[0] if more else {}
                where = f"{name}.{wanted['name']}"
                assert kind == wanted["type"], where
                assert options.get("default") == wanted.get("default"), where
                choices = [o["key"] if kind == DYNAMIC else o for o in options.get("options", ())]
                assert set(choices) >= set(wanted.get("options", ())), where
        outputs = [list(pair) for pair in zip(node["output"], node["output_name"], strict=True)]
        assert outputs[: len(before["outputs"])] == before["outputs"], name


def test_every_node_says_what_it_is(nodes_of_pack):
    for name, node in nodes_of_pack.items():
        assert node["category"].split("/")[0] == "QSched", name
        assert node["display_name"] not in ("", name), name
        assert len(node["description"] or "") > 20, name
        assert node["python_module"].endswith(PACK_NAME), name


def test_every_input_and_output_says_what_it_is(nodes_of_pack):
    """And a user finds every node by words of his own."""
    silent = []
    for name, node in nodes_of_pack.items():
        for group in ("required", "optional"):
            for key, spec in node["input"].get(group, {}).items():
                if not (len(spec) > 1 and spec[1].get("tooltip")):
                    silent.append(f"{name}.{key}")
        told = node.get("output_tooltips") or [None] * len(node["output"])
        silent += [
            f"{name} -> {o}" for o, text in zip(node["output"], told, strict=True) if not text
        ]
        assert len(node.get("search_aliases") or ()) >= 3, name
    assert silent == []


def test_formats_that_run_here_come_first(nodes_of_pack):
    options = nodes_of_pack["QSchedLoadCheckpoint"]["input"]["required"]["weight_format"][1]
    first, *names = options["options"]
    assert first == options["default"] == "recommended"
    lines = options["tooltip"].splitlines()[-len(names) :]
    assert [line.partition(":")[0] for line in lines] == names
    refused = ["NOT HERE" in line for line in lines]
    assert refused == sorted(refused)
    assert not refused[0]


def test_no_widget_takes_a_list(nodes_of_pack):
    """In an API prompt every list is read as a link."""
    for name, node in nodes_of_pack.items():
        for group in node["input"].values():
            for key, spec in group.items():
                default = spec[1].get("default") if len(spec) > 1 else None
                assert not isinstance(default, list), f"{name}.{key}"


def test_only_the_pack_adds_names_of_the_pack(server):
    info = server.object_info()
    ours = {k for k, v in info.items() if v["category"].startswith("QSched")}
    assert ours == {k for k in info if k.startswith("QSched")}


def test_refused_prompt_names_node_and_input(server):
    prompt = {
        "1": {
            "class_type": "EmptySD3LatentImage",
            "inputs": {"width": 96, "height": 96, "batch_size": 0},
        },
        "2": {"class_type": "SaveLatent", "inputs": {"samples": ["1", 0], "filename_prefix": "x"}},
    }
    with pytest.raises(ServerError, match=r"node 1 \(EmptySD3LatentImage\).*batch_size"):
        server.run(prompt)


def test_failed_prompt_names_node_and_reason(server):
    prompt = {
        "1": {
            "class_type": "EmptySD3LatentImage",
            "inputs": {"width": 96, "height": 96, "batch_size": 1},
        },
        "2": {
            "class_type": "CheckpointLoaderSimple",
            "inputs": {"ckpt_name": "qsched_demo.safetensors"},
        },
        "3": {"class_type": "VAEEncode", "inputs": {"pixels": ["4", 0], "vae": ["2", 2]}},
        "4": {"class_type": "LoadImage", "inputs": {"image": "broken.png"}},
        "5": {"class_type": "SaveLatent", "inputs": {"samples": ["3", 0], "filename_prefix": "x"}},
    }
    (server.base / "input" / "broken.png").write_bytes(b"not a picture")
    with pytest.raises(ServerError, match=r"node 4 \(LoadImage\): "):
        server.run(prompt)


def test_progress_reaches_the_websocket(server, demo_prompt):
    prompt = demo_prompt("a blue square on a white background", seed=11, steps=3)
    events = asyncio.run(_events_of(server, prompt))
    steps = [data["value"] for kind, data in events if kind == "progress" and data["node"] == "5"]
    assert steps[-1] == 3
    assert steps == sorted(steps)
    assert events[-1][0] == "execution_success"


async def _events_of(server: ComfyServer, prompt: dict) -> list[tuple[str, dict]]:
    """What a client hears about its prompt, to the end."""
    return await asyncio.wait_for(_listen(server, prompt), 120)


async def _listen(server: ComfyServer, prompt: dict) -> list[tuple[str, dict]]:
    events, client = [], "qsched-test"
    async with (
        aiohttp.ClientSession() as session,
        session.ws_connect(f"{server.url}/ws?clientId={client}") as socket_,
    ):
        prompt_id = await asyncio.to_thread(server.queue, prompt, client_id=client)
        async for message in socket_:
            if message.type != aiohttp.WSMsgType.TEXT:
                continue  # previews
            event = json.loads(message.data)
            if event["data"].get("prompt_id") != prompt_id:
                continue
            events.append((event["type"], event["data"]))
            if event["type"] in ("execution_success", "execution_error"):
                break
    return events


def test_a_taken_port_is_said_before_anything_starts(comfyui_path, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ServerError, match=f"port {port} is taken"):
            ComfyServer(comfyui_path, tmp_path, port=port).start()


def test_a_server_that_dies_shows_its_log(comfyui_path, tmp_path):
    server = ComfyServer(comfyui_path, tmp_path, extra_args=("--no-such-option",))
    with pytest.raises(ServerError, match="no-such-option"):
        server.start()
    assert server.process.poll() is not None


def test_a_mistake_is_one_error_at_its_own_input(server):
    """ComfyUI tells of each input that a node's own validation asks for."""
    prompt = {
        "1": {
            "class_type": "QSchedJAQCalibrator",
            "inputs": {"search": "luck", "low": "number", "low.number": 2.0},
        },
    }
    with pytest.raises(ServerError) as refused:
        server.run(prompt)
    text = str(refused.value)
    assert text.count("luck") == 1
    assert text.count("low.number") == 1
