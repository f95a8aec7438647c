"""The Triton backend, imported as ``cktat_loss.kernels``."""

from __future__ import annotations


def is_available() -> bool:
    """Whether the Triton kernels can run here. They are not written yet."""
    return False
