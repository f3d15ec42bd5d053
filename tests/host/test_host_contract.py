"""The host's internals that this pack uses: all of them are listed, and are as the list says."""

from __future__ import annotations

import ast
import importlib
import logging

import comfyui_version
import inside
import pytest

contract = importlib.import_module("qsched_pack.nodes.host.contract")
ROOTS = {"comfy", "comfy_execution", "comfy_kitchen", "folder_paths", "latent_preview", "server"}
ROOTS |= {"comfyui_version"}
HOST = sorted((inside.REPO / "nodes" / "host").rglob("*.py"))


def used(path) -> set[str]:
    """module:name of every internal that a file takes, by import or by attribute."""
    tree, aliases, found = ast.parse(path.read_text(encoding="utf-8")), {}, set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] in ROOTS:
                    first = alias.name.split(".")[0]
                    aliases[alias.asname or first] = alias.name if alias.asname else first
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ROOTS:
            found |= {f"{node.module}:{alias.name}" for alias in node.names if not node.level}
    for node in ast.walk(tree):
        names, inner = [], node
        while isinstance(inner, ast.Attribute):
            names.append(inner.attr)
            inner = inner.value
        if names and isinstance(inner, ast.Name) and inner.id in aliases:
            found |= _split([*aliases[inner.id].split("."), *names[::-1]])
    return found


def _split(parts: list[str]) -> set[str]:
    """The module at the beginning of a dotted name and the first name in it, if there is one."""
    for end in range(len(parts) - 1, 0, -1):
        name = ".".join(parts[:end])
        try:
            module = importlib.import_module(name)
        except ImportError:
            continue
        value = getattr(module, parts[end], None)
        return set() if type(value) is type(importlib) else {f"{name}:{parts[end]}"}
    return set()


@pytest.mark.parametrize("path", HOST, ids=lambda p: p.name)
def test_every_internal_that_is_used_is_listed(path):
    assert used(path) - contract.INTERNALS.keys() == set()


def test_all_are_as_known_in_the_version_that_the_project_runs_in(caplog):
    if comfyui_version.__version__ != contract.VERSION:
        pytest.skip(f"this is ComfyUI {comfyui_version.__version__}")
    with caplog.at_level(logging.INFO):
        assert contract.report() == []
    assert "are as known" in caplog.text


def test_what_is_missing_or_changed_is_named(monkeypatch, caplog):
    management = importlib.import_module("comfy.model_management")
    monkeypatch.delattr(management, "unet_dtype")
    monkeypatch.setattr(management, "module_size", lambda module, deep: 0)
    monkeypatch.setattr(management, "is_oom", lambda e, more=1, **rest: False)
    monkeypatch.setattr(management, "is_device_cpu", 3)
    monkeypatch.setitem(contract.INTERNALS, "comfy.not_there:x", "")
    found = contract.report()
    assert found == [
        "comfy.model_management:is_device_cpu can't be called any more",
        "comfy.model_management:module_size(module, deep) took (module)",
        "comfy.model_management:unet_dtype is missing",
        "comfy.not_there can't be imported (ModuleNotFoundError)",
    ]
    assert all(line in caplog.text for line in found) and "4 of" in caplog.text
