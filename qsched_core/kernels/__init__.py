"""Kernels of our own: packed codes and their tables to a weight, in one pass over the memory."""

from .codes import GroupedCodes
from .engines import choose, engine
from .operator import unpack

__all__ = ["GroupedCodes", "choose", "engine", "unpack"]
