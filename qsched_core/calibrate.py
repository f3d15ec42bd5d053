"""``python -m qsched_core.calibrate``: learn a schedule for a plain-torch model."""

from __future__ import annotations

import sys

from .cli.calibrate import main

if __name__ == "__main__":
    sys.exit(main())
