# SPDX-License-Identifier: Apache-2.0
"""Rows of unequal length as one batch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import default_collate

from lightning_cl.data.encoding import IGNORE_INDEX
from lightning_cl.data.errors import DataError

_PADS: dict[str, float] = {"attention_mask": 0, "labels": IGNORE_INDEX, "loss_weight": 0.0, "token_type_ids": 0}


class Collator:
    """Pads encoded rows to a batch: on the right for training and loss, on the left for scoring and generation.

    Rows without ``input_ids`` (images and labels, tuples) go to torch's ``default_collate``, so that one collator
    serves every task.

    Args:
        pad_token_id: the id that fills ``input_ids`` and ``option_ids``.

    Example:
        >>> rows = [{"input_ids": torch.tensor([5, 6]), "labels": torch.tensor([-100, 6])},
        ...         {"input_ids": torch.tensor([7]), "labels": torch.tensor([-100])}]
        >>> Collator(pad_token_id=0)(rows)["input_ids"].tolist()
        [[5, 6], [7, 0]]
    """

    def __init__(self, pad_token_id: int = 0) -> None:
        self.pad_token_id = int(pad_token_id)

    def __call__(self, rows: Sequence[Any]) -> Any:
        """A batch.

        Args:
            rows: encoded rows; all of one kind.

        Returns:
            For training ``input_ids``, ``attention_mask``, ``labels`` (and ``loss_weight``), each ``[B, T]``. For
            evaluation by options also ``option_ids`` ``[B, O, L]`` int64, ``option_mask`` ``[B, O, L]`` bool,
            ``answer_index`` ``[B]``; ``row`` ``[B]`` (-1 for fillers), lists of strings ``options``, ``reference``, and
            ``metric``, one string.

        Raises:
            DataError: when the rows' keys or their metrics differ.
        """
        first = rows[0]
        if not (isinstance(first, Mapping) and "input_ids" in first):
            return default_collate(list(rows))
        keys = set(first)
        for row in rows:
            if set(row) != keys:
                raise DataError(
                    f"rows of one batch have different keys: {sorted(keys)} and {sorted(row)}. "
                    "Give a task rows of one form, all with options or none."
                )
        return self._evaluation(rows) if "metric" in first else self._padded(rows, left=False)

    def _padded(self, rows: Sequence[Mapping[str, Any]], left: bool, keys: Iterable[str] = ()) -> dict[str, Any]:
        batch: dict[str, Any] = {}
        lengths = [len(row["input_ids"]) for row in rows]
        for key in keys or rows[0]:
            values = [row[key] for row in rows]
            tensors = [torch.as_tensor(value) for value in values if not isinstance(value, str)]
            if len(tensors) < len(rows):
                batch[key] = values
            elif all(t.dim() >= 1 and t.shape[0] == n for t, n in zip(tensors, lengths, strict=True)):
                batch[key] = _pad(tensors, _PADS.get(key, self.pad_token_id if key == "input_ids" else 0), left)
            else:
                batch[key] = default_collate(values)
        if "attention_mask" not in batch:
            batch["attention_mask"] = _pad([torch.ones(n, dtype=torch.long) for n in lengths], 0, left)
        return batch

    def _evaluation(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        metrics = {row["metric"] for row in rows}
        if len(metrics) > 1:
            raise DataError(f"rows of one batch have different metrics: {sorted(metrics)}. Give each its own loader.")
        batch = self._padded(rows, left=True, keys=("input_ids", "attention_mask"))
        batch["metric"] = rows[0]["metric"]
        batch["reference"] = [row["reference"] for row in rows]
        batch["reference_length"] = torch.tensor([row["reference_length"] for row in rows])
        batch["row"] = torch.tensor([int(row.get("row", 0)) for row in rows])
        if "option_ids" in rows[0]:
            batch["options"] = [list(row["options"]) for row in rows]
            batch["answer_index"] = torch.tensor([row["answer_index"] for row in rows])
            width = max(len(row["option_ids"]) for row in rows)
            length = max(len(ids) for row in rows for ids in row["option_ids"])
            batch["option_ids"] = torch.full((len(rows), width, length), self.pad_token_id)
            batch["option_mask"] = torch.zeros((len(rows), width, length), dtype=torch.bool)
            for i, row in enumerate(rows):
                for j, ids in enumerate(row["option_ids"]):
                    batch["option_ids"][i, j, : len(ids)] = ids
                    batch["option_mask"][i, j, : len(ids)] = True
        return batch


def _pad(tensors: Sequence[Tensor], value: float, left: bool) -> Tensor:
    length = max(len(tensor) for tensor in tensors)
    out = tensors[0].new_full((len(tensors), length, *tensors[0].shape[1:]), value)
    for i, tensor in enumerate(tensors):
        start = length - len(tensor) if left else 0
        out[i, start : start + len(tensor)] = tensor
    return out
