"""``dev.py serve``: ComfyUI with this pack and the demo's models, for a browser."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path

from .console import SetupError, note
from .environment import Environment
from .server import ComfyServer, device_args

WORKFLOW = Path("demo", "workflow", "qsched_learn_and_sample.json")


def model_paths(comfyui: Path) -> str:
    """ComfyUI's extra model paths file that adds the models a user's own ``comfyui`` has."""
    models = comfyui / "models"
    folders = sorted(path.name for path in models.iterdir() if path.is_dir())
    entry = {"base_path": str(models)} | {name: name for name in folders if name != "configs"}
    return json.dumps({"own": entry}, indent=1)  # JSON is YAML


def show_workflow(workflow: Path, base: Path) -> None:
    """Put the demo's workflow into the page's list, unless it is there (it may have been changed)."""
    listed = base / "user" / "default" / "workflows" / workflow.name
    if not listed.exists():
        listed.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(workflow, listed)


def serve(environment: Environment, port: int, more: tuple[str, ...] = ()) -> int:
    """Run until the server stops or Ctrl-C; its exit status."""
    base = environment.root / ".host" / "run"
    if environment.run("-m", "demo.build", "--models", str(base / "models")):
        raise SetupError("the demo's models could not be built; see above")
    if environment.own_comfyui and (environment.comfyui / "models").is_dir():
        paths = base / "extra_model_paths.yaml"
        paths.write_text(model_paths(environment.comfyui), encoding="utf-8")
        more = ("--extra-model-paths-config", str(paths), *more)
    show_workflow(environment.root / WORKFLOW, base)
    python = str(environment.python)
    server = ComfyServer(
        environment.comfyui,
        base,
        python,
        port,
        (*device_args(python), *more),
        console=True,
    )
    with server:
        note(f"\nComfyUI with this pack is at {server.url}  (Ctrl-C stops it)\n")
        try:
            return server.process.wait()
        except KeyboardInterrupt:
            # The server got it too; give it the time to end by itself.
            with contextlib.suppress(Exception):
                server.process.wait(10)
            return 0
