"""``python -m qsched_core.evaluate``: what quantization and a schedule do to a plain-torch model."""

from __future__ import annotations

import sys

from .cli.evaluate import main

if __name__ == "__main__":
    sys.exit(main())
