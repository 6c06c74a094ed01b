# SPDX-License-Identifier: Apache-2.0
"""How the frozen base is held in 4 bits."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from lightning.pytorch.utilities.exceptions import MisconfigurationException


@dataclass
class QuantizationConfig:
    """Which layers are held in 4 bits, and how.

    Frozen ``nn.Linear`` layers are quantized when the strategy sets the module up; the head, tied layers and every
    layer with a trainable parameter stay as they are. The packed weights are stored in the compute dtype of the
    Trainer's ``precision``: FSDP must be able to shard them, and a conversion would destroy them.

    Args:
        quant_type: ``"nf4"`` (for weights that are normally distributed; QLoRA, arXiv 2305.14314, section 3) or
            ``"fp4"``.
        double: quantize the scales as well (QLoRA's double quantization): 0.37 bits a parameter less.
        skip: names, or parts of names, of further linear layers to leave out.
        only: quantize just the layers whose name contains one of these; asking for a trainable one is an error.
        check: compare a quantized layer's output before and after sharding, and stop on a difference.

    Raises:
        MisconfigurationException: for an unknown ``quant_type``, or ``only`` and ``skip`` naming the same.

    Example:
        >>> QuantizationConfig(skip=["router"]).quant_type
        'nf4'

    In YAML::

        strategy:
          class_path: lightning_cl.strategies.CLFSDPStrategy
          init_args:
            quantization:
              quant_type: nf4
              skip: [router]
    """

    quant_type: Literal["nf4", "fp4"] = "nf4"
    double: bool = True
    skip: list[str] = field(default_factory=list)
    only: list[str] | None = None
    check: bool = True

    def __post_init__(self) -> None:
        if self.quant_type not in ("nf4", "fp4"):
            raise MisconfigurationException(
                f"`quant_type={self.quant_type!r}` is no 4-bit type that bitsandbytes has kernels for. Use `'nf4'` (for"
                " weights) or `'fp4'`."
            )
        both = sorted(set(self.skip) & set(self.only or ()))
        if both:
            raise MisconfigurationException(
                f"`skip` and `only` both name {', '.join(both)}, so whether to quantize it is undecided. Remove it from"
                " one of them."
            )


def resolve(quantization: QuantizationConfig | Literal["nf4", "fp4"] | None) -> QuantizationConfig | None:
    """A config from what a strategy's ``quantization`` argument may be.

    >>> resolve("fp4").quant_type
    'fp4'
    """
    if isinstance(quantization, str):
        return QuantizationConfig(quant_type=quantization)
    if quantization is None or isinstance(quantization, QuantizationConfig):
        return quantization
    raise TypeError(
        f"`quantization={quantization!r}` is a `{type(quantization).__name__}`. Pass `'nf4'`, `'fp4'` or a"
        " `QuantizationConfig`."
    )
