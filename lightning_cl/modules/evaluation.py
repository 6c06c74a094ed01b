# SPDX-License-Identifier: Apache-2.0
"""The metrics of an evaluation, one a loader, and the scores of its rows."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_cl.distributed import gather_objects
from lightning_cl.modules.row_mean import RowMean
from lightning_cl.modules.text_scores import TEXT_SCORES

Stage = Literal["val", "test"]


@dataclass
class Update:
    """What one batch did.

    Attributes:
        metric: the loader's metric, updated.
        key: its name among the submodules of :class:`Evaluation`.
        label: the name it is logged by, after the stage.
        rows: rows of the batch that count.
    """

    metric: Metric
    key: str
    label: str
    rows: int


class Evaluation(nn.Module):
    """Holds the torchmetrics of each loader, so that Lightning resets, reduces and logs them.

    Attributes:
        row_scores: score of each row, by loader; complete after :meth:`gather`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.row_scores: dict[int, list[float]] = {}
        self._row_ids: dict[int, list[int | None]] = {}

    def start(self) -> None:
        """Forgets the rows of the evaluation before."""
        self.row_scores, self._row_ids = {}, {}

    def update_rows(
        self, stage: Stage, name: str, loader: int, scores: Tensor, counted: Tensor, row_ids: Tensor | None
    ) -> Update:
        """Adds the rows' scores ``[B]`` to the loader's mean; rows that are not ``counted`` are left out."""
        key = f"{stage}_{name}_{loader}"
        metric = self._metric(key, RowMean, scores.device)
        scores = scores[counted].float()
        metric.update(scores)
        ids = [None] * len(scores) if row_ids is None else row_ids[counted].tolist()
        self.row_scores.setdefault(loader, []).extend(scores.tolist())
        self._row_ids.setdefault(loader, []).extend(ids)
        return Update(metric, key, name, len(scores))

    def update_texts(
        self, stage: Stage, name: str, loader: int, texts: list[str], batch: Mapping[str, Any], device: torch.device
    ) -> Update:
        """Scores generated texts against the batch's references."""
        counted = (batch["row"] >= 0).tolist()
        score = TEXT_SCORES.get(name)
        if score is not None:
            pairs = zip(texts, batch["reference"], strict=True)
            scores = torch.tensor([score(t, r) for t, r in pairs], dtype=torch.float32, device=device)
            return self.update_rows(stage, name, loader, scores, batch["row"] >= 0, batch["row"])
        kept = [(t, r) for t, r, counts in zip(texts, batch["reference"], counted, strict=True) if counts]
        return self.update_metric(stage, name, loader, ([t for t, _ in kept], [r for _, r in kept]), 0, device)

    def update_metric(
        self, stage: Stage, name: str, loader: int, pair: tuple[Any, Any], num_classes: int, device: torch.device
    ) -> Update:
        """Feeds a metric named by its class path with predictions and references."""
        label = name.rpartition(".")[2]
        key = f"{stage}_{label}_{loader}"
        is_new = key not in self._modules
        metric = self._metric(key, lambda: _from_path(name, num_classes), device)
        if len(pair[0]):
            try:
                metric.update(*pair)
            except Exception as error:
                kind = "the numbers of chosen and right options" if num_classes else "generated texts and references"
                raise MisconfigurationException(
                    f"the metric {name!r} cannot be fed with {kind} ({type(error).__name__}: {error}). Use a metric of "
                    "`torchmetrics.text` for texts, one of `torchmetrics.classification` for options."
                ) from error
            if is_new:
                _check_scalar(name, metric)
        return Update(metric, key, label, len(pair[0]))

    def gather(self) -> None:
        """Brings the row scores of all ranks together: in the data set's order where it is known, each row once."""
        parts = gather_objects((self.row_scores, self._row_ids))
        joined: dict[int, list[float]] = {}
        for loader in sorted({loader for scores, _ in parts for loader in scores}):
            scores = [score for part, _ in parts for score in part.get(loader, [])]
            ids = [row for _, part in parts for row in part.get(loader, [])]
            known = [(row, score) for row, score in zip(ids, scores, strict=True) if row is not None]
            joined[loader] = [score for _, score in sorted(dict(known).items())] if len(known) == len(ids) else scores
        self.row_scores, self._row_ids = joined, {}

    def _metric(self, key: str, make: Any, device: torch.device) -> Any:
        if key not in self._modules:
            self.add_module(key, make().to(device))
        return self._modules[key]


def _check_scalar(name: str, metric: Metric) -> None:
    """Lightning logs one number a metric; found out at the first batch rather than at the end."""
    probe = copy.deepcopy(metric)
    probe.sync_on_compute = False
    value = probe.compute()
    if isinstance(value, Mapping) or torch.as_tensor(value).numel() != 1:
        found = ", ".join(map(str, value)) if isinstance(value, Mapping) else f"shape {tuple(value.shape)}"
        raise MisconfigurationException(
            f"the metric {name!r} gives several values ({found}), but a task has one score. Give the class path of a "
            "subclass of yours whose `compute` returns one of them."
        )


def _from_path(path: str, num_classes: int) -> Metric:
    module, _, name = path.rpartition(".")
    try:
        cls = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise MisconfigurationException(
            f"the metric {path!r} cannot be imported ({error}). Use 'accuracy', 'exact_match', 'rouge_l', 'token_f1', "
            "'loss', or the class path of a torchmetrics metric."
        ) from error
    if not (isinstance(cls, type) and issubclass(cls, Metric)):
        raise MisconfigurationException(f"the metric {path!r} is no torchmetrics metric, but {cls!r}.")
    try:
        metric = cls()
    except TypeError:
        try:
            metric = cls(num_classes=num_classes)
        except TypeError as error:
            raise MisconfigurationException(
                f"the metric {path!r} cannot be built without arguments ({error}). Give the class path of a subclass of "
                "yours that sets them."
            ) from error
    return metric
