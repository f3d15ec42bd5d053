"""The pack's nodes, each family in a module of its own with a ``NODES`` tuple."""

from __future__ import annotations

import importlib
import logging

from comfy_api.latest import ComfyExtension, io

logger = logging.getLogger(__name__)

FAMILIES = (
    "loading",
    "sampling",
    "schedules",
    "sharing",
    "prompts",
    "objective",
    "calibration",
    "ranking",
    "evaluation",
    "rounding",
)


class QSchedExtension(ComfyExtension):
    async def on_load(self) -> None:
        from .host.folders import register_folders, start_cleaning

        register_folders()
        start_cleaning()
        try:
            importlib.import_module(".host.contract", __name__).report()
        except Exception:  # it only tells: nothing may depend on it
            logger.exception("ComfyUI-QSched: ComfyUI's internals could not be looked at")

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """Every family that can be imported; one that cannot is left out with its reason logged."""
        from .host.telling import telling

        nodes: list[type[io.ComfyNode]] = []
        for family in FAMILIES:
            try:
                nodes += map(telling, importlib.import_module(f".{family}", __name__).NODES)
            except ImportError as error:
                logger.warning(
                    "ComfyUI-QSched: the %s nodes are off: %s; "
                    "run: pip install -r requirements.txt in the pack's folder",
                    family,
                    error,
                )
            except Exception:
                # A dependency may raise anything while it is imported; ComfyUI would drop the
                # whole pack for it.
                logger.exception("ComfyUI-QSched: the %s nodes are off", family)
        return nodes
