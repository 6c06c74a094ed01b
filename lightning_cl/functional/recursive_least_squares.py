# SPDX-License-Identifier: Apache-2.0
"""Ridge classification that learns in closed form, block after block, and never forgets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_cl.functional import ridge as ridges_of
from lightning_cl.functional.gram import Products, add_rows, mirrored, statistics_device
from lightning_cl.functional.ridge import checked_ridge, factored, try_factor

__all__ = ["RecursiveLeastSquares"]

Method = Literal["cholesky", "woodbury"]

# Rows of one Woodbury step: its inner system has this many unknowns.
_WOODBURY_ROWS = 512


class RecursiveLeastSquares:
    r"""Ridge regression on one-hot labels, updated in blocks, equal to the joint solution on everything seen.

    With rows ``x`` and one-hot labels ``y`` it solves ``W = (A + ridge I)^-1 C``, where ``A = sum x^T x`` and
    ``C = sum x^T y`` (arXiv 2503.13575, section 3.3; the exactness is its theorem 1). ``"cholesky"`` keeps ``A``
    and ``C``: blocks may come in any order, machines can be merged, rows can be taken out again, and the ridge can
    be chosen at the end. ``"woodbury"`` keeps ``R = (A + ridge I)^-1`` and ``W`` themselves:

    ``G = R X^T``, ``S = I + X G``, ``R <- R - G S^-1 G^T``, ``W <- [W 0] + G S^-1 (Y - X [W 0])``,

    always multiplied from the narrow side, so a block of N rows costs ``O(N E^2)``. The label space widens by itself:
    column = integer label, and labels that never came are zero columns.

    Memory: one ``E x E`` matrix in ``dtype`` (E = 4096 in float64: 134 MB), a second one while solving, and four more
    while a ridge is chosen.

    Args:
        in_features: Width E of a feature row.
        ridge: Strength of the ridge, above 0. With ``"cholesky"`` it may be changed at any time.
        method: ``"cholesky"`` (sufficient statistics) or ``"woodbury"`` (the recursion of the paper).
        dtype: Type of the statistics and the solution. Float32 loses the solution at small ridges.
        products: Type in which ``x^T x`` is multiplied before it is added to the statistics: ``"float64"``,
            ``"float32"`` (in blocks of 512 rows, TF32 off; about 1e-7 of the Gram matrix), or ``"auto"``: float64
            where the device is fast in it, else float32. For ``"cholesky"`` only.
        max_classes: Labels at or above this are refused. None: no limit.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> features = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
        >>> router = RecursiveLeastSquares(in_features=2, ridge=1.0)
        >>> router.update(features[:2], torch.tensor([0, 1]))
        >>> router.update(features[2:], torch.tensor([1]))
        >>> router.weight
        tensor([[ 0.3750,  0.1250],
                [-0.1250,  0.6250]], dtype=torch.float64)
        >>> router.predict(features).argmax(dim=1)
        tensor([0, 1, 1])
    """

    def __init__(
        self,
        in_features: int,
        ridge: float = 1.0,
        method: Method = "cholesky",
        dtype: torch.dtype = torch.float64,
        *,
        products: Products = "auto",
        max_classes: int | None = None,
    ) -> None:
        if in_features < 1:
            raise ValueError(f"`in_features={in_features}`: a feature row has at least one entry. Pass its width E.")
        if method not in ("cholesky", "woodbury"):
            raise ValueError(f"`method={method!r}` is unknown. Use 'cholesky' or 'woodbury'.")
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"`dtype={dtype}` cannot hold the statistics. Use torch.float64, or torch.float32.")
        if products not in ("auto", "float64", "float32"):
            raise ValueError(f"`products={products!r}` is unknown. Use 'auto', 'float64' or 'float32'.")
        if max_classes is not None and max_classes < 1:
            raise ValueError(f"`max_classes={max_classes}` leaves no class. Use at least 1, or None for no limit.")
        self.in_features = in_features
        self.method: Method = method
        self.dtype = dtype
        self.products: Products = products
        self.max_classes = max_classes
        self._ridge = checked_ridge(ridge)
        self._matrix: Tensor | None = None  # cholesky: A, of which only tiles on and below the diagonal are current
        self._columns: Tensor | None = None  # cholesky: C; woodbury: W
        self._counts = torch.zeros(0, dtype=torch.int64)
        self._weight: Tensor | None = None

    # ------------------------------------------------------------------ what it knows

    @property
    def ridge(self) -> float:
        """Strength of the ridge; setting it re-solves without data (``"cholesky"`` only)."""
        return self._ridge

    @ridge.setter
    def ridge(self, value: float) -> None:
        value = checked_ridge(value)
        if self.method == "woodbury" and value != self._ridge:
            raise ValueError(
                f"`ridge={value}`: the recursion carries its ridge ({self._ridge}) inside the inverse and cannot "
                "change it. Use `method='cholesky'`, or start again with the new ridge."
            )
        self._ridge, self._weight = value, None

    @property
    def num_classes(self) -> int:
        """Number of columns K: the largest label seen, plus one."""
        return len(self._counts)

    @property
    def counts(self) -> Tensor:
        """Rows seen per label, ``[K]`` int64; 0 where a column is empty."""
        return self._counts.clone()

    @property
    def device(self) -> torch.device:
        """Where the statistics are: the device of the first features."""
        return self._counts.device if self._matrix is None else self._matrix.device

    @property
    def gram(self) -> Tensor:
        """``A = sum x^T x``, symmetric, ``[E, E]``."""
        if self._matrix is None:
            return torch.zeros(self.in_features, self.in_features, dtype=self.dtype)
        if self.method == "cholesky":
            return mirrored(self._matrix.clone())
        gram = torch.cholesky_inverse(factored(self._matrix, 0.0))
        gram.diagonal().sub_(self._ridge)
        return mirrored(gram)

    @property
    def cross(self) -> Tensor:
        """``C = sum x^T y``, ``[E, K]``."""
        if self._columns is None:
            return torch.zeros(self.in_features, 0, dtype=self.dtype)
        if self.method == "cholesky":
            return self._columns.clone()
        gram = self.gram
        gram.diagonal().add_(self._ridge)
        return gram @ self._columns

    @property
    def weight(self) -> Tensor:
        """The solution ``W``, ``[E, K]``; solved when first read after a change.

        Raises:
            ValueError: If the factorisation fails; the message names a ridge that works.
        """
        if self._matrix is None or self._columns is None:
            return torch.zeros(self.in_features, 0, dtype=self.dtype)
        if self.method == "woodbury":
            return self._columns
        if self._weight is None:
            self._weight = torch.cholesky_solve(self._columns, factored(self._matrix, self._ridge))
        return self._weight

    def predict(self, features: Tensor) -> Tensor:
        """Scores ``features @ weight``: ``[N, E]`` -> ``[N, K]``."""
        features = self._checked_features(features)
        return features.to(self.weight.device, self.dtype) @ self.weight

    # ------------------------------------------------------------------ learning and unlearning

    def update(self, features: Tensor, labels: Tensor) -> None:
        """Learn rows ``features [N, E]`` with integer ``labels [N]``.

        Raises:
            ValueError: On another width, NaN or infinite features, or labels out of range.
            TypeError: On labels that are not integers.
        """
        features, labels = self._checked_rows(features, labels)
        if len(labels) == 0:
            return
        self._allocate(features.device)
        labels = labels.to(self.device)
        self._widen(int(labels.max()) + 1)
        self._absorb(features, labels, sign=1)
        self._counts += torch.bincount(labels, minlength=self.num_classes)

    def downdate(self, features: Tensor, labels: Tensor) -> None:
        """Take rows out again, in place: afterwards they were never seen. Arguments as in `update`.

        Raises:
            ValueError: As `update`, and if a label has fewer rows than are to be taken out, or if (``"woodbury"``)
                the rows were not part of the fit.
        """
        features, labels = self._checked_rows(features, labels)
        if len(labels) == 0:
            return
        taken = torch.bincount(labels, minlength=self.num_classes).cpu()
        seen = self._counts.cpu()
        if len(taken) > len(seen) or bool((taken > seen).any()):
            label = next(k for k, n in enumerate(taken.tolist()) if n > (int(seen[k]) if k < len(seen) else 0))
            have = int(seen[label]) if label < len(seen) else 0
            raise ValueError(
                f"Cannot take out {int(taken[label])} rows of label {label}: only {have} were seen. Pass rows that "
                "were given to `update`, with the labels they had."
            )
        self._absorb(features, labels.to(self.device), sign=-1)
        self._counts -= taken.to(self.device)

    def merge(self, other: RecursiveLeastSquares) -> None:
        """Add everything that ``other`` (another rank or machine, same settings) has seen, in place.

        Raises:
            ValueError: If width, method, or (``"woodbury"``) ridge differ.
        """
        for name in ("in_features", "method", "dtype") + (("ridge",) if self.method == "woodbury" else ()):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                raise ValueError(
                    f"Cannot merge statistics with `{name}={theirs}` into `{name}={mine}`: they answer different "
                    "problems. Build both with the same arguments."
                )
        if other._matrix is None or other._columns is None:
            return
        self._allocate(other.device)
        assert self._matrix is not None
        self._widen(other.num_classes)
        assert self._columns is not None
        if self.method == "cholesky":
            self._matrix += other._matrix.to(self.device)
            self._columns[:, : other.num_classes] += other._columns.to(self.device)
        else:
            cross = self.cross
            cross[:, : other.num_classes] += other.cross.to(self.device)
            total = self.gram + other.gram.to(self.device)
            factor = factored(total, self._ridge)
            self._matrix = mirrored(torch.cholesky_inverse(factor))
            self._columns = torch.cholesky_solve(cross, factor)
        self._counts[: other.num_classes] += other._counts.to(self.device)
        self._weight = None

    def all_reduce(self, group: Any = None) -> None:
        """Sum what all ranks have seen, on every rank, in place (``"cholesky"`` only). Collective.

        Args:
            group: A process group that carries tensors of the CPU; None: the default one.

        Raises:
            ValueError: With ``"woodbury"``, whose state is no sum.
        """
        if self.method == "woodbury":
            raise ValueError(
                "The recursion's state cannot be summed over ranks. Use `method='cholesky'`, or `merge` the ranks' objects."
            )
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(group) == 1:
            return
        device = self.device
        classes = torch.tensor(self.num_classes)
        dist.all_reduce(classes, op=dist.ReduceOp.MAX, group=group)
        self.to("cpu")
        self._allocate(torch.device("cpu"))
        self._widen(int(classes))
        for part in (self._matrix, self._columns, self._counts):
            dist.all_reduce(part, group=group)
        self._weight = None
        self.to(device)

    # ------------------------------------------------------------------ choosing the ridge afterwards

    def generalized_cross_validation(self, ridges: Sequence[float]) -> Tensor:
        """Leave-one-out error for each ridge, from the statistics alone: no row is needed.

        Leave-one-out with every row's leverage replaced by the mean leverage (Golub, Heath and Wahba, 1979):
        ``N * RSS / (N - tr H)^2``, where ``RSS`` is the squared residual and ``H`` the hat matrix.

        Args:
            ridges: Ridges to try.

        Returns:
            ``[len(ridges)]`` float64 mean squared errors, on the CPU; infinity where nothing is left to judge by.
        """
        ridges = [checked_ridge(ridge) for ridge in ridges]
        rows = float(self._counts.sum())
        if rows == 0:
            return torch.full((len(ridges),), math.inf, dtype=torch.float64)
        return ridges_of.generalized_errors(self.gram, self.cross, rows, ridges)

    def leave_one_out(self, features: Tensor, labels: Tensor, ridges: Sequence[float]) -> Tensor:
        """Exact leave-one-out error of rows that are part of the fit, for each ridge, without refitting.

        ``mean (y - x W)^2 / (1 - x (A + ridge I)^-1 x^T)^2`` over the given rows and all columns.

        Args:
            features: Rows ``[N, E]`` that were given to `update`: all of them, or a sample.
            labels: Their labels ``[N]``.
            ridges: Ridges to try; a ridge whose factorisation fails gets infinity.

        Returns:
            ``[len(ridges)]`` float64 mean squared errors, on the CPU.
        """
        features, labels = self._checked_rows(features, labels)
        gram, cross = self.gram, self.cross
        targets = torch.nn.functional.one_hot(labels.to(gram.device), self.num_classes).to(gram.dtype)
        return ridges_of.leave_one_out_errors(
            gram, cross, features.to(gram.device, gram.dtype), targets, [checked_ridge(ridge) for ridge in ridges]
        )

    def choose_ridge(
        self, ridges: Sequence[float] | None = None, features: Tensor | None = None, labels: Tensor | None = None
    ) -> float:
        """Set the ridge to the one of a grid with the smallest leave-one-out error, and return it.

        Args:
            ridges: The grid. None: 1e-6 to 1e2, in powers of ten, times the mean diagonal of ``A``.
            features: With ``labels``: rows of the fit, for the exact error of `leave_one_out`. None: the error of
                `generalized_cross_validation`, which needs no rows.
            labels: Labels of ``features``.

        Raises:
            ValueError: If nothing was learnt yet, or no ridge of the grid can be factorised.
        """
        if self._matrix is None:
            raise ValueError("No rows were seen, so there is no ridge to choose. Call `update` first.")
        if ridges is None:
            ridges = ridges_of.grid(self.gram)
        if features is not None and labels is not None:
            errors = self.leave_one_out(features, labels, ridges)
        else:
            errors = self.generalized_cross_validation(ridges)
        for best in errors.argsort(stable=True).tolist():
            if math.isfinite(float(errors[best])) and try_factor(self._matrix, float(ridges[best])) is not None:
                self.ridge = float(ridges[best])
                return self._ridge
        raise ValueError(
            f"No ridge of {list(ridges)} gives a finite leave-one-out error and can be factorised in {self.dtype}. "
            "Pass larger `ridges`, or leave `ridges=None`."
        )

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on, on the CPU; of the symmetric matrix only one triangle."""
        state: dict[str, Any] = {
            "in_features": self.in_features,
            "ridge": self._ridge,
            "method": self.method,
            "counts": self._counts.cpu().clone(),
        }
        if self._matrix is not None and self._columns is not None:
            keep = torch.ones(self.in_features, self.in_features, dtype=torch.bool).tril_()
            state["matrix"] = self._matrix.cpu()[keep]
            state["columns"] = self._columns.cpu().clone()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state made by `state_dict`.

        Raises:
            ValueError: If it was made with another width or method.
        """
        for name in ("in_features", "method"):
            if state[name] != getattr(self, name):
                raise ValueError(
                    f"The state was made with `{name}={state[name]!r}`, but this object has "
                    f"`{name}={getattr(self, name)!r}`. Build it with `{name}={state[name]!r}`."
                )
        self._ridge = float(state["ridge"])
        self._counts = state["counts"].clone()
        self._matrix = self._columns = self._weight = None
        if "matrix" in state:
            keep = torch.ones(self.in_features, self.in_features, dtype=torch.bool).tril_()
            matrix = torch.zeros(self.in_features, self.in_features, dtype=self.dtype)
            matrix[keep] = state["matrix"].to("cpu", self.dtype)
            self._matrix = mirrored(matrix)
            self._columns = state["columns"].to("cpu", self.dtype).clone()

    def to(self, device: torch.device | str) -> RecursiveLeastSquares:
        """Move the statistics to ``device``, in place, and return self."""
        device = statistics_device(torch.device(device))
        self._counts = self._counts.to(device)
        self._matrix = None if self._matrix is None else self._matrix.to(device)
        self._columns = None if self._columns is None else self._columns.to(device)
        self._weight = None if self._weight is None else self._weight.to(device)
        return self

    # ------------------------------------------------------------------ inside

    def _absorb(self, features: Tensor, labels: Tensor, sign: int) -> None:
        assert self._matrix is not None
        assert self._columns is not None
        targets = torch.nn.functional.one_hot(labels, self.num_classes)
        if self.method == "woodbury":
            for rows, wanted in zip(features.split(_WOODBURY_ROWS), targets.split(_WOODBURY_ROWS), strict=True):
                self._recur(rows.to(self._matrix), wanted.to(self._matrix), sign)
            return
        add_rows(self._matrix, self._columns, features, targets, self.products, sign)
        self._weight = None

    def _recur(self, rows: Tensor, wanted: Tensor, sign: int) -> None:
        assert self._matrix is not None
        assert self._columns is not None
        gain = self._matrix @ rows.T  # [E, N]
        inner = sign * (rows @ gain)
        inner.diagonal().add_(1.0)
        factor, info = torch.linalg.cholesky_ex((inner + inner.T) / 2)
        if int(info) != 0:
            raise ValueError(
                "The rows to take out were not part of the fit (the system without them is not positive definite). "
                "Pass rows that were given to `update`."
                if sign < 0
                else f"The recursion lost positive definiteness at `ridge={self._ridge}`. Use `dtype=torch.float64`, "
                "`method='cholesky'`, or a larger ridge."
            )
        half = torch.linalg.solve_triangular(factor, gain.T, upper=False)  # [N, E]
        residual = torch.linalg.solve_triangular(factor, wanted - rows @ self._columns, upper=False)
        self._columns += sign * (half.T @ residual)
        self._matrix -= sign * (half.T @ half)
        mirrored(self._matrix)  # rounding is not symmetric, and an asymmetric inverse drifts

    def _allocate(self, device: torch.device) -> None:
        if self._matrix is not None:
            return
        device = statistics_device(device)
        self._matrix = torch.zeros(self.in_features, self.in_features, dtype=self.dtype, device=device)
        if self.method == "woodbury":
            self._matrix.diagonal().fill_(1 / self._ridge)
        self._columns = torch.zeros(self.in_features, 0, dtype=self.dtype, device=device)
        self._counts = self._counts.to(device)

    def _widen(self, classes: int) -> None:
        assert self._columns is not None
        new = classes - self.num_classes
        if new > 0:
            self._columns = torch.cat([self._columns, self._columns.new_zeros(self.in_features, new)], dim=1)
            self._counts = torch.cat([self._counts, self._counts.new_zeros(new)])

    def _checked_features(self, features: Tensor) -> Tensor:
        if features.ndim != 2 or features.shape[1] != self.in_features:
            raise ValueError(
                f"Features have shape {list(features.shape)}, but `in_features={self.in_features}` wants "
                f"[N, {self.in_features}]. Pass rows of that width, or build with the width of the features."
            )
        return features.detach()

    def _checked_rows(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        features = self._checked_features(features)
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            raise TypeError(f"Labels have type {labels.dtype}, but a label is a column index. Pass an integer tensor.")
        if labels.shape != features.shape[:1]:
            raise ValueError(
                f"{features.shape[0]} feature rows came with labels of shape {list(labels.shape)}. "
                "Pass one label a row."
            )
        if len(labels) == 0:
            return features, labels.long()
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or (self.max_classes is not None and high >= self.max_classes):
            limit = "" if self.max_classes is None else f" and below `max_classes={self.max_classes}`"
            raise ValueError(
                f"Label {low if low < 0 else high} is out of range: a label is a column index, at least 0{limit}. "
                "Map the labels to 0, 1, 2, ... first."
            )
        if not bool(torch.isfinite(features).all()):
            bad = (~torch.isfinite(features)).any(dim=1).nonzero().flatten().tolist()
            raise ValueError(
                f"Features hold NaN or infinity in {len(bad)} of {len(labels)} rows (first: row {bad[0]}); one of them "
                "would spoil the whole solution. Leave those rows out, or find what made them."
            )
        return features, labels.long()
