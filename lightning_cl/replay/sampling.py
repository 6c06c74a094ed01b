# SPDX-License-Identifier: Apache-2.0
"""Draw tokens reproducibly: one random stream a row, and the inverse of the cumulative distribution."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


class InverseSampler:
    """Draw one token a row: the inverse of the cumulative distribution at a given uniform number.

    In two levels, so that no sum runs over the whole vocabulary: the block of 256 tokens by its mass, then the token
    inside it. Sums are products with a triangle of ones in float64: exact to 1e-15, and reproducible on a GPU, where a
    cumulative sum is not.

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

    def __init__(self, vocabulary: int, device: torch.device, temperature: float = 1.0) -> None:
        self.work = torch.float32 if device.type == "mps" else torch.float64
        self._temperature = temperature
        self._triangles = [
            torch.ones(n, n, device=device, dtype=self.work).triu()
            for n in (-(-vocabulary // self._block), self._block)
        ]

    def __call__(self, logits: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens for ``logits [B, V]`` at ``uniforms [B]`` in [0, 1), and whether each row's logits were usable."""
        rows, vocabulary = logits.shape
        outer, inner = self._triangles
        if self._temperature != 1.0:
            logits = logits.float() / self._temperature
        p = torch.softmax(logits, dim=-1, dtype=torch.float32)
        missing = len(outer) * self._block - vocabulary
        if missing:  # padding by nothing would copy the largest tensor of a decode step
            p = torch.nn.functional.pad(p, (0, missing))
        p = p.view(rows, len(outer), self._block)
        mass = p.sum(-1, dtype=self.work)
        cumulative = mass @ outer
        wanted = uniforms.to(self.work)[:, None] * cumulative[:, -1:]
        block = (cumulative <= wanted).sum(-1, keepdim=True).clamp_max(len(outer) - 1)
        rest = wanted - (cumulative - mass).gather(1, block)
        inside = p.gather(1, block[:, :, None].expand(-1, 1, self._block))[:, 0]
        offset = (inside.to(self.work) @ inner <= rest).sum(-1)
        # Rounding can leave a remainder after the block's last token; its likeliest token is a token that it has.
        offset = torch.where(offset < self._block, offset, inside.argmax(-1))
        token = (block[:, 0] * self._block + offset).clamp_max(vocabulary - 1)
        return token, torch.isfinite(cumulative[:, -1])


def row_uniforms(seed: int, row: int, length: int) -> Any:
    """The uniform numbers of one row, one a position: a float64 numpy array ``[length]``, the same on every machine.

    Example:
        >>> bool((row_uniforms(0, 3, 4) == row_uniforms(0, 3, 8)[:4]).all())
        True
    """
    mask = (1 << 64) - 1
    return np.random.Generator(np.random.Philox(key=[seed & mask, row & mask])).random(length)
