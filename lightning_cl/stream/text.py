# SPDX-License-Identifier: Apache-2.0
"""Text rows of a task on their way into a loader."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from lightning.fabric.utilities.data import sized_len
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_cl.stream.loader import is_iterable
from lightning_cl.stream.task import Task

if TYPE_CHECKING:
    from lightning_cl.data import Encoder


def read_split(task: Task, split: str) -> Any:
    """The rows of a task's split, read and checked; other data sets as they are.

    Raises:
        MisconfigurationException: with the task and the split, for rows that cannot be read, learnt or scored.
    """
    from lightning_cl.data import check_metric, read_rows

    source = getattr(task, split)
    if isinstance(source, list) and source and not isinstance(source[0], (Mapping, str)):
        return source  # a list of anything: images, numbers, tensors
    keys = {"text", "prompt", "answer", "messages"}
    if isinstance(source, list) and source and isinstance(source[0], Mapping) and not keys & source[0].keys():
        return source  # rows for the user's own module: token ids, images by name
    try:
        if not isinstance(source, str) and sized_len(source) == 0:
            raise MisconfigurationException("its source holds no rows. Give at least one, or leave the split out.")
        rows: Any = read_rows(source)
        if split != "train" and holds_text(rows) and not is_iterable(rows):
            check_metric(rows, text_metric(task), f"task {task.name!r}, {split}")
    except Exception as error:
        raise MisconfigurationException(f"Task {task.name!r}, `{split}`: {error}") from error
    return rows


def holds_text(rows: Any) -> bool:
    """Whether the first row of a map source is a row of text."""
    from lightning_cl.data import example_kind

    return not is_iterable(rows) and bool(sized_len(rows)) and example_kind(rows[0]) is not None


def text_metric(task: Task) -> str | None:
    """The metric that text rows are encoded for: the task's, unless it is a name that only the user's module knows."""
    from lightning_cl.data.examples import METRICS

    return task.metric if task.metric in METRICS or "." in (task.metric or "") else None


def make_encoder(module: Any, tokenizer: Any, options: Mapping[str, Any]) -> Encoder:
    """The encoder of the stream's text rows."""
    from lightning_cl.data import Encoder

    return Encoder.for_module(module, tokenizer, **options)


class TextRows:
    """A split of text rows with the encoder that fits it.

    Args:
        task: the task.
        split: ``"train"``, ``"val"`` or ``"test"``.
        rows: the rows.
        encoder: the encoder.
    """

    def __init__(self, task: Task, split: str, rows: Any, encoder: Encoder) -> None:
        from lightning_cl.data import Collator, EncodedDataset

        self._name = f"task {task.name!r}, {split}"
        self._rows = rows
        self._encoder = encoder
        self._mode: Literal["train", "eval"] = "train" if split == "train" else "eval"
        self._metric = None if split == "train" else text_metric(task)
        self.collate = Collator(encoder.pad_token_id)
        #: The encoded rows of a map source.
        self.dataset: EncodedDataset | None = None
        #: Evaluation rows of like length together: less padding.
        self.order: list[int] | None = None
        if not is_iterable(rows):
            # Test rows are read at every stage, and options cost as many encodings as there are.
            self.dataset = EncodedDataset(rows, encoder, self._mode, self._metric, keep=self._mode == "eval")
            if self._mode == "eval":
                lengths = self.dataset.lengths()
                self.order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))

    def encode(self, row: Any, number: int) -> Any:
        """A row of an iterable source."""
        from lightning_cl.data import EncodedDataset

        encoded = EncodedDataset([row], self._encoder, self._mode, self._metric)[0]
        if isinstance(encoded, dict) and "metric" in encoded:
            encoded["row"] = number
        return encoded

    def report_lengths(self) -> None:
        """Warn about rows that are longer than the encoder lets them be."""
        from lightning_cl.data import report_truncated

        report_truncated(self._rows, self._encoder, self._name)
