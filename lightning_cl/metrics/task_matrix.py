# SPDX-License-Identifier: Apache-2.0
"""The matrix of scores of every task after every stage, and the figures of continual learning read off it."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_cl.metrics import figures
from lightning_cl.metrics.bootstrap import bootstrap_means, ends
from lightning_cl.metrics.score_table import ScoreTable
from lightning_cl.metrics.scores import Range, Score, check_ranges, interval_of

Role = Literal["train", "probe"]
Mode = Literal["max", "min"]


class TaskMatrix(ScoreTable):
    """Collects R[i, j], the score on task j after stage i, and computes the figures of continual learning.

    With T training tasks, learnt in the order of ``tasks`` (task j in stage j; stage -1 is before the first):

    - ``average`` = mean_j R[T-1, j]
    - ``backward_transfer`` = mean_{j<T-1} (R[T-1, j] - R[j, j])
    - ``forward_transfer`` = mean_{j>=1} (R[j-1, j] - R[-1, j])
    - ``forgetting`` = mean_{j<T-1} (max_{j<=i<T-1} R[i, j] - R[T-1, j])
    - ``intransigence`` = mean_j (reference_j - R[j, j]) over the tasks with a reference score
    - ``learning_accuracy`` = mean_j R[j, j]

    Probes (general ability) stay out of all six; where there are any, :meth:`compute` also gives ``general_change``,
    a dict with R[T-1, p] - R[-1, p] for each. Where lower is better (mode ``"min"``) every sign is flipped, so that in
    the figures higher is always better (for forgetting and intransigence: lower, as their formulas say). A figure
    that cannot be computed is None and its reason stands in :attr:`reasons`: a missing score is never taken as zero,
    and tasks measured by unlike metrics are not averaged unless ``normalise`` puts them on one scale.

    In a distributed run :meth:`compute` joins the ranks' scores: equal cells count once, unequal ones are taken as
    parts of one evaluation and averaged by their rows. All states are persistent: as an attribute of a LightningModule
    the matrix is in the checkpoint.

    Args:
        tasks: names of all tasks and probes, the training tasks in the order in which they are learnt. Without them
            the names are learnt in order of arrival.
        roles: ``"train"`` (the default) or ``"probe"`` by task.
        modes: ``"max"`` (the default) or ``"min"`` by task.
        reference: the score, in the metric's own unit, that a task reaches alone (from a model trained on it only).
        normalise: the worst and the best score of a metric's scale, by task, or one pair for all training tasks.
            Figures are then in shares of that scale: (score - worst) / (best - worst).
        metrics: name of the metric by task. Tasks with different ones are not averaged.
        kwargs: further arguments of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: for two tasks of one name, a name that is in no ``tasks``, a role or mode that does not exist, a
            range of width zero or one that contradicts the mode.

    Example:
        >>> matrix = TaskMatrix(tasks=["a", "b"])
        >>> for stage, scores in {-1: (0.2, 0.3), 0: (0.9, 0.4), 1: (0.7, 0.8)}.items():
        ...     for task, score in zip(("a", "b"), scores):
        ...         matrix.update(stage, task, score)
        >>> for name, value in matrix.compute().items():
        ...     print(name, value if value is None else round(value, 3))
        average 0.75
        backward_transfer -0.2
        forward_transfer 0.1
        forgetting 0.2
        intransigence None
        learning_accuracy 0.85
        >>> matrix.reasons
        {'intransigence': 'no reference scores were given (`reference`)'}
    """

    def __init__(
        self,
        tasks: Sequence[str] | None = None,
        roles: Mapping[str, Role] | None = None,
        modes: Mapping[str, Mode] | None = None,
        reference: Mapping[str, float] | None = None,
        normalise: Mapping[str, Range] | Range | None = None,
        metrics: Mapping[str, str] | None = None,
        **kwargs: Any,
    ) -> None:
        if isinstance(tasks, str):
            raise TypeError(f"`TaskMatrix(tasks={tasks!r})` got a single string. Pass a list: `tasks=[{tasks!r}]`.")
        super().__init__(tasks, **kwargs)
        doubles = sorted({t for t in self.declared or () if (self.declared or []).count(t) > 1})
        if doubles:
            raise ValueError(f"`TaskMatrix` got two tasks of one name: {doubles}. Each task needs a name of its own.")
        self.roles: dict[str, Role] = {}
        self.modes: dict[str, Mode] = {}
        self.reference: dict[str, float] = {}
        self.metrics: dict[str, str] = {}
        self.reasons: dict[str, str] = {}
        for argument, given in (("roles", roles), ("modes", modes), ("reference", reference), ("metrics", metrics)):
            self._check_names(argument, given or {})
        self.normalise: dict[str, Range] | Range | None = check_ranges(normalise)
        if isinstance(self.normalise, dict):
            self._check_names("normalise", self.normalise)
        for task in {**(roles or {}), **(modes or {}), **(reference or {}), **(metrics or {})}:
            self.declare(
                task,
                role=(roles or {}).get(task),
                mode=(modes or {}).get(task),
                reference=(reference or {}).get(task),
                metric=(metrics or {}).get(task),
            )

    def declare(
        self,
        task: str,
        role: Role | None = None,
        mode: Mode | None = None,
        reference: float | None = None,
        metric: str | None = None,
    ) -> None:
        """Say more about a task; what is None stays as it is.

        Raises:
            ValueError: for an unknown role or mode, or a reference that is not finite.
        """
        if role not in (None, "train", "probe"):
            raise ValueError(f"`TaskMatrix`: role {role!r} of task {task!r}. Roles are 'train' and 'probe'.")
        if mode not in (None, "max", "min"):
            raise ValueError(f"`TaskMatrix`: mode {mode!r} of task {task!r}. Modes are 'max' and 'min'.")
        if reference is not None and not math.isfinite(reference):
            raise ValueError(
                f"`TaskMatrix`: reference {reference} of task {task!r} is not finite. Leave the task out of"
                " `reference`, or give the score that it reaches alone."
            )
        if role is not None:
            self.roles[task] = role
        if mode is not None:
            self.modes[task] = mode
        if reference is not None:
            self.reference[task] = float(reference)
        if metric is not None:
            self.metrics[task] = metric
        low, high = self.range_of(task) or (0.0, 0.0)
        if low != high and task in self.modes and (high > low) != (self.modes[task] == "max"):
            raise ValueError(
                f"`normalise` gives task {task!r} the scale from {low} (worst) to {high} (best), but its mode is"
                f" {self.mode_of(task)!r}. Turn the range round, or correct the task's mode in `modes`."
            )

    def add_task(self, task: str) -> None:
        """Make a name known before its first score, so that names learnt on the way keep their order.

        Raises:
            ValueError: if the matrix was made with other ``tasks``.
        """
        self._check_names("add_task", [task])
        if self.declared is None:
            self._learn(task)

    def update(
        self,
        stage: int,
        task: str,
        value: float | Tensor,
        rows: int | None = None,
        scores: Sequence[float] | Tensor | None = None,
    ) -> None:
        """Set R[stage, task]; a later score of the same cell replaces the earlier one.

        Args:
            stage: number of the last finished task, from 0; -1 = before the first.
            task: the task's name.
            value: its score, a number or a tensor with one element. A score that is not finite is kept, and makes
                every figure that needs it None.
            rows: number of test rows behind the score.
            scores: the score of each test row, for the interval. Their mean need not be the value (a loss over
                tokens): the interval is centred on the value.

        Raises:
            ValueError: for a stage that cannot exist, a task that is in no ``tasks``, a value that is not one number,
                or row scores that are not finite.
        """
        if isinstance(stage, bool) or int(stage) != stage or stage < -1:
            raise ValueError(
                f"`TaskMatrix.update(stage={stage!r})`: stages are whole numbers, -1 before the first task, then 0, 1,"
                " and so on. Pass the index of the last finished task."
            )
        if self.declared is not None:
            self._check_names("update", [task])
            if stage >= len(self.train_tasks):
                raise ValueError(
                    f"`TaskMatrix.update(stage={stage})`, but {len(self.train_tasks)} training tasks make the stages"
                    f" -1 to {len(self.train_tasks) - 1}. Stages count from 0."
                )
        number = torch.as_tensor(value, dtype=torch.float64)
        if number.numel() != 1:
            raise ValueError(
                f"`TaskMatrix.update` got a value of shape {tuple(number.shape)} for task {task!r}. Pass one number,"
                " the mean over the rows; the rows' own scores belong into `scores`."
            )
        number = number.detach().reshape(())
        per_row = torch.zeros(0, dtype=torch.float64)
        interval = (math.nan, math.nan)
        if scores is not None and len(scores):
            per_row = torch.as_tensor(scores, dtype=torch.float64).detach().flatten().cpu()
            interval = interval_of(float(number), per_row)
            rows = len(per_row) if rows is None else rows
        self._store(int(stage), task, float(number), -1 if rows is None else int(rows), interval, per_row)

    def compute(self) -> dict[str, Any]:
        """The six figures, None where undefined (see :attr:`reasons`), and ``general_change`` if there are probes."""
        return self._figures(len(self.train_tasks))

    def at(self, stage: int) -> dict[str, Any]:
        """The figures as they stand after a stage: of the tasks learnt by then, without joining ranks.

        Raises:
            ValueError: if the stage is below -1 or beyond the training tasks.
        """
        if not -1 <= stage < max(len(self.train_tasks), 1):
            raise ValueError(f"`TaskMatrix.at({stage})`: the stages go from -1 to {len(self.train_tasks) - 1}.")
        return self._figures(stage + 1)

    def figure_intervals(
        self, stage: int | None = None, resamples: int = 1000, seed: int = 0
    ) -> dict[str, Range | None]:
        """95 % bootstrap intervals of the figures over the test rows: how far other rows could have moved them.

        Each task's rows are drawn with replacement, the same rows for all stages. None where a figure is undefined or
        the row scores of one of its cells are unknown.

        Args:
            stage: as in :meth:`at`; by default the last.
            resamples: number of draws.
            seed: of the draws.
        """
        count = len(self.train_tasks) if stage is None else stage + 1
        point, table = self._figures(count), self._table()
        drawn: dict[tuple[int, str], Tensor] = {}
        for position, task in enumerate(self.tasks):
            known = {s: score for (s, t), score in table.items() if t == task and score.scores is not None}
            for size in {len(score.scores) for score in known.values() if score.scores is not None}:
                columns = {s: v.scores for s, v in known.items() if v.scores is not None and len(v.scores) == size}
                stacked = torch.stack(list(columns.values()), 1)
                means = bootstrap_means(stacked, resamples, seed + position)
                shifts = torch.tensor([known[s].value for s in columns], dtype=torch.float64) - stacked.mean(0)
                for column, s in enumerate(columns):
                    drawn[s, task] = self._better(task, means[:, column] + shifts[column])
        intervals: dict[str, Range | None] = {}
        for name, value in point.items():
            if name == "general_change":
                for probe, change in value.items():
                    pair = [drawn.get((s, probe)) for s in (count - 1, -1)]
                    known_pair = [p for p in pair if p is not None]
                    both = change is not None and len(known_pair) == 2
                    intervals[f"general_change/{probe}"] = ends(known_pair[0] - known_pair[1]) if both else None
            elif value is None or any(cell not in drawn for cell in self._needed(name, count)):
                intervals[name] = None
            else:
                samples = torch.full((resamples, count + 1, count), math.nan, dtype=torch.float64)
                for s, task in self._needed(name, count):
                    samples[:, s + 1, self.train_tasks.index(task)] = drawn[s, task]
                intervals[name] = ends(self._figure(name, samples))
        return intervals

    @property
    def train_tasks(self) -> list[str]:
        """The tasks that are trained on, in the order in which they are learnt."""
        return [task for task in self.tasks if self.role_of(task) == "train"]

    @property
    def probes(self) -> list[str]:
        """The tasks that only measure general ability."""
        return [task for task in self.tasks if self.role_of(task) == "probe"]

    def role_of(self, task: str) -> Role:
        """The task's role."""
        return self.roles.get(task, "train")

    def mode_of(self, task: str) -> Mode:
        """Whether a higher score of the task is better ("max") or a lower one ("min"); a scale says it too."""
        low, high = self.range_of(task) or (0.0, 1.0)
        return self.modes.get(task, "max" if high > low else "min")

    def range_of(self, task: str) -> Range | None:
        """The worst and the best score of the task's scale, where ``normalise`` gives it."""
        if isinstance(self.normalise, dict):
            return self.normalise.get(task)
        return self.normalise if self.role_of(task) == "train" else None

    def to_dict(self, row_scores: bool = True) -> dict[str, Any]:
        """Everything in plain types, for JSON and checkpoints; :meth:`from_dict` reads it back."""
        entries = []
        for (stage, task), score in self._table().items():
            entry: dict[str, Any] = {"stage": stage, "task": task, "value": score.value, "rows": score.rows}
            entry["interval"] = None if score.interval is None else list(score.interval)
            if row_scores and score.scores is not None:
                entry["scores"] = score.scores.tolist()
            entries.append(entry)
        ranges = self.normalise
        if isinstance(ranges, tuple):
            plain: Any = list(ranges)
        else:
            plain = None if ranges is None else {task: list(span) for task, span in ranges.items()}
        return {
            "tasks": self.tasks,
            "declared": self.declared is not None,
            "roles": dict(self.roles),
            "modes": dict(self.modes),
            "metrics": dict(self.metrics),
            "reference": dict(self.reference),
            "normalise": plain,
            "scores": entries,
        }

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any], **kwargs: Any) -> TaskMatrix:
        """The matrix that :meth:`to_dict` wrote.

        Args:
            saved: what :meth:`to_dict` returned.
            kwargs: further arguments of :class:`torchmetrics.Metric`.
        """
        matrix = cls(
            tasks=saved["tasks"] if saved["declared"] else None,
            roles=saved["roles"],
            modes=saved["modes"],
            metrics=saved["metrics"],
            reference=saved["reference"],
            normalise=saved["normalise"],
            **kwargs,
        )
        if not saved["declared"]:
            for task in saved["tasks"]:
                matrix.add_task(task)
        for entry in saved["scores"]:
            matrix.update(entry["stage"], entry["task"], float(entry["value"]), entry["rows"], entry.get("scores"))
            if entry["interval"] is not None and "scores" not in entry:
                matrix.values[-1][1:] = torch.tensor(entry["interval"], dtype=torch.float64)
        return matrix

    # ---- figures

    def _figures(self, count: int) -> dict[str, Any]:
        self.reasons = {}
        result: dict[str, Any] = {}
        table = self._table()
        tasks = self.train_tasks[:count]
        rows = [
            [self._better(t, table[stage, t].value) if (stage, t) in table else math.nan for t in tasks]
            for stage in range(-1, count)
        ]
        matrix = torch.tensor(rows, dtype=torch.float64).reshape(count + 1, count)
        for name in figures.NAMES:
            reason = self._undefined(name, count, table)
            if reason:
                self.reasons[name] = reason
            result[name] = None if reason else float(self._figure(name, matrix))
        if self.probes:
            result["general_change"] = {probe: self._general_change(probe, count, table) for probe in self.probes}
        return result

    def _figure(self, name: str, matrix: Tensor) -> Tensor:
        if name != "intransigence":
            return figures.FIGURES[name][0](matrix)
        given = [
            self._better(task, self.reference.get(task, math.nan)) for task in self.train_tasks[: matrix.shape[-1]]
        ]
        return figures.intransigence(matrix, torch.tensor(given, dtype=torch.float64))

    def _needed(self, name: str, count: int) -> list[tuple[int, str]]:
        tasks = self.train_tasks
        if name == "intransigence":
            return [(j, tasks[j]) for j in range(count) if tasks[j] in self.reference]
        return [(stage, tasks[j]) for stage, j in figures.FIGURES[name][1](count)]

    def _undefined(self, name: str, count: int, table: Mapping[tuple[int, str], Score]) -> str:
        if not count:
            return "no training task was measured" if not self.train_tasks else "no task has been learnt yet"
        beyond = max((stage for stage, _ in table), default=-1)
        if self.declared is None and beyond >= len(self.train_tasks):
            return f"there are scores after stage {beyond}, but of {len(self.train_tasks)} training task(s) only"
        if name == "intransigence" and not self.reference:
            return "no reference scores were given (`reference`)"
        needed = self._needed(name, count)
        if not needed:
            if name == "intransigence":
                return "no task learnt so far has a reference score (`reference`)"
            return "it compares tasks, and there is only one so far"
        for stage, task in needed:
            if (stage, task) not in table:
                when = "before the first task" if stage < 0 else f"after stage {stage}"
                return f"task {task!r} was not measured {when}"
            if not math.isfinite(table[stage, task].value):
                return f"the score of task {task!r} after stage {stage} is {table[stage, task].value}"
        return self._unlike(list(dict.fromkeys(task for _, task in needed)))

    def _unlike(self, tasks: list[str]) -> str:
        kinds: dict[str, str] = {}
        for task in tasks:
            if self.range_of(task) is not None:
                kinds.setdefault("normalised", task)
            elif task in self.metrics:
                kinds.setdefault(f"{self.metrics[task]} ({self.mode_of(task)})", task)
        # A task whose metric has no name is like the others as long as it points the same way.
        for task in tasks:
            if self.range_of(task) is None and task not in self.metrics:
                mode = self.mode_of(task)
                if not any(kind.endswith(f"({mode})") for kind in kinds):
                    kinds[f"({mode})"] = task
        if len(kinds) < 2:
            return ""
        listed = ", ".join(f"{kind} of {task!r}".strip() for kind, task in kinds.items())
        return f"the tasks have unlike metrics ({listed}): give their scales with `normalise`"

    def _general_change(self, probe: str, count: int, table: Mapping[tuple[int, str], Score]) -> float | None:
        pair = []
        for stage in (-1, count - 1):
            score = table.get((stage, probe))
            if score is None or not math.isfinite(score.value):
                when = "before the first task" if stage < 0 else f"after stage {stage}"
                problem = "was not measured" if score is None else f"scored {score.value}"
                self.reasons[f"general_change/{probe}"] = f"probe {probe!r} {problem} {when}"
                return None
            pair.append(self._better(probe, score.value))
        return pair[1] - pair[0]

    def _better(self, task: str, value: Any) -> Any:
        """The score on the scale of the figures, on which higher is better."""
        span = self.range_of(task)
        if span is not None:
            return (value - span[0]) / (span[1] - span[0])
        return value if self.mode_of(task) == "max" else -value

    def _check_names(self, argument: str, given: Mapping[str, Any] | Sequence[str]) -> None:
        unknown = [task for task in given if self.declared is not None and task not in self.declared]
        if unknown:
            close = difflib.get_close_matches(unknown[0], self.declared or [], n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ValueError(
                f"`TaskMatrix`: {argument} names the task {unknown[0]!r}, which is not among `tasks`"
                f" {self.declared}.{hint} Correct the name, or add it to `tasks`."
            )
