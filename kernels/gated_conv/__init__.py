"""The gated causal convolutions of the Hyena family."""

from grafting.kernels.gated_conv.reference import causal_taps, gated_conv

__all__ = ["causal_taps", "gated_conv"]
