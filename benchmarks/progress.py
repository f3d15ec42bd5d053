"""How much of a long run the bar moves and the node says what is done: a page's websocket, listened to.

A real server runs the demo's model: one row for JAQ Calibrator, one for Calibrate Weights.  The bar
moves at a moment if it did so within the last ``PATIENCE`` seconds; before the node's first text
nothing says what is done, so that time does not count.  A row's ratio is that share of the node's wall
time, from its start to its end, loading of the models included.  Nothing is kept from run to run.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import struct
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from devtools.server import ComfyServer, device_args

from ._common import BenchRow, machine, report

ROWS = ("calibrator", "weights")
BOUND = 0.95
PATIENCE = 2.0  # seconds
TEXT = 3  # the kind of binary message that carries a node's text
CLIENT = "qsched-progress"
ENDS = ("execution_success", "execution_error", "execution_interrupted")


@dataclass(frozen=True)
class Heard:
    """What a page was told of a node, so many seconds after the node began: bar (0 to 1), or text."""

    at: float
    share: float | None = None
    text: str = ""


@dataclass(frozen=True)
class Run:
    """A node's run of ``seconds``, as a page heard of it; ``prompt`` is the id that it was queued by."""

    seconds: float
    heard: tuple[Heard, ...]
    prompt: str = ""

    @property
    def moves(self) -> list[float]:
        """When the bar rose."""
        found, highest = [], 0.0
        for each in self.heard:
            if each.share is not None and each.share > highest:
                found.append(each.at)
                highest = each.share
        return found

    @property
    def texts(self) -> list[tuple[float, str]]:
        return [(each.at, each.text) for each in self.heard if each.text]

    def standing(self, patience: float = PATIENCE) -> list[tuple[float, float, str]]:
        """The times in which it does not move or says nothing: from, to, the last text before."""
        said = self.texts
        named = said[0][0] if said else self.seconds
        moves = [t for t in self.moves if t >= named]
        first = moves[0] if moves else self.seconds
        found = [(0.0, first)]
        for move, following in pairwise([*moves, self.seconds]):
            found.append((move + patience, following))
        return [
            (start, end, next((text for at, text in reversed(said) if at <= start), ""))
            for start, end in found
            if end > start
        ]

    def moving(self, patience: float = PATIENCE) -> float:
        """Seconds in which the bar moves and a text says what is done."""
        return self.seconds - sum(end - start for start, end, _ in self.standing(patience))


def listen(server: ComfyServer, graph: dict, node: str) -> Run:
    """Queue ``graph``, and hear of ``node`` what its page hears; RuntimeError if it fails."""
    return asyncio.run(_listen(server, graph, node))


async def _listen(server: ComfyServer, graph: dict, node: str) -> Run:
    import aiohttp

    heard: list[Heard] = []
    began, ended = None, 0.0
    async with (
        aiohttp.ClientSession() as session,
        session.ws_connect(f"{server.url}/ws?clientId={CLIENT}", max_msg_size=0) as socket,
    ):
        prompt = await asyncio.to_thread(server.queue, graph, client_id=CLIENT)
        async for message in socket:
            now = time.monotonic()
            if message.type == aiohttp.WSMsgType.BINARY:
                text = _text(message.data, node)
                if text and began is not None:
                    heard.append(Heard(now - began, text=text))
                continue
            event = json.loads(message.data)
            kind, data = event["type"], event["data"]
            if kind == "executing":
                if data["node"] == node:  # again, where it waited for inputs that it asked for
                    began, ended = now, 0.0
                    heard.clear()
                elif began is not None and not ended:
                    ended = now
            elif kind == "progress_state" and began is not None and not ended:
                state = data["nodes"].get(node)
                if state is not None and state["state"] == "running":
                    heard.append(Heard(now - began, share=state["value"] / state["max"]))
            elif kind in ENDS:
                if kind != "execution_success" or began is None:
                    raise RuntimeError(f"{kind}: {data.get('exception_message', 'no such node')}")
                return Run((ended or now) - began, tuple(heard), prompt)
    raise RuntimeError(f"the server closed the connection:\n{server.log_tail()}")


def _text(message: bytes, node: str) -> str:
    """The text for ``node`` of a binary message, "" if it is another's or none."""
    kind, length = struct.unpack(">II", message[:8]) if len(message) >= 8 else (0, 0)
    if kind != TEXT or message[8 : 8 + length].decode() != node:
        return ""
    return message[8 + length :].decode()


def row(name: str, what: str, run: Run) -> BenchRow:
    moving = run.moving()
    return BenchRow(
        f"progress.{name}", what, moving, run.seconds, moving / run.seconds, "s", 1, machine(),
        f">= {BOUND}",
    )  # fmt: skip


def graphs(budget: int, prompts: int) -> dict[str, tuple[str, dict, str]]:
    """By row: what it is, the graph, and the node that is listened to."""
    from demo import graphs as demo

    search = demo.shipped()
    search["4"]["inputs"] |= {"search": "gp", "budget": budget}
    lists = search["2"]["inputs"]
    for key in ("calibration", "heldout"):
        lists[key] = "\n".join(lists[key].splitlines()[:prompts])
    of = (lists[key].splitlines() for key in ("calibration", "heldout"))
    weights = demo.calibrate_weights("int2", *of, "progress")
    weights["4"]["inputs"]["objective"] = ["3", 0]
    return {
        "calibrator": (f"JAQ Calibrator, {budget} candidates", search, "4"),
        "weights": ("Calibrate Weights, int2, scored", weights | {"3": search["3"]}, "4"),
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--budget", type=int, default=24, help="candidates of the search")
    parser.add_argument("--prompts", type=int, default=32, help="of each list")
    parser.add_argument("--only", nargs="+", choices=ROWS, default=ROWS)
    parser.add_argument("--verbose", action="store_true", help="when the bar stands")
    chosen = parser.parse_args(argv)
    from demo.build import build_models

    rows = []
    with tempfile.TemporaryDirectory() as name:
        build_models(Path(name) / "models")
        made = graphs(chosen.budget, chosen.prompts)
        for key, (what, graph, node) in ((key, made[key]) for key in chosen.only):
            # a server for each: what one loaded is not there for the next
            with ComfyServer(
                Path(os.environ["COMFYUI_PATH"]), Path(name), extra_args=device_args()
            ) as server:
                run = listen(server, graph, node)
            rows.append(row(key, what, run))
            for start, end, text in run.standing() if chosen.verbose else ():
                print(f"{key}: {start:.1f} to {end:.1f} of {run.seconds:.1f} s: {text!r}")
    report(rows, chosen.json)


if __name__ == "__main__":
    main()
