"""Softmax attention within a window of the raster order."""

from grafting.kernels.window_attention.reference import window_attention

__all__ = ["window_attention"]
