# SPDX-License-Identifier: Apache-2.0
"""One task of a stream: its name, its rows and how it is scored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Union

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import Dataset

# `Any` comes last: LightningCLI tries the members in turn, and a `class_path` must become a data set.
Source = Union[None, str, Dataset, list, Any]  # noqa: UP007


@dataclass
class Task:
    """A task: rows to train on, to validate and to test on.

    A split is a ``torch.utils.data.Dataset`` or ``IterableDataset``, a Hugging Face ``datasets`` object, a list of rows,
    a path to a JSONL file (plain or .gz), or ``hf://owner/name``.

    Args:
        name: the task's name: in metrics, in the task matrix and in the folder of its files.
        train: rows to train on.
        val: rows for the validation during training.
        test: rows for the task matrix; without them the matrix uses ``val``.
        role: ``"train"``, or ``"probe"`` for a general ability that is evaluated with the others and never trained on.
        metric: the score that enters the task matrix: ``"accuracy"``, ``"exact_match"``, ``"rouge_l"``, ``"token_f1"``,
            ``"loss"``, the class path of a torchmetrics metric, or the name under which your module logs it. Without it
            the ForgettingMonitor's metric counts, else the only metric that the module logs for the task.
        higher_is_better: direction of the metric; by default told from its name (a loss or an error is better lower).

    Raises:
        MisconfigurationException: for a name that is empty, a role that does not exist, a task without rows to train on
            and a probe with such rows or without rows to evaluate.

    Example:
        >>> Task("greeting", train=[{"text": "Good morning"}]).role
        'train'

        In YAML::

            - name: news
              train: data/news.train.jsonl
              test: data/news.test.jsonl
              metric: accuracy
    """

    name: str
    train: Source = None
    val: Source = None
    test: Source = None
    role: Literal["train", "probe"] = "train"
    metric: str | None = None
    higher_is_better: bool | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.strip():
            raise MisconfigurationException(
                f"`Task(name={self.name!r})`: a task needs a name, for its metrics and its folder. Give a short text."
            )
        if self.role not in ("train", "probe"):
            raise MisconfigurationException(
                f"Task {self.name!r} has `role={self.role!r}`. Use 'train', or 'probe' for a task that is evaluated only."
            )
        if self.role == "train" and self.train is None:
            raise MisconfigurationException(
                f"Task {self.name!r} has no `train` rows, so there is nothing to learn. Give `train`, or `role='probe'`"
                " for a task that is evaluated only."
            )
        if self.role == "probe" and self.train is not None:
            raise MisconfigurationException(
                f"Task {self.name!r} has `role='probe'` and `train` rows, but a probe is never trained on. Leave `train`"
                " out, or use `role='train'`."
            )
        if self.role == "probe" and self.val is None and self.test is None:
            raise MisconfigurationException(
                f"Probe {self.name!r} has neither `val` nor `test` rows, so there is nothing to evaluate. Give `test`."
            )

    @property
    def mode(self) -> Literal["max", "min"]:
        """Whether a higher (``"max"``) or a lower (``"min"``) score is better."""
        if self.higher_is_better is not None:
            return "max" if self.higher_is_better else "min"
        return mode_of(self.metric)


def mode_of(metric: str | None) -> Literal["max", "min"]:
    """The direction that a metric's name tells: losses, errors and perplexities are better lower.

    Example:
        >>> mode_of("val_loss"), mode_of("accuracy"), mode_of(None)
        ('min', 'max', 'max')
    """
    lower = ("loss", "perplexity", "error", "mse", "mae", "nll", "edit_distance")
    return "min" if metric is not None and any(part in metric.lower() for part in lower) else "max"
