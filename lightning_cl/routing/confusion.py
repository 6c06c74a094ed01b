# SPDX-License-Identifier: Apache-2.0
"""Where the samples of each task were sent, stage by stage: table and plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_cl import distributed
from lightning_cl.routing.router import BASE, Routes

__all__ = ["RoutingConfusion"]

Counts = dict[str, dict[str, int]]


class RoutingConfusion:
    """Counts of routes by the task that a sample really is of.

    Attributes:
        stages: counts by stage (0: after the first task), true task, and where the sample was sent.
        learnt: the tasks that the router knew at each stage.
        scores: task scores routed, by oracle and with the base model, from `RLSRouterFitter.side_by_side`.

    Example:
        >>> confusion = RoutingConfusion()
        >>> confusion.stages[0] = {"qa": {"qa": 9, "sums": 1}, "sums": {"sums": 10}}
        >>> confusion.learnt[0] = ["qa", "sums"]
        >>> confusion.accuracy(0)
        0.95
        >>> print(confusion.table(0))
        | task | qa | sums | accuracy |
        | --- | --- | --- | --- |
        | qa | 9 | 1 | 90.0 % |
        | sums | 0 | 10 | 100.0 % |
    """

    def __init__(self) -> None:
        self.stages: dict[int, Counts] = {}
        self.learnt: dict[int, list[str]] = {}
        self.scores: dict[str, dict[str, float]] = {}
        self._running: Counts = {}

    def start(self) -> None:
        """Begin an evaluation."""
        self._running = {}

    def add(self, task: str, routes: Routes) -> None:
        """Count one batch of one task."""
        row = self._running.setdefault(task, {})
        for name, adapter in zip(routes.names, routes.adapters, strict=True):
            # A sample below the margin was not sent to the class that won.
            sent = "base" if adapter == BASE and name != "general" else name
            row[sent] = row.get(sent, 0) + 1

    def finish(self, learnt: Sequence[str], keep: bool = True) -> float | None:
        """Sum over the ranks and give the accuracy over the tasks learnt so far; their number is the stage. Collective.

        Args:
            learnt: Names of the tasks that the router knows.
            keep: Whether to keep the counts as the stage's.
        """
        total: Counts = {}
        for part in distributed.gather_objects(self._running):
            for task, row in part.items():
                for name, count in row.items():
                    total.setdefault(task, {})[name] = total.get(task, {}).get(name, 0) + count
        self._running = {}
        if keep and total and learnt:
            # One row of the task matrix can take two evaluations: of tasks with test rows, and of those without.
            self.stages.setdefault(len(learnt) - 1, {}).update(total)
            self.learnt[len(learnt) - 1] = list(learnt)
        return _accuracy(total, learnt)

    def accuracy(self, stage: int | None = None) -> float | None:
        """Share of samples sent to their own task, over the tasks learnt by that stage (default: the last one)."""
        counts, learnt = self._stage(stage)
        return _accuracy(counts, learnt)

    def table(self, stage: int | None = None) -> str:
        """The confusion matrix as a Markdown table; rows are tasks, columns where their samples were sent."""
        counts, learnt = self._stage(stage)
        columns = _columns(counts, learnt)
        lines = [["task", *columns, "accuracy"], ["---"] * (len(columns) + 2)]
        for task, row in counts.items():
            own = f"{100 * row.get(task, 0) / sum(row.values()):.1f} %" if task in learnt else "-"
            lines.append([task, *(str(row.get(c, 0)) for c in columns), own])
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def plot(self, path: str | Path | None = None, stage: int | None = None) -> Any:
        """The confusion matrix as a matplotlib figure, in shares of each task; written to ``path`` if given."""
        from matplotlib.figure import Figure

        counts, learnt = self._stage(stage)
        columns = _columns(counts, learnt)
        shares = [[row.get(c, 0) / max(1, sum(row.values())) for c in columns] for row in counts.values()]
        figure = Figure(figsize=(2.5 + 0.7 * len(columns), 1.8 + 0.5 * len(counts)), layout="constrained")
        axes = figure.subplots()
        axes.imshow(shares or [[0.0]], cmap="Blues", vmin=0, vmax=1, aspect="auto")
        axes.set_xticks(range(len(columns)), columns, rotation=45, ha="right")
        axes.set_yticks(range(len(counts)), list(counts))
        axes.set_xlabel("sent to")
        axes.set_ylabel("task")
        axes.set_title("Routing", loc="left", fontsize=11, fontweight="bold")
        for y, line in enumerate(shares):
            for x, share in enumerate(line):
                axes.text(x, y, f"{share:.0%}", ha="center", va="center", color="white" if share > 0.6 else "black")
        if path is not None:
            figure.savefig(path)
        return figure

    def document(self) -> dict[str, Any]:
        """What a report shows: counts, tasks learnt and accuracy by stage, and the scores side by side."""
        return {**self.state_dict(), "accuracy": {stage: self.accuracy(stage) for stage in sorted(self.stages)}}

    def state_dict(self) -> dict[str, Any]:
        """The kept stages."""
        return {"stages": self.stages, "learnt": self.learnt, "scores": self.scores}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state."""
        self.stages, self.learnt = dict(state["stages"]), dict(state["learnt"])
        self.scores = dict(state["scores"])

    def _stage(self, stage: int | None) -> tuple[Counts, list[str]]:
        if not self.stages:
            return {}, []
        stage = max(self.stages) if stage is None else stage
        return self.stages[stage], self.learnt[stage]


def _accuracy(counts: Counts, learnt: Sequence[str]) -> float | None:
    rows = sum(sum(counts[task].values()) for task in learnt if task in counts)
    return sum(counts[task].get(task, 0) for task in learnt if task in counts) / rows if rows else None


def _columns(counts: Counts, learnt: Sequence[str]) -> list[str]:
    sent = {name for row in counts.values() for name in row}
    return [*learnt, *sorted(sent - set(learnt) - {"base"}), *(["base"] if "base" in sent else [])]
