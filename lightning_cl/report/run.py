# SPDX-License-Identifier: Apache-2.0
"""A run's results read back from its folder, with one clear error for everything that can be wrong with them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_cl.metrics import TaskMatrix
from lightning_cl.report.results import FORMAT, STEM


class ReportError(ValueError):
    """Results that cannot be shown: what was found, why, and what to do."""


@dataclass
class Run:
    """The results of one run.

    Attributes:
        name: what it is called in the report.
        folder: where it lies.
        matrix: its task matrix.
        document: the whole JSON document.
        config: the configuration that made it, if it was saved.
        disk_bytes: size of the folder.
    """

    name: str
    folder: Path
    matrix: TaskMatrix
    document: dict[str, Any] = field(repr=False)
    config: str | None = field(default=None, repr=False)
    disk_bytes: int = 0

    @property
    def terms(self) -> dict[str, list[list[float]]]:
        """Values of the loss and of its added terms: name -> [[logger step, value], ...]."""
        return self.document.get("terms") or {}

    @property
    def costs(self) -> dict[int, dict[str, float]]:
        """Seconds, steps and memory by stage."""
        return {int(stage): cost for stage, cost in (self.document.get("costs") or {}).items()}

    @property
    def routing(self) -> dict[str, Any] | None:
        """Where a router has sent the samples: ``stages``, ``learnt``, ``accuracy`` (by stage) and ``scores`` (by mode)."""
        routing = self.document.get("routing")
        return routing if routing and routing.get("stages") else None

    @property
    def made_by(self) -> dict[str, Any]:
        """Command, commit, versions and hardware, as far as they are known."""
        return self.document.get("provenance") or {}


def load_run(path: Path, name: str | None = None) -> Run:
    """Read one run.

    Args:
        path: its folder, or its ``task_matrix.json``.
        name: what to call it; default: the folder's name.

    Raises:
        ReportError: if there is no such path, no monitor's file, or a file that is cut short or of another format.
    """
    path = Path(path)
    file = path / f"{STEM}.json" if path.is_dir() else path
    if not path.exists():
        raise ReportError(f"{path} does not exist. Give the folder of a run, or one that holds runs.")
    if not file.is_file():
        there = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
        raise ReportError(
            f"{path} holds no {STEM}.json (there is: {there}), so this run had no monitor. Train with"
            " `--config callbacks/forgetting_monitor.yaml` (or give `ForgettingMonitor` to the Trainer), or give the"
            " folder that its results went to (`dirpath`)."
        )
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ReportError(
            f"{file} is no JSON text ({error}). Write it anew by running the evaluation again."
        ) from error
    except json.JSONDecodeError as error:
        raise ReportError(
            f"{file} is cut short or damaged: {error.msg} at line {error.lineno}, column {error.colno}. Delete it and run"
            " the last evaluation again (a resumed run writes it anew), or leave the run out."
        ) from error
    found = document.get("format") if isinstance(document, dict) else None
    if found != FORMAT or "matrix" not in document:
        raise ReportError(
            f"{file} has format {found!r}; this version reads format {FORMAT}. Make the report with the version of"
            " lightning-cl that wrote it."
        )
    try:
        matrix = TaskMatrix.from_dict(document["matrix"], sync_on_compute=False)
    except (KeyError, TypeError, ValueError) as error:
        raise ReportError(
            f"{file} holds no valid task matrix ({error!r}). Write it anew, or leave the run out."
        ) from error
    folder = file.parent
    return Run(name or _name(folder), folder, matrix, document, _config(folder), _size(folder))


def find_runs(paths: Sequence[Path]) -> tuple[list[Run], list[str]]:
    """The runs at or below the given paths, and what could not be read.

    A path that is itself a run must be readable; below a folder of runs the unreadable ones are listed, and the others
    shown.

    Raises:
        ReportError: if a path is wrong, or no finished run is found.
    """
    runs, problems = [], []
    for path in map(Path, paths):
        below = sorted(path.rglob(f"{STEM}.json")) if path.is_dir() and not (path / f"{STEM}.json").exists() else []
        if not below:
            runs.append(load_run(path))
            continue
        for file in below:
            try:
                runs.append(load_run(file, name=str(file.parent.relative_to(path))))
            except ReportError as error:
                problems.append(str(error))
    finished = [run for run in runs if run.matrix.scores()]
    problems += [f"{run.folder}: no stage is finished yet" for run in runs if not run.matrix.scores()]
    if not finished:
        raise ReportError(
            "There are zero finished runs: " + ("; ".join(problems) or "no results were given") + ". Wait for the first"
            " row of a task matrix, or give another folder."
        )
    return _distinct(finished), problems


def differences(runs: Iterable[Run]) -> list[str]:
    """In what the runs' origins differ: versions, hardware, commit. Such runs are shown, and nothing is averaged.

    Example:
        >>> differences([])
        []
    """
    runs = list(runs)
    found = []
    seen = {
        "hardware": {run.name: run.made_by.get("hardware") for run in runs},
        "commit": {run.name: run.made_by.get("commit") for run in runs},
    }
    packages = dict.fromkeys(p for run in runs for p in run.made_by.get("versions") or {})
    for package in packages:
        seen[package] = {run.name: (run.made_by.get("versions") or {}).get(package) for run in runs}
    for what, by_run in seen.items():
        values = list(dict.fromkeys(by_run.values()))
        if len(values) > 1:
            parts = [
                f"{value or 'unknown'} ({', '.join(n for n, v in by_run.items() if v == value)})" for value in values
            ]
            found.append(f"{what}: {'; '.join(parts)}")
    return found


def unfinished(runs: Iterable[Run]) -> list[str]:
    """Which runs have tasks still to learn, so that their figures are of the tasks learnt so far.

    Example:
        >>> unfinished([])
        []
    """
    lines = []
    for run in runs:
        learnt, tasks = max(run.matrix.stages, default=-1) + 1, len(run.matrix.train_tasks)
        if learnt < tasks:
            lines.append(f"{run.name}: {learnt} of {tasks} tasks learnt so far; the figures are of these")
    return lines


def add_external(run: Run, path: Path, stage: int | None = None) -> list[str]:
    """Add scores of an outside harness as probes.

    Args:
        run: the run; its matrix gets the probes.
        path: what lm-evaluation-harness wrote (``"results"``, with ``"higher_is_better"`` and ``"n-samples"``), or a
            plain JSON object ``{"name": score}`` or ``{"name": {"-1": score, "4": score}}`` by stage.
        stage: the stage of scores that name none; default: the last.

    Returns:
        The probes' names.

    Raises:
        ReportError: if the file is missing or damaged, holds no scores, names a training task, or a stage that the run
            does not have.
    """
    path = Path(path)
    if not path.is_file():
        raise ReportError(
            f"`--external {path}`: there is no such file. Give the results.json of an evaluation harness."
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ReportError(f"`--external {path}` is cut short or no JSON: {error}. Run the harness again.") from error
    last = max(run.matrix.stages) if stage is None else stage
    if last not in run.matrix.stages:
        raise ReportError(
            f"`--external {last}:{path}`: run {run.name!r} has the stages {run.matrix.stages}. Give one of them."
        )
    harness = isinstance(content, Mapping) and isinstance(content.get("results"), Mapping)
    entries = _harness_scores(content) if harness else _plain_scores(content)
    if not entries:
        raise ReportError(
            f"`--external {path}` holds no scores. It needs the harness's `results`, or an object of names and numbers."
        )
    names = []
    for name, metric, given, higher, rows in entries:
        if name in run.matrix.train_tasks:
            raise ReportError(
                f"`--external {path}` has a score for {name!r}, which is a training task of run {run.name!r}. Probes"
                " need names of their own: rename it in the file."
            )
        for at, value in given.items():
            where = last if at is None else at
            if where not in run.matrix.stages:
                raise ReportError(
                    f"`--external {path}`: stage {where} of {name!r} is none of the run's stages {run.matrix.stages}."
                )
            _declare_probe(run, name, metric, higher)
            run.matrix.update(where, name, value, rows)
        names.append(name)
    return names


_Entry = tuple[str, str, dict[int | None, float], bool, int | None]


def _harness_scores(content: Mapping[str, Any]) -> list[_Entry]:
    entries: list[_Entry] = []
    for task, scores in content["results"].items():
        directions = (content.get("higher_is_better") or {}).get(task) or {}
        counts = (content.get("n-samples") or {}).get(task) or {}
        rows = counts.get("effective") if isinstance(counts, Mapping) else None
        for key, value in scores.items():
            metric, _, strategy = key.partition(",")
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if number and strategy and not metric.endswith("_stderr"):
                name = f"{task}/{metric}" if strategy == "none" else f"{task}/{metric},{strategy}"
                entries.append((name, metric, {None: float(value)}, directions.get(metric, True) is not False, rows))
    return entries


def _plain_scores(content: Any) -> list[_Entry]:
    entries: list[_Entry] = []
    for name, given in content.items() if isinstance(content, Mapping) else ():
        lower = "loss" in name.lower() or "perplexity" in name.lower()
        if isinstance(given, (int, float)) and not isinstance(given, bool):
            entries.append((name, "score", {None: float(given)}, not lower, None))
        elif isinstance(given, Mapping):
            try:
                by_stage: dict[int | None, float] = {int(stage): float(value) for stage, value in given.items()}
            except (TypeError, ValueError):
                continue
            entries.append((name, "score", by_stage, not lower, None))
    return entries


def _declare_probe(run: Run, name: str, metric: str, higher: bool) -> None:
    matrix = run.matrix
    if matrix.declared is not None and name not in matrix.declared:
        matrix.declared.append(name)
    matrix.add_task(name)
    matrix.declare(name, role="probe", mode="max" if higher else "min", metric=metric)


def _distinct(runs: list[Run]) -> list[Run]:
    """Give runs of one name their parents' names too."""
    names = [run.name for run in runs]
    for run in runs:
        if names.count(run.name) > 1:
            run.name = "/".join(run.folder.resolve().parts[-2:])
    names = [run.name for run in runs]
    for index, run in enumerate(runs):
        if names.count(run.name) > 1:
            run.name = f"{run.name} ({index + 1})"
    return runs


def _name(folder: Path) -> str:
    """The folder's name, with its parent's for the numbered ones that loggers make."""
    parts = folder.resolve().parts[-2:]
    return "/".join(parts) if re.fullmatch(r"version_\d+|\d+", parts[-1]) else parts[-1]


def _config(folder: Path) -> str | None:
    for name in ("config.yaml", "hparams.yaml"):
        for place in (folder, folder.parent):
            file = place / name
            if file.is_file() and file.stat().st_size > 3:
                return file.read_text(encoding="utf-8", errors="replace")
    return None


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
