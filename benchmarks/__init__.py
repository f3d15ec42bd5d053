"""Ratios against named alternatives: ``python dev.py bench NAME --json FILE``."""
