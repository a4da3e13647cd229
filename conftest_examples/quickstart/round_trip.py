"""Quantize weights and write them back, which gives ordinary checkpoints with real rounding errors for any engine.

Each function takes a weight [out, in] and returns the nearest one that the format can hold, in float32.
"""

import torch
from torch import Tensor

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
"""The magnitudes of a 4-bit float with two exponent bits and one mantissa bit."""
E4M3_MAX = 448.0
NVFP4_BLOCK = 16


def int8(weight: Tensor) -> Tensor:
    """INT8, symmetric, one scale per output channel."""
    scale = weight.abs().amax(1, keepdim=True) / 127
    return (weight / scale).round() * scale


def fp8(weight: Tensor) -> Tensor:
    """FP8 E4M3, one scale per output channel."""
    scale = weight.abs().amax(1, keepdim=True) / E4M3_MAX
    return (weight / scale).to(torch.float8_e4m3fn).float() * scale


def nvfp4(weight: Tensor) -> Tensor:
    """NVFP4: E2M1 values in blocks of 16 along a row, an E4M3 scale per block, one float32 scale per tensor."""
    blocks = weight.reshape(weight.shape[0], -1, NVFP4_BLOCK)
    largest = blocks.abs().amax(-1, keepdim=True)
    tensor_scale = largest.max() / (E2M1[-1] * E4M3_MAX)
    scale = (largest / E2M1[-1] / tensor_scale).to(torch.float8_e4m3fn).float() * tensor_scale
    midpoints = (E2M1[1:] + E2M1[:-1]) / 2
    magnitude = E2M1[torch.bucketize(blocks.abs() / scale.clamp(min=1e-30), midpoints)]
    return (magnitude * blocks.sign() * scale).reshape(weight.shape)


FORMATS = {"int8": int8, "fp8": fp8, "nvfp4": nvfp4}
