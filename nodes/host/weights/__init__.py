"""Quantized weights inside ComfyUI (0.30.0): its loaders, operations, layouts and writer."""
