# SPDX-License-Identifier: Apache-2.0
"""Draw tokens reproducibly: one random stream a row, and the inverse of the cumulative distribution."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


class InverseSampler:
    """Draw one token a row: the inverse of the cumulative distribution at a given uniform number.

    In two levels, so that no cumulative sum runs over the whole vocabulary: the block of 256 tokens by its mass, then
    the token inside it. Cumulative sums are products with a triangle of ones in float64: exact to 1e-15, and
    reproducible on a GPU, where a cumulative sum is not. The distribution itself is never written down: of a large
    vocabulary it would be the largest tensor of a decode step. Exponentials live a few rows at a time, in the cache of
    a GPU, and those of the drawn block are taken again.

    Args:
        vocabulary: Number of tokens.
        device: Where the logits are.
        temperature: Logits are divided by it.

    Example:
        >>> draw = InverseSampler(3, torch.device("cpu"))
        >>> tokens, finite = draw(torch.tensor([[0.0, 0.0, 0.0]]).log_softmax(-1), torch.tensor([0.5]))
        >>> tokens.tolist(), finite.tolist()
        ([1], [True])
    """

    _block = 256
    # Exponentials at a time: 32 MiB of float32.
    _elements = 2**23

    def __init__(self, vocabulary: int, device: torch.device, temperature: float = 1.0) -> None:
        self.work = torch.float32 if device.type == "mps" else torch.float64
        self._temperature = temperature
        self._triangles = [
            torch.ones(n, n, device=device, dtype=self.work).triu()
            for n in (-(-vocabulary // self._block), self._block)
        ]
        self._places = torch.arange(self._block, device=device)

    def __call__(self, logits: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens for ``logits [B, V]`` at ``uniforms [B]`` in [0, 1), and whether each row's logits were usable."""
        vocabulary = logits.shape[1]
        outer, inner = self._triangles
        # Relative to the largest: nothing overflows.
        top = logits.amax(-1, keepdim=True).to(torch.promote_types(logits.dtype, torch.float32))
        parts = max(1, self._elements // vocabulary)
        mass = torch.cat([self._masses(*part) for part in zip(logits.split(parts), top.split(parts), strict=True)])
        cumulative = mass @ outer
        wanted = uniforms.to(self.work)[:, None] * cumulative[:, -1:]
        block = (cumulative <= wanted).sum(-1, keepdim=True).clamp_max(len(outer) - 1)
        rest = wanted - (cumulative - mass).gather(1, block)
        places = block * self._block + self._places
        inside = self._exponentials(logits.gather(1, places.clamp_max(vocabulary - 1)), top)
        inside = inside.masked_fill(places >= vocabulary, 0.0)
        offset = (inside.to(self.work) @ inner <= rest).sum(-1)
        # Rounding can leave a remainder after the block's last token; its likeliest token is a token that it has.
        offset = torch.where(offset < self._block, offset, inside.argmax(-1))
        token = (block[:, 0] * self._block + offset).clamp_max(vocabulary - 1)
        return token, torch.isfinite(cumulative[:, -1])

    def _exponentials(self, logits: Tensor, top: Tensor) -> Tensor:
        # Cast first: an operation on two dtypes at once runs at a third of a GPU's bandwidth.
        difference = logits.to(top.dtype, copy=True).sub_(top)
        return (difference if self._temperature == 1.0 else difference.div_(self._temperature)).exp_()

    def _masses(self, logits: Tensor, top: Tensor) -> Tensor:
        """The sum of each block's exponentials."""
        values = self._exponentials(logits, top)
        blocks = values.shape[1] // self._block
        whole = values[:, : blocks * self._block].unflatten(1, (blocks, self._block)).sum(-1)
        rest = values[:, blocks * self._block :]
        return (torch.cat([whole, rest.sum(-1, keepdim=True)], 1) if rest.shape[1] else whole).to(self.work)


def row_uniforms(seed: int, row: int, length: int) -> Any:
    """The uniform numbers of one row, one a position: a float64 numpy array ``[length]``, the same on every machine.

    Example:
        >>> bool((row_uniforms(0, 3, 4) == row_uniforms(0, 3, 8)[:4]).all())
        True
    """
    mask = (1 << 64) - 1
    return np.random.Generator(np.random.Philox(key=[seed & mask, row & mask])).random(length)
