"""The commands: ``python -m qsched_core.calibrate`` and ``python -m qsched_core.evaluate``."""
