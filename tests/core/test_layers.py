"""Who may import whom: ComfyUI stays outside core, and nothing imports upwards."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HOST = {"comfy", "comfy_api", "comfy_execution", "comfy_extras", "folder_paths", "latent_preview",
        "node_helpers", "server", "nodes", "comfyui_version"}  # fmt: skip
# From the ground up: a part imports what stands before it, and itself.
LAYERS = (
    ("errors",),
    ("text", "optional", "devices", "statistics", "recent", "workspace"),
    ("files", "validation", "kernels"),
    ("strict_json", "canvas", "webpage", "prompts", "sigmas"),
    ("correction",),
    ("solvers",),
    ("trajectory",),
    ("schedule", "batches"),
    ("formats", "scorers"),
    ("objective",),
    ("source",),
    ("task",),
    ("study",),
    ("rounding",),
    ("search",),
    ("calibration",),
    ("evaluation",),
    ("cli",),
    ("calibrate", "calibrate_weights", "evaluate"),
)
HEIGHT = {name: height for height, names in enumerate(LAYERS) for name in names}
CORE = sorted((ROOT / "qsched_core").rglob("*.py"))
NODES = sorted((ROOT / "nodes").rglob("*.py"))


def imports(path: Path) -> list[tuple[str, int]]:
    """Every module that a file imports, at its top or in a function, and the line."""
    package = list(path.relative_to(ROOT).parent.parts)
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found.append((module, node.lineno))
            found += [(f"{module}.{alias.name}", node.lineno) for alias in node.names]
    return found


def part_of(module: str) -> str | None:
    """The part of core that a module belongs to."""
    names = module.split(".")
    return names[1] if names[0] == "qsched_core" and len(names) > 1 else None


@pytest.mark.parametrize("path", CORE, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_core_imports_neither_the_host_nor_upwards(path):
    mine = part_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
    if mine == "__init__":
        return
    assert mine in HEIGHT, f"{mine} has no place among the layers"
    for module, line in imports(path):
        assert module.split(".")[0] not in HOST, f"line {line} imports {module}"
        part = part_of(module)
        if part in HEIGHT and part != mine:
            assert HEIGHT[part] < HEIGHT[mine], (
                f"line {line}: {mine} imports {part}, which stands above it or beside it"
            )


@pytest.mark.parametrize("path", NODES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_only_the_host_folder_knows_comfyuis_internals(path):
    """A node's schema is ComfyUI's public interface; all else goes through nodes/host."""
    if "host" in path.relative_to(ROOT).parts:
        return
    for module, line in imports(path):
        top = module.split(".")[0]
        assert top not in HOST - {"comfy_api", "nodes"}, f"line {line} imports {module}"


@pytest.mark.parametrize("path", [*CORE, *NODES], ids=lambda p: p.relative_to(ROOT).as_posix())
def test_the_two_scalars_are_known_to_their_correction_and_the_search_space_alone(path):
    """Another kind of correction is a file in correction/, and what searches it."""
    part = path.relative_to(ROOT).parts
    if part[:2] == ("qsched_core", "correction") or part == ("qsched_core", "search", "space.py"):
        return
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"\bc_(x|eps)\b|\bScalar(Correction|Stack)\b|two scalars", text)


def test_the_host_folder_imports_no_node():
    families = {p.stem for p in NODES if p.parent.name == "nodes"}
    for path in NODES:
        if "host" in path.relative_to(ROOT).parts:
            for module, line in imports(path):
                names = module.split(".")
                inward = names[0] == "nodes" and len(names) > 1 and names[1] in families
                assert not inward, f"{path.name} line {line} imports {module}"
