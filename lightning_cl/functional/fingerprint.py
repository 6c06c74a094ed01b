# SPDX-License-Identifier: Apache-2.0
"""A 64-bit fingerprint of a tensor's bits, computed where the tensor lies."""

from __future__ import annotations

import torch
from torch import Tensor

# Words that are mixed at once (32 MiB each): bounds the temporaries, not the result.
_WORDS_AT_ONCE = 1 << 22

# The multipliers of the SplitMix64 generator, as signed 64-bit integers.
_STEP = 0x9E3779B97F4A7C15 - (1 << 64)
_FIRST = 0xBF58476D1CE4E5B9 - (1 << 64)
_SECOND = 0x94D049BB133111EB - (1 << 64)


def tensor_fingerprint(tensor: Tensor) -> Tensor:
    """Mix every 64-bit word of a tensor with its position and add them up modulo 2^64.

    Integer arithmetic only, so a CPU and a GPU agree to the bit, and weights never leave the device: a cryptographic
    hash would copy gigabytes to the CPU at each start of a run. It tells tensors apart that differ by accident (a step
    of training, another checkpoint), not ones that were made to collide.

    Args:
        tensor: any dtype and shape. The shape is not part of the fingerprint, the bits in C order are.

    Returns:
        int64 scalar on the tensor's device; no synchronisation.

    Example:
        >>> a = torch.arange(5.0)
        >>> bool(tensor_fingerprint(a) == tensor_fingerprint(a.clone()))
        True
        >>> bool(tensor_fingerprint(a) == tensor_fingerprint(a.flip(0)))
        False
    """
    octets = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    missing = -octets.numel() % 8
    if missing or octets.data_ptr() % 8:
        octets = torch.nn.functional.pad(octets, (0, missing))
    words = octets.view(torch.int64)
    # The length tells a tensor from the same one with zeros after it.
    total = torch.full((), tensor.numel() * tensor.element_size(), dtype=torch.int64, device=tensor.device)
    for start in range(0, words.numel(), _WORDS_AT_ONCE):
        block = words[start : start + _WORDS_AT_ONCE]
        places = torch.arange(start + 1, start + 1 + block.numel(), dtype=torch.int64, device=block.device)
        mixed = places.mul_(_STEP).add_(block)
        mixed = _shift_xor(mixed, 30).mul_(_FIRST)
        mixed = _shift_xor(mixed, 27).mul_(_SECOND)
        total = total + _shift_xor(mixed, 31).sum()
    return total


def _shift_xor(x: Tensor, bits: int) -> Tensor:
    # PyTorch shifts signed integers arithmetically; the mask makes it the logical shift of SplitMix64.
    return x.bitwise_xor_((x >> bits) & ((1 << (64 - bits)) - 1))
