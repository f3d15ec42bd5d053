"""Weight formats: packed storage, the arithmetic on it, and which layer gets which."""

from .base import FormatError, Packed, WeightFormat
from .registry import get, names

__all__ = ["FormatError", "Packed", "WeightFormat", "get", "names"]
