"""The nodes' texts in several languages: ``python -m devtools.locales`` writes ``locales/``.

English is the schemas' own.  The other languages' are in ``words/``, a file for each, which were
translated by machine.  A text that changed needs a new translation in every one of them.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .graph_file import DYNAMIC, followers
from .server import ComfyServer, device_args

ROOT = Path(__file__).resolve().parent.parent
FOLDER, WORDS = ROOT / "locales", Path(__file__).with_name("words")
LANGUAGES = tuple(sorted(path.stem for path in WORDS.glob("*.json")))  # but for English
# Their tooltips say what this machine can run: a fixed text would take their place.
OF_THE_MACHINE = ("weight_format",)


def english(info: Mapping[str, Any]) -> dict[str, Any]:
    """``nodeDefs.json`` of the pack's nodes, as their schemas (``/object_info``) say."""
    return {
        name: {
            "display_name": node["display_name"],
            "description": node["description"],
            "inputs": dict(_inputs(node)),
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


def _inputs(node: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, str]]]:
    """Every input's key and entry, then those of the inputs that follow one of its choices.

    These have no tooltip of their own: the input's says what they are for.  The page looks for the key of ``eta.number`` with "_" in place of ".".
    """
    for group in ("required", "optional"):
        for key, spec in node["input"].get(group, {}).items():
            yield key, _entry(key, spec)
            for option in spec[1]["options"] if spec[0] == DYNAMIC else ():
                for inner in followers(spec, option["key"]):
                    yield f"{key}_{inner}", _entry(f"{key}: {inner}", spec)


def _entry(name: str, spec: Sequence) -> dict[str, str]:
    tooltip = spec[1].get("tooltip") if len(spec) > 1 else None
    entry = {"name": name}
    if tooltip and name not in OF_THE_MACHINE:
        entry["tooltip"] = tooltip
    return entry


def texts(defs: Any) -> list[str]:
    """Every text that needs a translation, once, in the order of the nodes."""
    if isinstance(defs, str):
        return [defs]
    return list(dict.fromkeys(text for part in defs.values() for text in texts(part)))


def words(language: str) -> dict[str, str]:
    """By English text: its translation."""
    return json.loads((WORDS / f"{language}.json").read_text(encoding="utf-8"))["texts"]


def translated(defs: Any, known: Mapping[str, str]) -> Any:
    """``nodeDefs.json`` with every text as ``known`` says; KeyError for one it does not have."""
    if isinstance(defs, str):
        return known[defs]
    return {key: translated(part, known) for key, part in defs.items()}


def make(info: Mapping[str, Any], folder: Path = FOLDER) -> None:
    """Write every language's file below ``folder``."""
    defs = english(info)
    for language in ("en", *LANGUAGES):
        content = defs if language == "en" else translated(defs, words(language))
        target = folder / language / "nodeDefs.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
        target.write_text(text, encoding="utf-8")


def report(info: Mapping[str, Any]) -> str:
    """What the languages lack, and what they have of texts that are no more."""
    wanted, found = texts(english(info)), {language: words(language) for language in LANGUAGES}
    lines = []
    for text in dict.fromkeys([*wanted, *(text for known in found.values() for text in known)]):
        wrong = [name for name, known in found.items() if (text in known) != (text in wanted)]
        if wrong:
            has = "lacks" if text in wanted else "has too much"
            lines.append(f"{', '.join(wrong)} {has}: {text}")
    return "\n".join(lines) or "every language has every text"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    comfyui = os.environ.get("COMFYUI_PATH", str(ROOT / ".host" / "ComfyUI-0.30.0"))
    parser.add_argument("--comfyui", type=Path, default=Path(comfyui))
    parser.add_argument("--check", action="store_true", help="say what needs a translation")
    arguments = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as base,
        ComfyServer(arguments.comfyui, Path(base), extra_args=device_args()) as server,
    ):
        info = server.object_info()
    if arguments.check:
        print(report(info))
    else:
        make(info)


if __name__ == "__main__":
    main()
