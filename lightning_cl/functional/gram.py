# SPDX-License-Identifier: Apache-2.0
"""Sums of ``x^T x`` and ``x^T y``: half of the products, in a type that the device is fast in, added in float64."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

__all__ = ["Products", "add_rows", "mirrored", "statistics_device"]

Products = Literal["auto", "float64", "float32"]

# Half of a Gram matrix is the mirror of the other half: tiles below the diagonal save those products.
_TILE = 2048
# Rows of one float32 product: its rounding error grows with this number, the float64 sum's does not.
_FLOAT32_ROWS = 512
# Rows of one float64 product: as many as keep the converted copy small.
_FLOAT64_ROWS = 4096
# CUDA compute capabilities whose float64 rate is at least a quarter of the float32 rate.
_FAST_FLOAT64 = {(6, 0), (7, 0), (8, 0), (9, 0), (10, 0)}


def add_rows(gram: Tensor, cross: Tensor, features: Tensor, targets: Tensor, products: Products, sign: int = 1) -> None:
    """``gram += sign * x^T x`` (tiles on and below the diagonal alone) and ``cross += sign * x^T y``, in place.

    Args:
        gram: ``[E, E]``; `mirrored` makes it whole.
        cross: ``[E, K]``.
        features: Rows x, ``[N, E]``.
        targets: Rows y, ``[N, K]``.
        products: Type of the products: ``"float64"``, ``"float32"`` (in blocks of 512 rows, TF32 off), or ``"auto"``:
            float64 where the device is fast in it.
        sign: -1 takes the rows out again.
    """
    exact = products == "float64" or (products == "auto" and _fast_in_float64(features.device))
    kind = gram.dtype if exact else torch.float32
    size, width = _FLOAT64_ROWS if exact else _FLOAT32_ROWS, gram.shape[0]
    with _full_float32():
        for rows, wanted in zip(features.split(size), targets.split(size), strict=True):
            rows, wanted = rows.to(kind), wanted.to(rows.device, kind)
            _add_product(cross, rows, wanted, sign)
            for top in range(0, width, _TILE):
                for left in range(0, top + 1, _TILE):
                    tile = gram[top : top + _TILE, left : left + _TILE]
                    _add_product(tile, rows[:, top : top + _TILE], rows[:, left : left + _TILE], sign)


def mirrored(matrix: Tensor) -> Tensor:
    """Copy the lower triangle onto the upper one, in place, tile by tile.

    Example:
        >>> mirrored(torch.tensor([[1.0, 9.0], [2.0, 3.0]]))
        tensor([[1., 2.],
                [2., 3.]])
    """
    size = matrix.shape[0]
    for top in range(0, size, _TILE):
        corner = matrix[top : top + _TILE, top : top + _TILE]
        corner.copy_(corner.tril() + corner.tril(-1).T)
        matrix[top : top + _TILE, top + _TILE :] = matrix[top + _TILE :, top : top + _TILE].T
    return matrix


def statistics_device(device: torch.device) -> torch.device:
    """Where sums of rows on ``device`` are kept: MPS has no float64 at all, its products are added on the CPU."""
    return torch.device("cpu") if device.type == "mps" else device


def _add_product(target: Tensor, left: Tensor, right: Tensor, sign: int) -> None:
    """``target += sign * left^T right``, multiplied in the type of the operands, added in the target's."""
    if left.dtype == target.dtype and left.device == target.device:
        target.addmm_(left.T, right, alpha=sign)
    else:
        target.add_((left.T @ right).to(target.device, target.dtype), alpha=sign)


def _fast_in_float64(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) in _FAST_FLOAT64
    return device.type == "cpu"


@contextmanager
def _full_float32() -> Iterator[None]:
    """TF32 off: its 10-bit mantissa would put 1e-3 into the statistics. And no autocast."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False), torch.no_grad():
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
