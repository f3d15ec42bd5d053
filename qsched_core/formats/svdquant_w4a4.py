"""SVDQuant W4A4: a low-rank branch in 16 bits, the rest in int4 (arXiv 2411.05007)."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F

from ..devices import place
from ..optional import missing
from ..text import shown
from .base import (
    CHUNK_ELEMENTS,
    Error,
    Packed,
    check_finite,
    largest_magnitude,
    least_error,
    round_to_int,
)
from .kitchen import INT4_MAX, KitchenFormat, backend, kitchen, pack_int4, unpack_int4

TABLE_DTYPE = torch.bfloat16
RANK = 32
OVERSAMPLE = 8
ITERATIONS = 3
UNSIGNED = "act_unsigned"  # the option of a packing whose input is rounded to 0 .. 15
SHIFT = 0.171875  # what is added to such an input first: no GELU gives less than -0.17
SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8)  # of "the largest magnitude is code 7", tried for each group


class SVDQuantW4A4(KitchenFormat):
    """W = proj_up proj_down^T + R / smooth, R in int4 with a scale every 64 weights of a row.

    The branch is the best of rank 32 (subspace iteration from a fixed seed); R is the rest, rounded
    to the scales of least squared error.  The input is divided by ``smooth`` (1 in what is packed here) and
    rounded to int4 in groups of 64, the branch multiplies it unrounded.  Arithmetic and layout are
    comfy-kitchen's: scale [in / 64, out], proj_down [in, 32], proj_up [out, 32], smooth_factor [in].

    A packing with the option ``act_unsigned`` (calibrated rounding makes some) is for inputs that
    never go below -SHIFT, as those behind a GELU: they are shifted and rounded to 16 levels from 0
    where the others have 15 around it.  The last column of its proj_up holds what the shift adds to
    the product, to be taken off, and has no proj_down.
    """

    name = "svdquant_w4a4"
    title = "4-bit weights and activations beside a low-rank branch in 16 bits (SVDQuant)"
    word = "fair"
    bits = 4.25
    aux = ("scale", "proj_down", "proj_up", "smooth_factor")
    group_size = 64
    by_rows = False

    def unfit(self, shape):
        return super().unfit(shape) or self.unfit_columns(math.prod(shape[1:]), self.group_size)

    def refusal(self, at):
        return self.before_sm80(at) or missing("comfy_kitchen", self.name, "comfy-kitchen")

    def backend(self, device):
        at = place(device)
        name = backend("scaled_mm_svdquant_w4a4", at)
        return f"comfy-kitchen {name} {at}, int4" + (
            "" if name == "cuda" else " emulated in floats"
        )

    def packed_bytes(self, shape):
        rows, columns = shape[0], math.prod(shape[1:])
        tables = rows * columns // self.group_size + (rows + columns) * RANK + columns
        return rows * columns // 2 + 2 * tables

    def quantize(self, weight, seed=None, like=None, measure=False):
        """As every format; with ``like``, branch and smoothing stay, and the rest takes the change.

        Where that packing has unsigned inputs, this one has them too.
        """
        self.check(weight, like)
        shape = tuple(weight.shape)
        weight = weight.reshape(shape[0], -1)
        rows, columns = weight.shape
        if like is not None:
            down, up, smooth = (like.aux[n] for n in ("proj_down", "proj_up", "smooth_factor"))
        else:
            smooth = torch.ones(columns, dtype=TABLE_DTYPE, device=weight.device)
            up, down = low_rank(weight)
        random = None
        if seed is not None:
            random = torch.Generator(weight.device).manual_seed(seed & 0x7FFFFFFFFFFFFFFF)
        scale = torch.empty(
            columns // self.group_size, rows, dtype=TABLE_DTYPE, device=weight.device
        )
        codes = torch.empty(rows, columns // 2, dtype=torch.int8, device=weight.device)
        error = Error() if measure else None
        for part in _parts(rows, columns):
            values = weight[part].float()
            check_finite(values, part.start)
            branch = up[part].float() @ down.float().t()
            rest = (values - branch).mul_(smooth.float()).view(len(values), -1, self.group_size)
            old = None if like is None else like.aux["scale"][:, part].t().unsqueeze(2).float()
            found = self._scale(rest, old)
            whole = round_to_int(rest / _nonzero(found), random).clamp_(-INT4_MAX, INT4_MAX)
            codes[part] = pack_int4(whole.flatten(1))
            scale[:, part] = found.squeeze(2).t().to(TABLE_DTYPE)
            if error is not None:
                whole = whole.mul_(found).flatten(1).div_(smooth.float())
                error.add(whole.add_(branch), weight[part])
        aux = {"scale": scale, "proj_down": down, "proj_up": up, "smooth_factor": smooth}
        options = {}
        if like is not None and is_unsigned(like):
            aux["proj_up"], options = with_shift(codes, aux), {UNSIGNED: True}
        return Packed(codes, aux, shape, options, error and error.relative())

    def _scale(self, rest, old) -> torch.Tensor:
        """The stored scales, in fp32, of the groups of ``rest`` [rows, groups, 64]."""
        largest = rest.abs().amax(2, keepdim=True)

        def tries():
            for shrink in SHRINK:
                scale = (largest * (shrink / INT4_MAX)).to(TABLE_DTYPE).float()
                left = (rest / _nonzero(scale)).round_().clamp_(-INT4_MAX, INT4_MAX)
                yield left.mul_(scale).sub_(rest).square_().sum(2, keepdim=True), scale

        (best,) = least_error(tries())
        if old is not None:
            best = torch.where(largest <= old * (INT4_MAX + 0.5), old, best)
        return best

    def _quantize_rows(self, rows, common, random, old):
        raise NotImplementedError("the branch needs the whole weight: see quantize")

    def wrong_options(self, options):
        if type(options.get(UNSIGNED, False)) is not bool:
            return f"{UNSIGNED} is {shown(options[UNSIGNED])}, not true or false"
        return None

    def _dequantize_rows(self, packed, dtype):
        rows, columns = packed.matrix
        aux = packed.aux
        down, smooth = aux["proj_down"].float().t(), aux["smooth_factor"].float()
        out = torch.empty(rows, columns, dtype=dtype, device=packed.codes.device)
        for part in _parts(rows, columns):
            rest = _rest(packed.codes, aux["scale"], part)
            out[part] = torch.addmm(rest.div_(smooth), aux["proj_up"][part].float(), down)
        return out

    def _product(self, tokens, packed, bias):
        ck, aux = kitchen(self.name), packed.aux
        rows, dtype = len(tokens), tokens.dtype
        fused = bias if dtype == TABLE_DTYPE else None
        unsigned, x = is_unsigned(packed), tokens.to(TABLE_DTYPE).contiguous()
        # Whole tiles of rows are for the GPU's kernel.
        codes, scale, low = ck.quantize_svdquant_w4a4(
            x + SHIFT if unsigned else x,
            aux["smooth_factor"],
            aux["proj_down"],
            pad_size=256 if tokens.is_cuda else 1,
            act_unsigned=unsigned,
            lora_x=x if unsigned else None,
        )
        if unsigned:
            low[:, -1] = 1
        out = ck.scaled_mm_svdquant_w4a4(
            codes, packed.codes, scale, aux["scale"], low, aux["proj_up"], fused, unsigned
        )
        out = out[:rows].to(dtype)
        return out if bias is None or fused is not None else out + bias.to(dtype)


def _parts(rows: int, columns: int):
    step = max(1, CHUNK_ELEMENTS // columns)
    return [slice(start, min(rows, start + step)) for start in range(0, rows, step)]


def _nonzero(scale: torch.Tensor) -> torch.Tensor:
    return torch.where(scale == 0, torch.inf, scale)


def is_unsigned(packed: Packed) -> bool:
    return bool(packed.options.get(UNSIGNED, False))


def _rest(codes: torch.Tensor, scale: torch.Tensor, part: slice) -> torch.Tensor:
    """Some rows of what the codes stand for, smoothed, fp32."""
    rest = unpack_int4(codes[part]).float().unflatten(1, (-1, SVDQuantW4A4.group_size))
    return rest.mul_(scale[:, part].t().unsqueeze(2).float()).flatten(1)


def with_shift(codes: torch.Tensor, aux: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """proj_up with the product of the codes and the shift in its last column, to be taken off."""
    up, back = aux["proj_up"].clone(), SHIFT / aux["smooth_factor"].float()
    for part in _parts(len(up), 2 * codes.shape[1]):
        up[part, -1] = -(_rest(codes, aux["scale"], part) @ back).to(up.dtype)
    return up


def low_rank(weight: torch.Tensor, rank: int = RANK) -> tuple[torch.Tensor, torch.Tensor]:
    """proj_up [out, 32] and proj_down [in, 32]: their product of ``rank`` is nearest to ``weight``.

    Columns beyond the rank are 0.  Subspace iteration (Halko, Martinsson and Tropp, 2011, algorithm 4.4), in fp32, some rows at a
    time.
    """
    rows, columns = weight.shape
    size = min(RANK + OVERSAMPLE, rows, columns)
    parts = _parts(rows, columns)
    for part in parts:
        check_finite(weight[part], part.start)
    # Neither overflow nor underflow in the squares.
    largest = largest_magnitude(weight)
    largest = torch.where(largest == 0, 1, largest)
    factor = 1 / largest

    def times(right):
        right = factor * right
        return torch.cat([weight[p].float() @ right for p in parts])

    def transposed_times(left):
        return factor * sum(weight[p].float().t() @ left[p] for p in parts)

    random = torch.Generator().manual_seed(0)  # the CPU's: the same start on every device
    left = times(torch.randn(columns, size, generator=random).to(weight.device))
    for _ in range(ITERATIONS):
        left = torch.linalg.qr(left).Q
        left = times(torch.linalg.qr(transposed_times(left)).Q)
    left = torch.linalg.qr(left).Q
    u, s, v = torch.linalg.svd(transposed_times(left).t(), full_matrices=False)
    # The square root of a singular value on each side keeps both within 16 bits' range.
    root = (s[:rank] * largest).sqrt()
    up = left @ u[:, :rank] * root
    down = v[:rank].t() * root
    missing_ranks = RANK - up.shape[1]
    return (
        F.pad(up, (0, missing_ranks)).to(TABLE_DTYPE),
        F.pad(down, (0, missing_ranks)).to(TABLE_DTYPE).contiguous(),
    )
