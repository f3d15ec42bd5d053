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

SCHEDULE_FOLDER, SCORER_FOLDER = "qsched", "clip_score"


def register_folders() -> None:
    """Make ``models/qsched`` and ``models/clip_score`` known to ComfyUI."""
    for name in (SCHEDULE_FOLDER, SCORER_FOLDER):
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


def schedule_files() -> list[str]:
    """Schedules in every folder registered for them, by their path inside it."""
    names = folder_paths.get_filename_list(SCHEDULE_FOLDER)
    return [name for name in names if name.lower().endswith(".json")]


def schedule_path(name: str) -> Path:
    """Where the schedule file ``name`` is; ScheduleError if there is none."""
    found = None
    if len(name) <= MOST_NAME:
        found = folder_paths.get_full_path(SCHEDULE_FOLDER, name)
    if found is None and len(name) <= MOST_NAME:  # a workflow may come from Windows
        found = folder_paths.get_full_path(SCHEDULE_FOLDER, name.replace("\\", "/"))
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
    if name.strip() and len(name) <= MOST_NAME:
        path = inside(Path(folder_paths.get_input_directory()), name.strip())
    if path is None or not path.is_file():
        raise PromptError(
            f"file={shown(name)} is no file in ComfyUI's input folder; copy it there and write its "
            "name"
        )
    return path


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


def output_path(name: str, extension: str) -> Path:
    """``name`` with ``extension`` in ComfyUI's output folder; EvaluationError for one that may leave it."""
    root = Path(folder_paths.get_output_directory()).resolve()
    try:
        path = (root / safe_name(name, extension)).resolve()
    except (ValueError, OSError) as error:
        raise EvaluationError(f"csv_name: {error}") from None
    if not path.is_relative_to(root):  # through a link
        raise EvaluationError(f"csv_name={shown(name)} must stay inside the output folder")
    return path
