"""``python -m qsched_core.calibrate_weights``: round a plain-torch model's weights for its inputs."""

from __future__ import annotations

import sys

from .cli.calibrate_weights import main

if __name__ == "__main__":
    sys.exit(main())
