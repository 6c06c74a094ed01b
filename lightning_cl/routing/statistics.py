# SPDX-License-Identifier: Apache-2.0
"""What the router learns from: sufficient statistics of all finished tasks, and of the one that runs."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from lightning_cl import distributed
from lightning_cl.functional import RecursiveLeastSquares
from lightning_cl.routing.features import Expansion
from lightning_cl.routing.router import RouteClass

__all__ = ["RouterStatistics"]

# Rows that wait before they are expanded and multiplied together: one pass over the E x E matrix for all of them.
_BLOCK = 512


class RouterStatistics:
    """Collects pooled hidden states by class, and turns them into the router's weight.

    The running task's sums are kept apart until it ends: a task that is started again starts its sums again.

    Args:
        expansion_dim: Width E of the features.
        ridge: A number, or ``"auto"`` for the best of a grid by generalized cross-validation.
        seed: Seed of the expansion.
    """

    def __init__(self, expansion_dim: int, ridge: float | Literal["auto"], seed: int) -> None:
        self.expansion_dim = expansion_dim
        self.ridge = ridge
        self.seed = seed
        self.classes: list[RouteClass] = []
        self.expansion: Expansion | None = None
        self.total = self._empty()
        self.current = self._empty()
        self._pending: list[tuple[Tensor, Tensor]] = []

    def label(self, name: str, adapter: str) -> int:
        """The column of a class; a new class gets the next one."""
        for column, known in enumerate(self.classes):
            if known.adapter == adapter:
                self.classes[column] = RouteClass(name, adapter)
                return column
        self.classes.append(RouteClass(name, adapter))
        return len(self.classes) - 1

    def knows(self, adapter: str) -> bool:
        """Whether the finished tasks had rows of the class that this adapter answers for."""
        seen = dict(enumerate(self.total.counts.tolist()))
        return any(c.adapter == adapter and seen.get(column) for column, c in enumerate(self.classes))

    def observe(self, pooled: Tensor, label: int) -> None:
        """Take rows ``[N, D]`` of one class into the running task's sums."""
        if self.expansion is None:
            self.expansion = Expansion(pooled.shape[1], self.expansion_dim, self.seed)
        if pooled.shape[1] != self.expansion.in_features:
            raise ValueError(
                f"The feature layer gives {pooled.shape[1]} numbers a sample, but the router was fitted on"
                f" {self.expansion.in_features}. Use the model and `feature_layer` of the earlier tasks."
            )
        if len(pooled):
            self._pending.append((pooled, torch.full((len(pooled),), label, device=pooled.device)))
        if sum(len(rows) for rows, _ in self._pending) >= _BLOCK:
            self.flush()

    def flush(self) -> None:
        """Multiply what waits."""
        if self._pending and self.expansion is not None:
            rows, labels = (torch.cat(parts) for parts in zip(*self._pending, strict=True))
            self._pending.clear()
            self.current.update(self.expansion(rows), labels)

    def restart_task(self) -> None:
        """Forget the running task's sums."""
        self._pending.clear()
        self.current = self._empty()

    @property
    def rows_in_task(self) -> int:
        """Rows of the running task on this rank."""
        return int(self.current.counts.sum()) + sum(len(rows) for rows, _ in self._pending)

    def end_task(self) -> None:
        """Add the running task to the finished ones and choose the ridge. Collective."""
        self.sum_over_ranks()
        device = self.current.device
        self.total.to(device).merge(self.current)
        self.restart_task()
        if self.ridge == "auto" and self.total.num_classes:
            self.total.choose_ridge()

    def weight(self, running: bool = False) -> tuple[Tensor, list[bool]]:
        """The solution ``[E, K]`` and which columns were fitted; with ``running`` also on the running task's sums.

        Collective with ``running``.
        """
        solver = self.total
        if running:
            # What is shown in the middle of a task must not change what its end computes.
            part = self._empty()
            part.merge(self.current)
            if self._pending and self.expansion is not None:
                rows, labels = (torch.cat(parts) for parts in zip(*self._pending, strict=True))
                part.update(self.expansion(rows), labels)
            part.all_reduce(distributed.cpu_group() if distributed.world_size() > 1 else None)
            solver = self._empty()
            solver.ridge = self.total.ridge
            solver.merge(self.total)
            solver.merge(part)
            if self.ridge == "auto" and not self.total.num_classes and solver.num_classes:
                solver.ridge = float(solver.gram.diagonal().mean()) * 1e-2
        counts = solver.counts.tolist()
        seen = [bool(k < len(counts) and counts[k]) for k in range(len(self.classes))]
        weight = solver.weight
        missing = len(self.classes) - weight.shape[1]
        return torch.cat([weight, weight.new_zeros(weight.shape[0], missing)], dim=1), seen

    def rest(self) -> None:
        """Leave the accelerator: between tasks the sums wait in host memory."""
        self.total.to("cpu")

    def state_dict(self) -> dict[str, Any]:
        """Everything, as tensors and plain values."""
        rows, labels = zip(*self._pending, strict=True) if self._pending else ((), ())
        return {
            "expansion_dim": self.expansion_dim,
            "seed": self.seed,
            "in_features": None if self.expansion is None else self.expansion.in_features,
            "classes": [[c.name, c.adapter] for c in self.classes],
            "total": self.total.state_dict(),
            "current": self.current.state_dict(),
            "pending_rows": torch.cat(rows).cpu() if rows else None,
            "pending_labels": torch.cat(labels).cpu() if labels else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state. The running task's sums, which were of all ranks, go to rank 0.

        Raises:
            ValueError: If it was made with another expansion.
        """
        for name in ("expansion_dim", "seed"):
            if state[name] != getattr(self, name):
                raise ValueError(
                    f"The checkpoint's router has `{name}={state[name]}`, this one `{name}={getattr(self, name)}`: their"
                    f" features are different numbers. Set `{name}={state[name]}`."
                )
        self.classes = [RouteClass(name, adapter) for name, adapter in state["classes"]]
        if state["in_features"] is not None:
            self.expansion = Expansion(state["in_features"], self.expansion_dim, self.seed)
        self.total.load_state_dict(state["total"])
        self.restart_task()
        if distributed.rank() == 0:
            self.current.load_state_dict(state["current"])
            if state["pending_rows"] is not None:
                self._pending.append((state["pending_rows"], state["pending_labels"]))

    def sum_over_ranks(self) -> None:
        """Sum the running task's rows of all ranks, on every rank. Collective."""
        self.flush()
        if distributed.world_size() > 1:
            self.current.all_reduce(distributed.cpu_group())
            widths = distributed.gather_objects(None if self.expansion is None else self.expansion.in_features)
            width = next((w for w in widths if w is not None), None)
            if self.expansion is None and width is not None:
                self.expansion = Expansion(width, self.expansion_dim, self.seed)

    def _empty(self) -> RecursiveLeastSquares:
        return RecursiveLeastSquares(self.expansion_dim, ridge=1.0 if self.ridge == "auto" else self.ridge)
