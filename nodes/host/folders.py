"""Where ComfyUI (0.30.0) keeps this pack's files, and names that stay inside those folders."""

from __future__ import annotations

from pathlib import Path
from threading import Thread

import folder_paths

from ...qsched_core.evaluation import EvaluationError
from ...qsched_core.files import MOST_NAME, inside, safe_name
from ...qsched_core.prompts import PromptError
from ...qsched_core.schedule import ScheduleError
from ...qsched_core.text import shown
from ...qsched_core.workspace import remove_abandoned

SCHEDULE_FOLDER, SCORER_FOLDER, PROMPT_FOLDER = "qsched", "clip_score", "qsched_prompts"
PROMPT_FILES = (".txt", ".json")


def register_folders() -> None:
    """Make this pack's folders below ``models`` known to ComfyUI."""
    for name in (SCHEDULE_FOLDER, SCORER_FOLDER, PROMPT_FOLDER):
        folder_paths.add_model_folder_path(name, str(Path(folder_paths.models_dir) / name))


def start_cleaning() -> Thread:
    """Remove what killed runs left in this pack's folders, beside the server's own work.

    Models are saved anywhere in the output folder, which may be large and far away.
    """
    places = [
        *map(Path, folder_paths.get_folder_paths(SCHEDULE_FOLDER)),
        Path(folder_paths.get_user_directory()) / "qsched",
        Path(folder_paths.get_output_directory()),
    ]

    def clean() -> None:
        for place in places:
            remove_abandoned(place, deep=True)

    thread = Thread(target=clean, name="qsched-clean", daemon=True)
    thread.start()
    return thread


def is_name(name: object) -> bool:
    """Whether a file may be called so; a graph for scripts may have anything where a list has names."""
    return isinstance(name, str) and len(name) <= MOST_NAME


def schedule_files() -> list[str]:
    """Schedules in every folder registered for them, by their path inside it."""
    return _listed(SCHEDULE_FOLDER, (".json",))


def schedule_path(name: str) -> Path:
    """Where the schedule file ``name`` is; ScheduleError if there is none."""
    found = _found(SCHEDULE_FOLDER, name)
    if found is None or not found.lower().endswith(".json"):
        raise ScheduleError(
            f"schedule_name={shown(name)} is no schedule in models/{SCHEDULE_FOLDER}; refresh the "
            "list, or copy the file there"
        )
    return Path(found)


def new_schedule_path(name: str) -> Path:
    """Where a schedule called ``name`` is saved: the first folder that is registered.

    ScheduleError for a name that could lead out of that folder, or that some system can't hold.
    """
    root = Path(folder_paths.get_folder_paths(SCHEDULE_FOLDER)[0]).resolve()
    try:
        path = (root / safe_name(name)).resolve()
    except (ValueError, OSError) as error:
        raise ScheduleError(str(error)) from None
    if not path.is_relative_to(root):  # through a link
        raise ScheduleError(f"name={shown(name)} must stay inside {root}")
    return path


def input_file(name: str) -> Path:
    """The file called ``name`` in the input folder; PromptError if it is not there."""
    path = None
    if is_name(name) and name.strip():
        path = inside(Path(folder_paths.get_input_directory()), name.strip())
    if path is None or not path.is_file():
        raise PromptError(
            f"file={shown(name)} is no file in ComfyUI's input folder; copy it there and write its "
            "name"
        )
    return path


def prompt_sets() -> list[str]:
    """The user's files of prompts, in every folder registered for them, by their path inside it."""
    return _listed(PROMPT_FOLDER, PROMPT_FILES)


def _listed(folder: str, endings: tuple[str, ...]) -> list[str]:
    try:
        names = folder_paths.get_filename_list(folder)
    except FileNotFoundError:  # it was there when ComfyUI looked before
        return []
    return [name for name in names if name.lower().endswith(endings)]


def _found(folder: str, name: str) -> str | None:
    """Where ``name`` is in the registered ``folder``: ComfyUI looks for none outside of it."""
    if not is_name(name):
        return None
    found = folder_paths.get_full_path(folder, name)
    # a workflow may come from Windows
    return found or folder_paths.get_full_path(folder, name.replace("\\", "/"))


def prompt_set(name: str) -> Path:
    """Where the user's file of prompts ``name`` is; PromptError if there is none."""
    found = _found(PROMPT_FOLDER, name)
    if found is None or not found.lower().endswith(PROMPT_FILES):
        raise PromptError(
            f"source={shown(name)} is no file of prompts in models/{PROMPT_FOLDER}; refresh the "
            f"list, or put a file ({' or '.join(PROMPT_FILES)}) of that name there"
        )
    return Path(found)


def studies_folder() -> Path:
    """Where searches are kept."""
    return Path(folder_paths.get_user_directory()) / "qsched" / "studies"


def evaluations_folder() -> Path:
    """Where evaluations are kept."""
    return Path(folder_paths.get_user_directory()) / "qsched" / "evaluations"


def rounding_folder() -> Path:
    """Where calibrated weights are kept while and after they are made."""
    return Path(folder_paths.get_user_directory()) / "qsched" / "rounding"


def scratch_folder() -> Path:
    """ComfyUI's temporary folder, which it empties when it starts and ends."""
    folder = Path(folder_paths.get_temp_directory())
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def output_path(
    name: str,
    extension: str,
    argument: str = "csv_name",
    error: type[ValueError] = EvaluationError,
) -> Path:
    """``name`` with ``extension`` in ComfyUI's output folder.

    An ``error`` that names the input ``argument``, for a name that may leave it.
    """
    root = Path(folder_paths.get_output_directory()).resolve()
    try:
        path = (root / safe_name(name, extension)).resolve()
    except (ValueError, OSError) as reason:
        raise error(f"{argument}: {reason}") from None
    if not path.is_relative_to(root):  # through a link
        raise error(f"{argument}={shown(name)} must stay inside the output folder")
    return path
