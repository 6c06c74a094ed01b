# SPDX-License-Identifier: Apache-2.0
"""The files of a run's results: JSON and CSV of the task matrix, and its plots."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from lightning_cl.metrics import TaskMatrix
from lightning_cl.report import display
from lightning_cl.strategies.files import write_atomically

#: Version of the JSON document; readers refuse others.
FORMAT = 1
STEM = "task_matrix"


def document(matrix: TaskMatrix, **more: Any) -> dict[str, Any]:
    """The JSON document of a task matrix: scores, figures, intervals and reasons, in the metrics' own units.

    Args:
        matrix: the task matrix.
        more: further parts of the document, in plain types.

    Example:
        >>> matrix = TaskMatrix(["a"])
        >>> matrix.update(0, "a", 0.5)
        >>> document(matrix)["figures"]["average"]
        0.5
    """
    stage = display.last_stage(matrix)
    figures = matrix.at(stage)
    reasons = dict(matrix.reasons)
    return {
        "format": FORMAT,
        "matrix": matrix.to_dict(row_scores=False),
        "stage": stage,
        "figures": figures,
        "figure_intervals": matrix.figure_intervals(stage),
        "reasons": reasons,
        "after_stage": {str(s): matrix.at(s) for s in matrix.stages if 0 <= s < len(matrix.train_tasks)},
        **more,
    }


def csv_text(matrix: TaskMatrix) -> str:
    """One line per cell: stage, task, role, metric, mode, value, rows, low, high; values in the metrics' own units."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["stage", "task", "role", "metric", "mode", "value", "rows", "low", "high"])
    for (stage, task), score in matrix.scores().items():
        low, high = score.interval or ("", "")
        rows = "" if score.rows is None else score.rows
        metric = matrix.metrics.get(task, "")
        table.writerow(
            [stage, task, matrix.role_of(task), metric, matrix.mode_of(task), repr(score.value), rows, low, high]
        )
    return text.getvalue()


def write(
    folder: Path,
    matrix: TaskMatrix,
    parts: Mapping[str, Any],
    stem: str = STEM,
    figures: Mapping[str, Any] | None = None,
) -> list[Path]:
    """Write ``STEM.json``, ``STEM.csv`` and a PNG for each figure, each file whole or not at all.

    Args:
        folder: where to write; created.
        matrix: the task matrix.
        parts: further parts of the JSON document.
        stem: the files' name.
        figures: matplotlib figures by what is added to the stem, such as ``""`` and ``"_stages"``.

    Returns:
        The files' paths.

    Raises:
        OSError: if one cannot be written. Those that were there stay as they were.
    """
    folder = Path(folder)
    text = json.dumps(_plain(document(matrix, **parts)), indent=1, allow_nan=False)
    contents: dict[str, bytes] = {f"{stem}.json": text.encode(), f"{stem}.csv": csv_text(matrix).encode()}
    for suffix, figure in (figures or {}).items():
        image = io.BytesIO()
        figure.savefig(image, format="png")
        contents[f"{stem}{suffix}.png"] = image.getvalue()
    for name, data in contents.items():

        def put(file: BinaryIO, data: bytes = data) -> None:
            file.write(data)

        write_atomically(folder / name, put)
    return [folder / name for name in contents]


def _plain(value: Any) -> Any:
    # JSON knows no NaN and no infinity: such a score is written as its name.
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
