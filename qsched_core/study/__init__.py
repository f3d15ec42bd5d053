"""What is kept of a search, and where: records, their file, or a database that many share."""

from .database import COMMAND_LINE, Database, StorageRule, check_shared, workflow_rule
from .errors import CalibrationError
from .journal import Journal, fingerprint
from .place import StudyPlace
from .shared import SharedStore
from .store import Box, Point, Range, Record, Store

__all__ = [
    "COMMAND_LINE",
    "Box",
    "CalibrationError",
    "Database",
    "Journal",
    "Point",
    "Range",
    "Record",
    "SharedStore",
    "StorageRule",
    "Store",
    "StudyPlace",
    "check_shared",
    "fingerprint",
    "workflow_rule",
]
