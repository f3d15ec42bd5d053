"""The nodes' words in several languages: ``python -m devtools.locales`` writes ``locales/``.

English is the schemas' own.  Names in other languages come from ``words.json``, which was translated
by machine; where it has nothing, the page shows the English text.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .server import ComfyServer, device_args

ROOT = Path(__file__).resolve().parent.parent
FOLDER, WORDS = ROOT / "locales", Path(__file__).with_name("words.json")
# Their tooltips say what this machine can run: a fixed text would take their place.
OF_THE_MACHINE = ("weight_format",)


def english(info: Mapping[str, Any]) -> dict[str, Any]:
    """``nodeDefs.json`` of the pack's nodes, as their schemas (``/object_info``) say."""
    return {
        name: {
            "display_name": node["display_name"],
            "description": node["description"],
            "inputs": {
                key: _entry(key, spec[1].get("tooltip") if len(spec) > 1 else None)
                for group in ("required", "optional")
                for key, spec in node["input"].get(group, {}).items()
            },
            "outputs": {
                str(place): {"name": label, "tooltip": tooltip}
                for place, (label, tooltip) in enumerate(
                    zip(node["output_name"], node["output_tooltips"], strict=True)
                )
            },
        }
        for name, node in sorted(info.items())
        if name.startswith("QSched")
    }


def _entry(key: str, tooltip: str | None) -> dict[str, str]:
    entry = {"name": key}
    if tooltip and key not in OF_THE_MACHINE:
        entry["tooltip"] = tooltip
    return entry


def terms(defs: Mapping[str, Any]) -> list[str]:
    """Every name that a translation needs, once."""
    found: dict[str, None] = {}
    for node in defs.values():
        found[node["display_name"]] = None
        for part in ("inputs", "outputs"):
            found |= {entry["name"]: None for entry in node[part].values()}
    return list(found)


def words() -> dict[str, dict[str, str]]:
    """By English name: its translations by language."""
    return json.loads(WORDS.read_text(encoding="utf-8"))["words"]


def translated(defs: Mapping[str, Any], language: str) -> dict[str, Any]:
    """``nodeDefs.json`` in another language; KeyError for a name that has no translation."""
    known = words()
    return {
        name: {
            "display_name": known[node["display_name"]][language],
            "inputs": _names(node["inputs"], known, language),
            "outputs": _names(node["outputs"], known, language),
        }
        for name, node in defs.items()
    }


def _names(entries: Mapping[str, Any], known, language: str) -> dict[str, Any]:
    return {key: {"name": known[entry["name"]][language]} for key, entry in entries.items()}


def languages() -> tuple[str, ...]:
    return tuple(json.loads(WORDS.read_text(encoding="utf-8"))["languages"])


def make(info: Mapping[str, Any], folder: Path = FOLDER) -> None:
    """Write every language's file below ``folder``."""
    defs = english(info)
    for language in ("en", *languages()):
        content = defs if language == "en" else translated(defs, language)
        target = folder / language / "nodeDefs.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
        target.write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    comfyui = os.environ.get("COMFYUI_PATH", str(ROOT / ".host" / "ComfyUI-0.30.0"))
    parser.add_argument("--comfyui", type=Path, default=Path(comfyui))
    parser.add_argument("--terms", action="store_true", help="print what needs a translation")
    arguments = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as base,
        ComfyServer(arguments.comfyui, Path(base), extra_args=device_args()) as server,
    ):
        info = server.object_info()
    if arguments.terms:
        print("\n".join(terms(english(info))))
    else:
        make(info)


if __name__ == "__main__":
    main()
