# SPDX-License-Identifier: Apache-2.0
"""Which ridge: checked, factorised, and judged by leave-one-out errors in closed form."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["checked_ridge", "factored", "generalized_errors", "grid", "leave_one_out_errors", "try_factor"]


def checked_ridge(ridge: float) -> float:
    """The ridge as a float.

    Raises:
        ValueError: If it is not above 0 and finite.
    """
    ridge = float(ridge)
    if not (ridge > 0 and math.isfinite(ridge)):
        raise ValueError(
            f"`ridge={ridge}`: without a positive, finite ridge the system has no unique solution. Use a small one, "
            "such as 1e-3 times the mean square of the features."
        )
    return ridge


def try_factor(matrix: Tensor, ridge: float) -> Tensor | None:
    """Lower Cholesky factor of ``matrix + ridge I`` (its lower triangle is read), or None."""
    system = matrix.clone()
    system.diagonal().add_(ridge)
    factor, info = torch.linalg.cholesky_ex(system)
    return factor if int(info) == 0 and bool(torch.isfinite(factor.diagonal()).all()) else None


def factored(matrix: Tensor, ridge: float) -> Tensor:
    """As `try_factor`.

    Raises:
        ValueError: If it fails, with a ridge that works.
    """
    factor = try_factor(matrix, ridge)
    if factor is None:
        works = ridge or float(matrix.diagonal().mean()) * 1e-12
        while try_factor(matrix, works) is None and works < 1e300:
            works *= 10
        raise ValueError(
            f"`ridge={ridge:g}` is too small to factorise the {len(matrix)} x {len(matrix)} system in {matrix.dtype}."
            f" Use `ridge={works:g}`, which works, or scale the features down."
        )
    return factor


def grid(gram: Tensor) -> list[float]:
    """1e-6 to 1e2, in powers of ten, times the mean diagonal."""
    scale = float(gram.diagonal().mean()) or 1.0
    return [scale * 10.0**power for power in range(-6, 3)]


def generalized_errors(gram: Tensor, cross: Tensor, rows: float, ridges: Sequence[float]) -> Tensor:
    """Leave-one-out error for each ridge from the sums alone: every row's leverage replaced by the mean leverage.

    ``N * RSS / (N - tr H)^2`` (Golub, Heath and Wahba, 1979), where ``RSS`` is the squared residual and ``H`` the hat
    matrix. With ``W`` solved, ``RSS = |Y|^2 - <C, W> - ridge |W|^2`` and ``tr H = E - ridge tr (A + ridge I)^-1``, so
    that one Cholesky factor a ridge gives both.

    Args:
        gram: ``A = sum x^T x``, ``[E, E]``.
        cross: ``C = sum x^T y``, ``[E, K]``, of one-hot labels y.
        rows: Number of rows N.
        ridges: Ridges to try.

    Returns:
        ``[len(ridges)]`` float64, on the CPU; infinity where the factorisation fails, or rounding leaves nothing to
        judge by.
    """
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    # Both parts of the quotient are differences: what rounding leaves of them is no error to compare.
    eps, trace = torch.finfo(gram.dtype).eps, float(gram.diagonal().sum())
    errors = []
    for ridge in ridges:
        factor = try_factor(gram, ridge)
        if factor is None:
            errors.append(math.inf)
            continue
        weight = torch.cholesky_solve(cross, factor)
        # Labels are one-hot, so their squares sum to the number of rows.
        residual = rows - float((cross * weight).sum()) - ridge * float(weight.square().sum())
        # The trace of an inverse is the sum of squares of its factor's inverse.
        inverse = torch.linalg.solve_triangular(factor, eye, upper=False)
        free = rows - len(gram) + ridge * float(inverse.square().sum())
        judged = residual > 1e4 * eps * rows and free > eps * len(gram) * trace / ridge
        errors.append(rows * residual / free**2 if judged else math.inf)
    return torch.tensor(errors, dtype=torch.float64)


def leave_one_out_errors(
    gram: Tensor, cross: Tensor, features: Tensor, targets: Tensor, ridges: Sequence[float]
) -> Tensor:
    """Exact leave-one-out error of rows that are part of the sums, for each ridge, without refitting.

    ``mean (y - x W)^2 / (1 - x (A + ridge I)^-1 x^T)^2`` over the given rows and all columns.

    Args:
        gram: ``A = sum x^T x``, ``[E, E]``.
        cross: ``C = sum x^T y``, ``[E, K]``.
        features: Rows x, ``[N, E]``.
        targets: Rows y, ``[N, K]``.
        ridges: Ridges to try.

    Returns:
        ``[len(ridges)]`` float64, on the CPU; infinity where the factorisation fails.
    """
    errors = []
    for ridge in ridges:
        factor = try_factor(gram, ridge)
        if factor is None:
            errors.append(math.inf)
            continue
        leverage = torch.linalg.solve_triangular(factor, features.T, upper=False).square().sum(dim=0)
        residual = targets - features @ torch.cholesky_solve(cross, factor)
        errors.append(float((residual / (1 - leverage).unsqueeze(1)).square().mean()))
    return torch.tensor(errors, dtype=torch.float64)
