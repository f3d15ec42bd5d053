"""llama.cpp's quantizers: ggml's own library, built here and called by ctypes.

The source is that of ggml inside the source distribution of llama-cpp-python; of it ``ggml-base`` is
built, which has the quantizers and no inference.  Packed weights are what a GGUF file holds.
"""

from __future__ import annotations

import ctypes
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from devtools.console import SetupError, explain, run_stage
from devtools.host import download, unpack, verify

VERSION = "0.25.3"  # of ggml, in the source distribution below
SDIST, SDIST_VERSION = "llama-cpp-python", "0.3.36"
SDIST_SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
SUBTREE = ("vendor", "llama.cpp", "ggml")
NAMES = ("libggml-base.so", "libggml-base.dylib", "ggml-base.dll", "libggml-base.dll")
HOST = Path(__file__).resolve().parents[1] / ".host"  # where dev.py puts what it downloads
SWITCHES = (
    "CMAKE_BUILD_TYPE=Release", "GGML_CPU=OFF", "GGML_OPENMP=OFF", "GGML_NATIVE=OFF",
    "GGML_CCACHE=OFF", "GGML_BUILD_TESTS=OFF", "GGML_BUILD_EXAMPLES=OFF",
)  # fmt: skip
PROBE = "cmake_minimum_required(VERSION 3.14...3.28)\nproject(probe C CXX)\n"

# What llama.cpp takes where a row does not fill whole blocks (llama-quant.cpp,
# tensor_type_fallback); F16 where it does not fill those of this type either.
FALLBACKS = {
    **dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S"), "IQ4_NL"),
    **dict.fromkeys(("IQ3_XXS", "IQ3_S", "IQ4_XS"), "IQ4_NL"),
    **dict.fromkeys(("Q2_K", "Q3_K"), "Q4_0"),
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
}


def fallback(quantizer: str, columns: int) -> str:
    """The type that llama.cpp gives a weight with rows of ``columns`` when asked for ``quantizer``."""
    for name in (quantizer, FALLBACKS.get(quantizer, quantizer)):
        if columns % GGML_QUANT_SIZES[GGMLQuantizationType[name]][0] == 0:
            return name
    return "F16"


def library(cache: Path = HOST) -> Path:
    """The library, built in ``cache`` if it is not there; SetupError says why it can't be."""
    folder = cache / f"ggml-{VERSION}"
    there = next(_libraries(folder), None)
    if there is not None:
        return there
    cache.mkdir(parents=True, exist_ok=True)
    log = cache / "ggml.log"
    log.write_text("", encoding="utf-8")
    cmake, generator = _cmake()
    with tempfile.TemporaryDirectory(dir=cache, prefix="ggml-") as name:
        work = Path(name)
        # First: without a compiler there is no need for the source.
        (work / "CMakeLists.txt").write_text(PROBE, encoding="utf-8")
        _stage("compiler", [*cmake, *generator, "-S", name, "-B", str(work / "probe")], log)
        pip = _first([sys.executable, "-m", "pip"], _from_index("pip"))
        archive = download("ggml's source", SDIST, SDIST_VERSION, pip, work, log)
        verify(archive, SDIST_SHA256)
        source, build = work / "source", work / "build"
        unpack(archive, source, SUBTREE)
        (source / "ggml.pc.in").touch()  # cmake asks for it, and the distribution lacks it
        switches = [*generator, *(f"-D{switch}" for switch in SWITCHES)]
        _stage("configure", [*cmake, *switches, "-S", str(source), "-B", str(build)], log)
        make = [*cmake, "--build", str(build), "--config", "Release", "--target", "ggml-base"]
        _stage("build ggml", [*make, "--parallel", str(os.cpu_count() or 1)], log)
        built = next(_libraries(build), None)
        if built is None:
            raise SetupError(f"the build of ggml made no library (the whole output is in {log})")
        ready = work / "ready"
        ready.mkdir()
        shutil.copyfile(built, ready / built.name)
        if not folder.exists():  # another process may have been faster
            ready.replace(folder)
    return next(_libraries(folder))


def _libraries(folder: Path) -> Iterator[Path]:
    return (path for name in NAMES for path in folder.rglob(name))


def _from_index(tool: str, *more: str) -> list[str]:
    """A tool that uv runs from the package index, without installing it here."""
    return [sys.executable, "-m", "uv", "tool", "run", "--python", sys.executable, *more, tool]


def _cmake() -> tuple[list[str], list[str]]:
    """A cmake, and what it must be told to find a build tool."""
    if shutil.which("cmake") and (shutil.which("make") or os.name == "nt"):
        return ["cmake"], []
    return _first(_from_index("cmake", "--with", "ninja")), ["-G", "Ninja"]


def _first(*commands: list[str]) -> list[str]:
    """The first command that can say its version."""
    for command in commands:
        try:
            subprocess.run([*command, "--version"], capture_output=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            continue
        return command
    tool = commands[-1][-1]
    raise SetupError(f"there is no {tool}, and uv can't get it from the package index; install it")


def _stage(title: str, command: list[str], log: Path) -> None:
    failure = run_stage(title, command, log, dict(os.environ))
    if failure is None:
        return
    if title == "compiler":
        raise SetupError(f"no C and C++ compiler works here; install one (see {log})")
    raise SetupError(explain(failure, log))


class _Traits(ctypes.Structure):
    """ggml_type_traits."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
        ("from_float_ref", ctypes.c_void_p),
    )


class Ggml:
    """ggml's quantizers; each type by its name in ggml, as "Q4_K".

    ggml ends the whole process on what it can't take, so everything is checked here: ValueError.
    """

    def __init__(self, path: Path):
        lib = self._lib = ctypes.CDLL(str(path))
        lib.ggml_quantize_init.argtypes = [ctypes.c_int]
        lib.ggml_quantize_init.restype = None
        lib.ggml_quantize_requires_imatrix.argtypes = [ctypes.c_int]
        lib.ggml_quantize_requires_imatrix.restype = ctypes.c_bool
        lib.ggml_quantize_chunk.argtypes = [
            ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p,
            ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p,
        ]  # fmt: skip
        lib.ggml_quantize_chunk.restype = ctypes.c_size_t
        lib.ggml_get_type_traits.argtypes = [ctypes.c_int]
        lib.ggml_get_type_traits.restype = ctypes.POINTER(_Traits)
        for name in ("Q2_K", "IQ2_S"):  # the numbers of the gguf package are this library's
            if self._traits(name).type_name.decode().lower() != name.lower():
                raise SetupError(f"{path} numbers its types in another way than the gguf package")

    def _traits(self, quantizer: str) -> _Traits:
        return self._lib.ggml_get_type_traits(GGMLQuantizationType[quantizer]).contents

    def requires_importance(self, quantizer: str) -> bool:
        return bool(self._lib.ggml_quantize_requires_imatrix(GGMLQuantizationType[quantizer]))

    def quantize(
        self, weight: np.ndarray, quantizer: str, importance: np.ndarray | None = None
    ) -> np.ndarray:
        """weight [rows, columns], each column counting ``importance`` [columns], as packed bytes.

        uint8 [rows, bytes a row], which ``gguf.dequantize`` reads.
        """
        rows, columns = weight.shape
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType[quantizer]]
        if columns % block:
            raise ValueError(f"{columns} columns don't fill blocks of {quantizer}, {block} each")
        if importance is None and self.requires_importance(quantizer):
            raise ValueError(f"{quantizer} needs an importance matrix")
        weight = np.ascontiguousarray(weight, dtype=np.float32)
        if not np.isfinite(weight).all():
            raise ValueError("the weight has NaN or infinite values")
        counts = None
        if importance is not None:
            counts = np.ascontiguousarray(importance, dtype=np.float32)
            if counts.shape != (columns,) or not np.isfinite(counts).all() or counts.min() < 0:
                raise ValueError(f"importance must be {columns} finite numbers of 0 or more")
        packed = np.empty((rows, columns // block * size), dtype=np.uint8)
        kind = GGMLQuantizationType[quantizer]
        self._lib.ggml_quantize_init(kind)
        written = self._lib.ggml_quantize_chunk(
            kind, weight.ctypes.data, packed.ctypes.data, 0, rows, columns,
            None if counts is None else counts.ctypes.data,
        )  # fmt: skip
        if written != packed.nbytes:
            raise ValueError(f"{quantizer} wrote {written} bytes, not {packed.nbytes}")
        return packed

    def dequantize(self, packed: np.ndarray, quantizer: str) -> np.ndarray:
        """fp32 [rows, columns] of packed bytes [rows, bytes a row], by ggml's own code."""
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType[quantizer]]
        if packed.dtype != np.uint8 or packed.shape[-1] % size:
            raise ValueError(f"{packed.dtype} {packed.shape} is no packing of {quantizer}")
        packed = np.ascontiguousarray(packed)
        values = np.empty((*packed.shape[:-1], packed.shape[-1] // size * block), dtype=np.float32)
        to_float = self._traits(quantizer).to_float
        to_float(packed.ctypes.data, values.ctypes.data, math.prod(values.shape))
        return values
