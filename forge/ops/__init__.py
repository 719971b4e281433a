"""Every op: importing this module fills `forge.op.REGISTRY`."""

from forge.ops import activation, attention, embed, linear, norm, pages, rope, sampling

__all__ = ["activation", "attention", "embed", "linear", "norm", "pages", "rope", "sampling"]
