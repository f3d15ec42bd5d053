"""Errors that stand on the node that they are of, inside ComfyUI (0.30.0)."""

from __future__ import annotations

from functools import wraps

from comfy_execution.utils import get_executing_context

from ...qsched_core.errors import OURS


def telling(node: type) -> type:
    """The node class, as one whose errors stand on the node, too.

    ComfyUI's page (frontend 1.47) has words of its own for any error, and ours in its log alone.
    """

    @wraps(node.execute.__func__)
    def execute(cls, *args, **inputs):
        try:
            return super(told, cls).execute(*args, **inputs)
        except Exception as error:
            if type(error).__module__ == OURS:
                _tell(str(error))
            raise

    members = {"execute": classmethod(execute), "__module__": node.__module__}
    told = type(node.__name__, (node,), members)
    return told


def _tell(text: str) -> None:
    from .progress import progress_text  # it needs what the nodes need, and this must not

    context = get_executing_context()
    if context is not None:
        progress_text(context.node_id, text)
