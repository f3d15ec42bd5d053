"""LLM.int8() (Dettmers et al., arXiv 2208.07339): int8, but for the features with outliers."""

from __future__ import annotations

import torch

from .base import quantize_tokens
from .bnb4 import has_kernel
from .int8 import Int8, int8_product, scaled

THRESHOLD = 6.0  # the paper's: features with a magnitude of this or more keep their precision


class LLMInt8(Int8):
    """Mixed-precision decomposition (the paper's equation 8).

    With O the columns of x that hold a magnitude of 6 or more, x W is x[:, O] W[O] in x's dtype, on
    dequantized weights, plus the int8 product of the other columns with a scale a token (of its
    values below 6, as in bitsandbytes) and a scale an output channel.  bitsandbytes does the
    integer product on a GPU, torch on a CPU, where it is faster; its further steps would take and
    give fp16 only.
    """

    name = "llm_int8"
    title = "8-bit weights and activations, outlier features in full precision (LLM.int8())"
    word = "close"
    native = None
    kinds = ("linear", "conv2d")

    def replaces_host(self, device):
        return True

    def backend(self, device):
        if torch.device(device).type == "cuda" and has_kernel():
            return "bitsandbytes cuda"
        return super().backend(device)

    def linear(self, x, packed, bias=None, weight_only=False):
        if weight_only:
            return super().linear(x, packed, bias, weight_only)
        tokens = x.reshape(-1, x.shape[-1])
        columns = outlier_columns(tokens)
        some = len(columns) > 0
        rest = tokens.masked_fill(tokens.abs() >= THRESHOLD, 0) if some else tokens
        codes, scale = quantize_tokens(rest)
        codes[:, columns] = 0
        if x.device.type != "cuda" or not has_kernel():
            out = int8_product(codes, scale, packed, bias, x.dtype)
        else:
            across, bias = packed.aux["scale"].view(1, -1), None if bias is None else bias.float()
            product = torch.ops.bitsandbytes.int8_linear_matmul(codes, packed.codes).float()
            out = scaled(product, scale, across, bias).to(x.dtype)
        if some:
            weight = packed.codes[:, columns] * packed.aux["scale"]
            out.addmm_(tokens[:, columns], weight.to(x.dtype).t())
        return out.reshape(*x.shape[:-1], -1)


def outlier_columns(tokens: torch.Tensor) -> torch.Tensor:
    """Indexes of the columns of tokens [rows, in] with a magnitude of 6 or more."""
    return torch.maximum(tokens.amax(0), -tokens.amin(0)).ge(THRESHOLD).nonzero().view(-1)
