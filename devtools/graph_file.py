"""A graph of ComfyUI nodes, written in code, as the two files that ComfyUI knows.

One is what the page opens: places, sizes, widgets in their order.  The other is what a server takes.
Both come from the nodes' schemas (``/object_info``), so that they can be made anew when these change.
"""

from __future__ import annotations

import json
import math
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

DYNAMIC = "COMFY_DYNAMICCOMBO_V3"  # a list whose choice decides which inputs follow
WIDGETS = ("COMBO", DYNAMIC, "INT", "FLOAT", "STRING", "BOOLEAN")
COLUMN, GAP_X, GAP_Y = 460, 90, 80  # pixels; room for the larger of both canvases' nodes
PICTURE = 420  # below the widgets of a node that shows a picture
SHOWS_PICTURES = ("SaveImage", "PreviewImage", "LoadImage", "QSchedJAQCalibrator", "QSchedCalibrateWeights",
                  "QSchedShowSchedule", "QSchedEvaluate", "QSchedQuantizationReport")  # fmt: skip


@dataclass(frozen=True)
class Model:
    """A file that a loader needs, as ComfyUI's dialog of missing models reads it."""

    name: str
    url: str
    directory: str


@dataclass
class Node:
    """A node of the graph; ``node[i]`` is its output i, to be given as another node's input."""

    key: int
    kind: str
    title: str
    column: int
    inputs: dict[str, Any]
    models: Sequence[Model] = ()
    place: tuple[int, int] = (0, 0)
    size: tuple[int, int] = (COLUMN, 100)

    def __getitem__(self, output: int) -> tuple[Node, int]:
        return self, output


@dataclass
class Graph:
    """Nodes and notes in columns.  ``info`` is the server's ``/object_info``."""

    info: Mapping[str, Any]
    nodes: list[Node] = field(default_factory=list)
    notes: list[tuple[int, str, str]] = field(default_factory=list)  # column, title, text

    def add(
        self, kind: str, column: int, title: str = "", models: Sequence[Model] = (), **inputs
    ) -> Node:
        """A node of ``kind``; ``inputs`` are widget values, or outputs of other nodes.

        ValueError for an input that its schema does not have, or one that is missing.
        """
        schema = self._schema(kind, inputs)
        unknown = set(inputs) - set(schema)
        missing = {n for n, (spec, needed) in schema.items() if needed and not _default(spec)}
        if unknown or missing - set(inputs):
            raise ValueError(f"{kind}: unknown {unknown}, missing {missing - set(inputs)}")
        name = title or self.info[kind]["display_name"]
        node = Node(len(self.nodes) + 1, kind, name, column, inputs, models)
        self.nodes.append(node)
        return node

    def note(self, column: int, title: str, text: str) -> None:
        """A text for the reader, above the column's nodes."""
        self.notes.append((column, title, text))

    def _schema(self, kind: str, given: Mapping[str, Any]) -> dict[str, tuple[list, bool]]:
        """Every input in its order: its description, and whether it is required.

        ``given`` says what is chosen in lists that decide which inputs follow.
        """
        node, found = self.info[kind], {}
        for group in ("required", "optional"):
            for name in node["input_order"].get(group, ()):
                spec, needed = node["input"][group][name], group == "required"
                found[name] = (spec, needed)
                chosen = given.get(name, _default(spec)[0]) if spec[0] == DYNAMIC else None
                for inner, description in followers(spec, chosen).items():
                    found[f"{name}.{inner}"] = (description, needed or name in given)
        return found

    def api(self) -> dict[str, Any]:
        """The graph as a server takes it."""
        found = {}
        for node in self.nodes:
            values = {}
            for name, (spec, needed) in self._schema(node.kind, node.inputs).items():
                given = node.inputs.get(name)
                if isinstance(given, tuple):
                    values[name] = [str(given[0].key), given[1]]
                elif name in node.inputs:
                    values[name] = given
                elif needed:
                    values[name] = _default(spec)[0]
            found[str(node.key)] = {
                "class_type": node.kind,
                "inputs": values,
                "_meta": {"title": node.title},
            }
        return found

    def page(self, name: str) -> dict[str, Any]:
        """The graph as the page opens it; ``name`` makes its id."""
        self._arrange()
        links, written = self._links(), []
        for order, node in enumerate(self.nodes):
            written.append(self._written(node, order, links))
        tops = {n.column: n.place[1] for n in reversed(self.nodes)}
        key = len(self.nodes)
        for column, title, text in self.notes:
            key += 1
            height = _note_height(text)
            place = (_left(column), tops.get(column, 0) - GAP_Y - height)
            tops[column] = place[1]
            written.append(_note(key, title, text, place, height, len(written)))
        return {
            "id": str(uuid.uuid5(uuid.NAMESPACE_URL, name)),
            "revision": 0,
            "last_node_id": key,
            "last_link_id": len(links),
            "nodes": written,
            "links": [list(link) for link in links],
            "groups": [],
            "config": {},
            "extra": {},
            "version": 0.4,
        }

    def _arrange(self) -> None:
        bottoms: dict[int, int] = {}
        for node in self.nodes:
            node.size = (COLUMN, self._height(node))
            node.place = (_left(node.column), bottoms.get(node.column, 0))
            bottoms[node.column] = node.place[1] + node.size[1] + GAP_Y

    def _height(self, node: Node) -> int:
        """Enough for both canvases: a row a socket, a taller one a widget."""
        schema, sockets, widgets = self._schema(node.kind, node.inputs), 0, 0
        for spec, _ in schema.values():
            if not _is_widget(spec):
                sockets += 1
            elif _options(spec).get("multiline"):
                widgets += 150
            else:
                widgets += 36 * (2 if _options(spec).get("control_after_generate") else 1)
        sockets = max(sockets, len(self.info[node.kind]["output"]))
        picture = PICTURE if node.kind in SHOWS_PICTURES else 0
        text = 240 if node.kind == "PreviewAny" else 0
        said = 120 if node.kind.startswith("QSched") else 0  # what the node says when it ran
        return 60 + 28 * sockets + widgets + picture + text + said

    def _links(self) -> list[tuple]:
        """[id, from, its output, to, its input, type] of every connection."""
        found = []
        for node in self.nodes:
            schema = self._schema(node.kind, node.inputs)
            sockets = [n for n, (spec, _) in schema.items() if _socket(node, n, spec)]
            for place, name in enumerate(sockets):
                given = node.inputs.get(name)
                if isinstance(given, tuple):
                    source, output = given
                    kind = self.info[source.kind]["output"][output]
                    found.append((len(found) + 1, source.key, output, node.key, place, _type(kind)))
        return found

    def _written(self, node: Node, order: int, links: Sequence[tuple]) -> dict[str, Any]:
        schema, info = self._schema(node.kind, node.inputs), self.info[node.kind]
        into = {link[4]: link[0] for link in links if link[3] == node.key}
        inputs: list[dict[str, Any]] = []
        values: list[Any] = []
        for name, (spec, _) in schema.items():
            if _socket(node, name, spec):
                entry = {"name": name, "type": _type(spec[0]), "link": into.get(len(inputs))}
                inputs.append(entry | ({"widget": {"name": name}} if _is_widget(spec) else {}))
            if not _is_widget(spec):
                continue
            given = node.inputs.get(name)
            wired = isinstance(given, tuple) or name not in node.inputs
            values.append(_default(spec)[0] if wired and _default(spec) else "" if wired else given)
            control = _options(spec).get("control_after_generate")
            if control:
                values.append(control if isinstance(control, str) else "randomize")
            if _options(spec).get("image_upload"):
                values.append("image")
        outputs = [
            {
                "name": label,
                "type": _type(kind),
                "links": [link[0] for link in links if link[1:3] == (node.key, i)] or None,
                "slot_index": i,
            }
            for i, (kind, label) in enumerate(zip(info["output"], info["output_name"], strict=True))
        ]
        properties: dict[str, Any] = {"Node name for S&R": node.kind}
        if node.models:
            properties["models"] = [vars(model) for model in node.models]
        return {
            "id": node.key,
            "type": node.kind,
            "pos": list(node.place),
            "size": list(node.size),
            "flags": {},
            "order": order,
            "mode": 0,
            "inputs": inputs,
            "outputs": outputs,
            "title": node.title,
            "properties": properties,
            "widgets_values": values,
        }


def followers(spec: Sequence, chosen: str | None) -> dict[str, Sequence]:
    """Name and description of the inputs that follow the choice ``chosen`` of a dynamic list."""
    return {
        name: description
        for option in (_options(spec)["options"] if spec[0] == DYNAMIC else ())
        if option["key"] == chosen
        for group in option["inputs"].values()
        for name, description in group.items()
    }


def _left(column: int) -> int:
    return column * (COLUMN + GAP_X)


def _note_height(text: str) -> int:
    rows = sum(max(1, math.ceil(len(line) / 52)) for line in text.splitlines())
    return 90 + 24 * rows


def _note(key: int, title: str, text: str, place, height: int, order: int) -> dict[str, Any]:
    return {
        "id": key,
        "type": "MarkdownNote",
        "pos": list(place),
        "size": [COLUMN, height],
        "flags": {},
        "order": order,
        "mode": 0,
        "inputs": [],
        "outputs": [],
        "title": title,
        "properties": {},
        "widgets_values": [text],
        "color": "#432",
        "bgcolor": "#653",
    }


def _options(spec: Sequence) -> Mapping[str, Any]:
    return spec[1] if len(spec) > 1 else {}


def _type(kind: Any) -> str:
    """A socket's type; a list of choices is a combo."""
    return "COMBO" if isinstance(kind, list) else kind


def _is_widget(spec: Sequence) -> bool:
    return _type(spec[0]) in WIDGETS and not _options(spec).get("forceInput")


def _socket(node: Node, name: str, spec: Sequence) -> bool:
    """Whether the file lists the input: a socket, or a widget that another node feeds."""
    return not _is_widget(spec) or isinstance(node.inputs.get(name), tuple)


def _default(spec: Sequence) -> list:
    """The value that the page gives a new node's widget, in a list; [] where there is none."""
    options = _options(spec)
    if "default" in options:
        return [options["default"]]
    if not _is_widget(spec):
        return []
    choices = spec[0] if isinstance(spec[0], list) else options.get("options")
    if choices:
        return [choices[0]["key"] if spec[0] == DYNAMIC else choices[0]]
    return (
        [{"INT": 0, "FLOAT": 0.0, "STRING": "", "BOOLEAN": False}[spec[0]]]
        if choices is None
        else []
    )


def write(graph: Graph, name: str, pages, apis) -> None:
    """Both files of ``graph`` under ``name``: into the folders ``pages`` and ``apis``."""
    for folder, content in ((pages, graph.page(name)), (apis, graph.api())):
        text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
        (folder / f"{name}.json").write_text(text, encoding="utf-8")
