"""Quantization quality as test assertions: KL(reference ‖ candidate) over the full vocabulary."""

__version__ = "0.1.0"
