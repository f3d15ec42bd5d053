"""What the registry, ComfyUI-Manager and a fresh clone rely on."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
SKIPPED = {".venv", ".host", ".git", ".work", "output", "__pycache__"}
SOURCES = sorted(
    path for path in ROOT.rglob("*.py") if SKIPPED.isdisjoint(path.relative_to(ROOT).parts)
)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def _requirements() -> list[str]:
    return (ROOT / "requirements.txt").read_text(encoding="utf-8").split()


def _imports(path: Path) -> set[str]:
    """Top-level names of everything a file imports absolutely, wherever it does."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


def _under(*folders: str) -> list[Path]:
    return [path for path in SOURCES if path.relative_to(ROOT).parts[0] in folders]


def test_requirements_equal_the_dependencies():
    assert _requirements() == PROJECT["project"]["dependencies"]


def test_requirements_leave_the_hosts_packages_and_versions_alone():
    for requirement in _requirements():
        name = re.split(r"[<>=!~\[; ]", requirement)[0].lower().replace("_", "-")
        assert name not in {
            "torch",
            "torchvision",
            "transformers",
            "numpy",
            "comfy-kitchen",
            "filelock",
        }
        assert not re.search(r"<|==|~=", requirement), f"{requirement}: no upper bounds"


def test_registry_metadata_is_complete():
    project, comfy = PROJECT["project"], PROJECT["tool"]["comfy"]
    assert project["name"] == "comfyui-qsched"
    assert re.fullmatch(r"\d+\.\d+\.\d+", project["version"])
    assert project["license"] == "GPL-3.0-or-later"
    assert "GNU GENERAL PUBLIC LICENSE" in (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert project["urls"]["Repository"].startswith("https://")
    assert comfy["PublisherId"]
    assert comfy["DisplayName"]


def test_one_repository_is_named_everywhere():
    """Until there is a public one, its address is changed in one place and found by this."""
    urls, home = PROJECT["project"]["urls"], PROJECT["project"]["urls"]["Repository"]
    assert all(url.startswith(home) for url in urls.values())
    icon, path = PROJECT["tool"]["comfy"]["Icon"], home.removeprefix("https://github.com/")
    assert icon == f"https://raw.githubusercontent.com/{path}/main/docs/icon.png"


def test_the_icon_is_what_its_code_draws():
    from PIL import Image, ImageChops

    from demo.icon import PATH, draw

    drawn = draw()
    with Image.open(PATH) as shipped:
        assert shipped.size == drawn.size == (400, 400)
        difference = ImageChops.difference(shipped.convert("RGBA"), drawn).getextrema()
    assert max(high for _, high in difference) <= 8  # versions of PIL round differently


def test_the_changelog_names_this_version():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## {PROJECT['project']['version']}\n" in text


def test_issue_templates_are_forms():
    import yaml

    forms = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
    assert [form.name for form in forms] == ["bug.yml", "config.yml", "model.yml"]
    for form in forms:
        content = yaml.safe_load(form.read_text(encoding="utf-8"))
        if form.name != "config.yml":
            assert content["name"] and content["description"]
            ids = [part["id"] for part in content["body"]]
            assert len(set(ids)) == len(ids)


def test_sources_can_be_read_on_every_supported_system():
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        text.encode("cp1252")
        ast.parse(text, str(path), feature_version=(3, 10))


def test_entry_point_imports_nothing_before_comfyui_asks():
    tree = ast.parse((ROOT / "__init__.py").read_text(encoding="utf-8"))
    top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert top == []
    names = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
    assert "NODE_CLASS_MAPPINGS" not in names
    assert "WEB_DIRECTORY" in names
    assert any(isinstance(n, ast.AsyncFunctionDef) for n in tree.body)


@pytest.mark.parametrize("path", _under("qsched_core"), ids=lambda p: p.name)
def test_core_never_imports_comfyui(path):
    host = {"comfy", "comfy_api", "comfy_extras", "folder_paths", "nodes", "server", "execution"}
    assert not _imports(path) & host


@pytest.mark.parametrize("path", _under("nodes"), ids=lambda p: p.name)
def test_nodes_reach_the_pack_by_relative_imports_only(path):
    assert not _imports(path) & {"qsched_core", "nodes", "demo", "devtools", "tests"}


@pytest.mark.parametrize("path", [*_under("devtools"), ROOT / "dev.py"], ids=lambda p: p.name)
def test_dev_tools_need_python_alone(path):
    assert _imports(path) <= set(sys.stdlib_module_names) | {"devtools", "__future__"}


def test_nothing_reads_pickles():
    for path in SOURCES:
        if path.relative_to(ROOT).parts[0] == "tests":
            continue  # they make the files that must be refused
        text = path.read_text(encoding="utf-8")
        assert not _imports(path) & {"dill", "cloudpickle", "joblib"}, path
        # Naming pickle's error, which torch.load raises on a bad file, is all that is allowed.
        assert set(re.findall(r"\bpickle\.(\w+)", text)) <= {"UnpicklingError"}, path
        for call in re.findall(r"torch\.load\([^)]*\)", text):
            assert "weights_only=True" in call, f"{path}: {call}"


def test_shipped_demo_stays_small():
    sizes = [path.stat().st_size for path in (ROOT / "demo").rglob("*") if path.is_file()
             and SKIPPED.isdisjoint(path.relative_to(ROOT).parts)]  # fmt: skip
    assert sum(sizes) < 40e6


def test_continuous_integration_runs_the_suite():
    script = ROOT / ".ci" / "run"
    text = script.read_text(encoding="utf-8")
    assert text.startswith("#!/usr/bin/env bash\n")
    assert "\r" not in text
    assert "set -eu" in text
    assert "dev.py test" in text
    if os.name == "posix":
        assert os.access(script, os.X_OK)


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]], ids=lambda c: c[0])
def test_ruff_finds_nothing(command):
    answer = subprocess.run(
        [sys.executable, "-m", "ruff", *command, "--no-cache", "."],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr
