# SPDX-License-Identifier: Apache-2.0
"""What happens when a model forgets more than is accepted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lightning_cl.last_good import LastGood
from lightning_cl.metrics import TaskMatrix

Action = Literal["warn", "stop", "restore"]

_WHAT_IS_DONE = {
    "warn": "",
    "stop": " The stream ends after this task.",
    "restore": " The weights of the last evaluation within the limit are put back, and the task ends.",
}


class ForgettingLimit:
    """Compares the forgetting after each evaluation with a limit, and keeps the weights that were within it.

    Args:
        largest: largest mean forgetting that is accepted, in the metric's own unit; None for no limit.
        action: what is done beyond it.

    Attributes:
        weights: the last good weights (``action="restore"``).
        events: each time the limit was exceeded: stage, task, forgetting and what was done.
        stop_reason: why ``"stop"`` has ended the stream.
    """

    def __init__(self, largest: float | None, action: Action) -> None:
        self.largest = largest
        self.action: Action = action
        self.weights = LastGood()
        self.events: list[dict[str, Any]] = []
        self.stop_reason: str | None = None
        # The matrices' cells of the stage in which the last good weights were measured.
        self._good: dict[str, list[list[Any]]] | None = None
        self._pending: Literal["keep", "restore"] | None = None
        self._said_unchecked = False

    def judge(self, matrices: Mapping[str, TaskMatrix], name: str, stage: int, in_fit: bool) -> Action | None:
        """What is to be done about the forgetting after a stage; None within the limit.

        The weights are kept, or put back, by :meth:`settle`: other callbacks may still hold theirs in the model.

        Args:
            matrices: the monitor's matrices by name.
            name: the one that has just got the stage's scores.
            stage: the stage.
            in_fit: whether the evaluation was inside of a fit.
        """
        matrix = matrices[name]
        if self.largest is None or stage >= len(matrix.train_tasks):
            return None
        forgetting = matrix.at(stage)["forgetting"]
        if forgetting is None and stage > 0 and not self._said_unchecked:
            self._said_unchecked = True
            rank_zero_warn(
                f"`max_forgetting={self.largest}` cannot be checked after stage {stage}: {matrix.reasons['forgetting']}."
            )
        if forgetting is None or forgetting <= self.largest:
            if self.action == "restore":
                self._pending = "keep"
                self._good = {
                    key: [[task, score.value, score.rows] for (s, task), score in m.scores().items() if s == stage]
                    for key, m in matrices.items()
                }
            return None
        # Without weights that were ever within the limit there is nothing to go back to.
        action: Action = "stop" if self.action == "restore" and self._good is None else self.action
        task = matrix.train_tasks[stage]
        reason = (
            f"Forgetting of {forgetting:.4g} {'in' if in_fit else 'after'} task {stage} ({task!r}) exceeds"
            f" `max_forgetting={self.largest:g}`; {_worst(matrix, stage)}."
        )
        rank_zero_warn(f"`ForgettingMonitor`: {reason}{_WHAT_IS_DONE[action]}")
        self.events.append({"stage": stage, "task": task, "in_fit": in_fit, "forgetting": forgetting, "action": action})
        if action == "stop":
            self.stop_reason = reason
        elif action == "restore":
            self._pending = "restore"
            # The weights go back, so the stage's scores are those that these weights had.
            for task, value, rows in (self._good or {}).get(name, ()):
                matrix.update(stage, task, value, rows)
        return action

    def settle(self, root: nn.Module) -> None:
        """Keep the weights, or put the good ones back, as the last evaluation asked for. Collective under sharding."""
        pending, self._pending = self._pending, None
        if pending == "keep":
            self.weights.keep(root)
        elif pending == "restore":
            self.weights.put_back(root)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, in plain types; the weights are saved apart."""
        return {"events": list(self.events), "stop_reason": self.stop_reason, "good": self._good}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take it back."""
        self.events, self.stop_reason, self._good = list(state["events"]), state["stop_reason"], state["good"]


def _worst(matrix: TaskMatrix, stage: int) -> str:
    """The task that has lost most since it was learnt."""
    table = matrix.scores()
    lost = {}
    for index, task in enumerate(matrix.train_tasks[:stage]):
        now, then = table.get((stage, task)), table.get((index, task))
        if now is not None and then is not None:
            sign = 1 if matrix.mode_of(task) == "max" else -1
            lost[task] = sign * (then.value - now.value), then.value, now.value
    name = max(lost, key=lambda task: lost[task][0])
    return f"{name!r} went from {lost[name][1]:.4g} to {lost[name][2]:.4g}"
