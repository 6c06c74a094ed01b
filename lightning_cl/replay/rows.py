# SPDX-License-Identifier: Apache-2.0
"""Rows and batches: split any batch into rows, and append rows to any batch."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lightning_cl.replay.ragged import FOLLOWING, segment_lengths

# What fills the end of a shorter row, by the last part of the key's path. A key outside this table (and outside the
# user's own `pad_values`) is never padded: a wrong fill would train on noise without an error.
PAD_VALUES: dict[str, float] = {
    "input_ids": 0,
    "attention_mask": 0,
    "labels": -100,
    "loss_weight": 0.0,
    "position_ids": 0,
    "token_type_ids": 0,
}
IGNORED_LABEL = -100


@dataclass
class Row:
    """One sample without its batch: what it holds, and what must be known of it.

    Attributes:
        content: value by path inside the batch (``"input_ids"``, ``"0"``, ``"image.pixels"``); tensors are unpadded.
        id: stable identity: the data set's index for sources that have one, else a hash of the content.
        tokens: how many tokens the loss is taken over (1 for data without tokens).
        task: name of the task the row came from, None for rows of no task.
        source: class name of the :class:`~lightning_cl.replay.ReplaySource` that drew it.
    """

    content: dict[str, Any]
    id: str
    tokens: int = 1
    task: str | None = None
    source: str = ""

    @property
    def length(self) -> int:
        """Tokens of the row, padding excluded (0 for data without a token axis)."""
        ids = self.content.get("input_ids")
        return len(ids) if isinstance(ids, Tensor) else 0


def content_id(content: Mapping[str, Any]) -> str:
    """A hash of a row's content: equal rows have equal ids, on every rank and in every run."""
    digest = hashlib.blake2b(digest_size=12)
    for path in sorted(content):
        value = content[path]
        digest.update(path.encode())
        if isinstance(value, Tensor):
            digest.update(str((value.dtype, tuple(value.shape))).encode())
            digest.update(value.detach().reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b"")
        else:
            digest.update(repr(value).encode())
    return digest.hexdigest()


def loss_tokens(content: Mapping[str, Any]) -> int:
    """Tokens of a row that carry loss: labels that are not ignored, else all of its tokens, else one."""
    labels = content.get("labels")
    if isinstance(labels, Tensor) and labels.ndim == 1:
        # The first label of a causal row is never predicted, so it carries no loss.
        return int((labels[1:] != IGNORED_LABEL).sum())
    ids = content.get("input_ids")
    return len(ids) if isinstance(ids, Tensor) else 1


@dataclass
class BatchLayout:
    """A batch taken apart: its leaves by path, its number of rows, and how to put it together again.

    Attributes:
        leaves: leaf by path.
        rows: rows of the batch (segments, if it is packed).
        per_row: the paths whose leaves have one entry a row.
        lengths: tokens of each segment of a packed batch ``[1, tokens]``; None for an ordinary batch.
    """

    batch: Any
    leaves: dict[str, Any]
    rows: int
    per_row: list[str]
    lengths: list[int] | None = None

    @property
    def packed(self) -> bool:
        """Whether the batch is one long row of segments."""
        return self.lengths is not None

    @property
    def width(self) -> int:
        """Tokens a row has in this batch, padding included (0 for data without a token axis)."""
        ids = self.leaves.get("input_ids")
        return ids.shape[1] if isinstance(ids, Tensor) and ids.ndim == 2 else 0

    def rebuild(self, leaves: Mapping[str, Any]) -> Any:
        """The batch with other leaves, in containers of the same types."""
        return _rebuild(self.batch, leaves, "")


def layout_of(batch: Any) -> BatchLayout:
    """Take a batch apart.

    Raises:
        MisconfigurationException: if it holds no tensor, so that its rows cannot be told, or rows without a common
            length in a layout that cannot be extended.
    """
    leaves = dict(_walk(batch, ""))
    first = leaves.get("input_ids")
    if not isinstance(first, Tensor):
        first = next((v for v in leaves.values() if isinstance(v, Tensor) and v.ndim > 0), None)
    if first is None:
        raise MisconfigurationException(
            f"A training batch of type `{type(batch).__name__}` holds no tensor, so its rows cannot be told apart and"
            " replay rows cannot be added. Give tensors (in dicts, tuples, lists or dataclasses), one row an entry."
        )
    lengths = segment_lengths(leaves)
    if lengths is not None:
        return BatchLayout(batch, leaves, len(lengths), [], lengths)
    rows = len(first)
    per_row = [path for path, leaf in leaves.items() if _entries(leaf) == rows]
    return BatchLayout(batch, leaves, rows, per_row)


def split_rows(layout: BatchLayout, task: str | None = None) -> list[Row]:
    """The rows of a batch, on the CPU and without padding (told by ``attention_mask``, where there is one)."""
    if layout.packed:
        return _split_packed(layout, task)
    mask = layout.leaves.get("attention_mask")
    mask = mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None
    rows = []
    for i in range(layout.rows):
        keep = None if mask is None else mask[i]
        content = {}
        for path in layout.per_row:
            value = layout.leaves[path][i]
            if isinstance(value, Tensor):
                if keep is not None and value.ndim >= 1 and value.shape[0] == keep.shape[0]:
                    value = value[keep]
                value = value.detach().clone()
            content[path] = value
        rows.append(Row(content, content_id(content), loss_tokens(content), task))
    return rows


def collate_rows(
    rows: Sequence[Row], layout: BatchLayout, pad_values: Mapping[str, float], width: int = 0
) -> dict[str, Any]:
    """One entry a path: the rows' values, stacked and padded (to at least ``width`` tokens), for a batch like ``layout``.

    Raises:
        MisconfigurationException: if keys, kinds of values or shapes do not fit the task's batch.
    """
    contents = [fit_keys(row, layout) for row in rows]
    out: dict[str, Any] = {}
    for path in layout.per_row:
        values = [content[path] for content in contents]
        like = layout.leaves[path]
        if not isinstance(like, Tensor):
            out[path] = values
            continue
        values = [torch.as_tensor(v) for v in values]
        if any(v.is_floating_point() != like.is_floating_point() or v.ndim != like.ndim - 1 for v in values):
            raise MisconfigurationException(
                f"Replay rows do not fit the task's batch at key {path!r}: the batch holds {describe(like[0])} a row,"
                f" the replay row {rows[0].id!r} holds {describe(values[0])}. Give rows of the same structure and"
                " dtypes as the training batches."
            )
        width_here = width if like.ndim >= 2 and like.shape[1] == layout.width and layout.width else 0
        lengths = {v.shape[0] if v.ndim else 0 for v in values}
        trailing = {tuple(v.shape[1:]) for v in values} | {tuple(like.shape[2:])}
        target = max([*lengths, width_here])
        if len(trailing) > 1:
            raise MisconfigurationException(
                f"Replay rows do not fit the task's batch at key {path!r}: shapes {sorted(trailing)} beyond the first"
                " dimension cannot be joined. Give rows of the same structure as the training batches."
            )
        if lengths == {target} or like.ndim == 1:
            out[path] = torch.stack(values).to(like.dtype)
        else:
            stacked = pad_sequence(values, batch_first=True, padding_value=_pad_value(path, pad_values))
            out[path] = _widen(stacked, target, path, pad_values).to(like.dtype)
    return out


def join(layout: BatchLayout, replay: Mapping[str, Any], pad_values: Mapping[str, float]) -> Any:
    """The task's batch with the replay entries appended to every leaf that has one entry a row."""
    leaves = dict(layout.leaves)
    for path in layout.per_row:
        mine, theirs = leaves[path], replay[path]
        if not isinstance(mine, Tensor):
            leaves[path] = type(mine)([*mine, *theirs])
            continue
        if mine.ndim >= 2 and mine.shape[1] != theirs.shape[1]:
            target = max(mine.shape[1], theirs.shape[1])
            mine = _widen(mine, target, path, pad_values)
            theirs = _widen(theirs, target, path, pad_values)
        leaves[path] = torch.cat([mine, theirs])
    return layout.rebuild(leaves)


def alone(layout: BatchLayout, replay: Mapping[str, Any]) -> Any:
    """A batch of the replay entries only, in the task batch's containers."""
    return layout.rebuild({**layout.leaves, **replay})


def _walk(node: Any, path: str) -> Iterator[tuple[str, Any]]:
    children = _children(node)
    if children is None:
        yield path, node
        return
    for key, child in children.items():
        yield from _walk(child, f"{path}.{key}" if path else str(key))


def _children(node: Any) -> dict[Any, Any] | None:
    """The named children of a container, or None for a leaf."""
    if isinstance(node, Mapping):
        return dict(node)
    if dataclasses.is_dataclass(node) and not isinstance(node, type):
        return {f.name: getattr(node, f.name) for f in dataclasses.fields(node)}
    if isinstance(node, (list, tuple)) and any(isinstance(v, (Tensor, Mapping, list, tuple)) for v in node):
        names = getattr(node, "_fields", range(len(node)))
        return dict(zip(names, node, strict=True))
    return None


def _rebuild(node: Any, leaves: Mapping[str, Any], path: str) -> Any:
    children = _children(node)
    if children is None:
        return leaves[path]
    built = {key: _rebuild(child, leaves, f"{path}.{key}" if path else str(key)) for key, child in children.items()}
    if isinstance(node, Mapping):
        return type(node)(built)  # type: ignore[call-arg]
    if dataclasses.is_dataclass(node) and not isinstance(node, type):
        return dataclasses.replace(node, **built)
    return type(node)(**built) if hasattr(node, "_fields") else type(node)(built.values())


def _entries(leaf: Any) -> int | None:
    if isinstance(leaf, Tensor):
        return leaf.shape[0] if leaf.ndim else None
    return len(leaf) if isinstance(leaf, (list, tuple)) else None


def _split_packed(layout: BatchLayout, task: str | None) -> list[Row]:
    rows, start = [], 0
    shape = layout.leaves["input_ids"].shape
    for length in layout.lengths or []:
        content = {
            path: leaf[0, start : start + length].detach().clone()
            for path, leaf in layout.leaves.items()
            if isinstance(leaf, Tensor) and leaf.shape == shape and path.rpartition(".")[2] not in FOLLOWING
        }
        rows.append(Row(content, content_id(content), loss_tokens(content), task))
        start += length
    return rows


def fit_keys(row: Row, layout: BatchLayout) -> dict[str, Any]:
    """The row's content with exactly the batch's keys; what follows from ``input_ids`` is made, the rest refused."""
    wanted = layout.per_row or [
        path for path, leaf in layout.leaves.items() if isinstance(leaf, Tensor) and leaf.ndim == 2
    ]
    content = dict(row.content)
    ids = content.get("input_ids")
    if isinstance(ids, Tensor):
        for path in wanted:
            if path in content:
                continue
            if path == "attention_mask":
                content[path] = torch.ones_like(ids)
            elif path == "labels":
                content[path] = ids.clone()
            elif path == "loss_weight":
                content[path] = torch.ones(len(ids))
            elif path == "position_ids":
                content[path] = torch.arange(len(ids))
            elif path in ("token_type_ids", "seq_idx"):
                content[path] = torch.zeros_like(ids)
    missing = [path for path in wanted if path not in content]
    extra = [path for path in content if path not in wanted and path not in PAD_VALUES]
    if missing or extra:
        raise MisconfigurationException(
            f"Replay row {row.id!r} of `{row.source or 'the source'}` does not fit the task's batch: missing keys"
            f" {missing}, unknown keys {extra}; the batch has {wanted}. Give rows with the batch's keys (for texts: batches"
            " of `input_ids`, `attention_mask`, `labels`)."
        )
    return content


def _pad_value(path: str, pad_values: Mapping[str, float]) -> float:
    key = path.rpartition(".")[2]
    for table in (pad_values, PAD_VALUES):
        for name in (path, key):
            if name in table:
                return table[name]
    raise MisconfigurationException(
        f"Rows of the key {path!r} have different lengths, and what to pad them with is not known. Pass"
        f" `pad_values={{{path!r}: VALUE}}` to `ReplayMixer`, or give rows of equal shape."
    )


def _widen(tensor: Tensor, width: int, path: str, pad_values: Mapping[str, float]) -> Tensor:
    if tensor.shape[1] >= width:
        return tensor
    out = tensor.new_full((tensor.shape[0], width, *tensor.shape[2:]), _pad_value(path, pad_values))
    out[:, : tensor.shape[1]] = tensor
    return out


def describe(value: Any) -> str:
    """A value in words, for messages."""
    if isinstance(value, Tensor):
        return f"a tensor {str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    return f"a `{type(value).__name__}`"
