# SPDX-License-Identifier: Apache-2.0
"""General samples: one small fixed set of ordinary texts, replayed in every task."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_cl.replay.rows import Row, layout_of, loss_tokens, split_rows
from lightning_cl.replay.shuffle import ShuffledWalk
from lightning_cl.replay.source import ReplaySource

if TYPE_CHECKING:
    import lightning.pytorch as pl


class GeneralSamples(ReplaySource):
    """A fixed set of general samples, the same for every task: GeRe's setting (arXiv 2508.04676, section 3).

    Texts are cut to ``max_tokens`` and carry loss on every token; no BOS is added. They are encoded with the tokenizer
    found at ``tokenizer``, else at the module's or the data module's ``tokenizer``. A data set of rows that already have
    the training batches' structure is used as it is, with any kind of data.

    Args:
        data: texts; or a JSONL file (``.gz`` too) with ``text``, ``prompt``/``answer``, ``messages`` or ``input_ids``
            in each line; or ``hf://owner/name``; or any map-style data set of texts, such dicts or rows.
        num_samples: how many are used, chosen by ``seed``; all of them if there are fewer.
        max_tokens: longer texts are cut to their first ``max_tokens`` tokens.
        seed: chooses the samples and the order in which they are replayed.
        tokenizer: path or name of a tokenizer (or the object), where neither module nor data module has one.

    Raises:
        ValueError: for a number out of its range, or no data at all.

    Example:
        >>> source = GeneralSamples(["The sun rose.", "Rain fell."], num_samples=2)
        >>> source.available()
        2
    """

    def __init__(
        self,
        data: Any,
        num_samples: int = 1000,
        max_tokens: int = 563,
        seed: int = 0,
        tokenizer: Any = None,
    ) -> None:
        for name, value in {"num_samples": num_samples, "max_tokens": max_tokens}.items():
            if value < 1:
                raise ValueError(f"`GeneralSamples({name}={value})`: must be at least 1.")
        self.data = data
        self.num_samples = num_samples
        self.max_tokens = max_tokens
        self.seed = seed
        self.tokenizer = tokenizer
        self._walk = ShuffledWalk(seed)
        self._samples: Sequence[Any] | None = None
        self._chosen: list[int] = []
        self._encode: Any = None
        self._limit = max_tokens
        self._rows: dict[int, Row] = {}

    def prepare(self, trainer: pl.Trainer, pl_module: pl.LightningModule, task_index: int) -> None:
        """Read the data and find the tokenizer."""
        self.available()
        assert self._samples is not None
        if _is_text(self._samples[self._chosen[0]]) and self._encode is None:
            from lightning_cl.data import Encoder

            tokenizer = self.find_tokenizer(trainer, pl_module)
            # A text is cut to what the model can read, whatever the setting.
            self._limit = min(self.max_tokens, getattr(tokenizer, "model_max_length", self.max_tokens))
            self._encode = Encoder(tokenizer, max_length=self._limit)

    def find_tokenizer(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Any:
        """The tokenizer that texts are encoded with.

        Raises:
            MisconfigurationException: if there is none.
        """
        datamodule = getattr(trainer, "datamodule", None)
        for tokenizer in (
            self.tokenizer,
            getattr(pl_module, "tokenizer", None),
            getattr(datamodule, "tokenizer", None),
        ):
            if isinstance(tokenizer, str):
                from transformers import AutoTokenizer

                return AutoTokenizer.from_pretrained(tokenizer)
            if tokenizer is not None:
                return tokenizer
        raise MisconfigurationException(
            "`GeneralSamples` has texts but no tokenizer: neither the LightningModule nor the data module has an attribute"
            " `tokenizer`. Pass `GeneralSamples(..., tokenizer=PATH)`, or give rows that are encoded already."
        )

    def available(self) -> int:
        """Number of samples in use."""
        if self._samples is None:
            self._samples = _read(self.data)
            n = len(self._samples)
            if n == 0:
                raise ValueError(f"`GeneralSamples(data={_short(self.data)})` has no rows.")
            if n < self.num_samples:
                rank_zero_warn(
                    f"`GeneralSamples(num_samples={self.num_samples})`: the data has {n} rows, and all of them are used."
                )
            order = torch.randperm(n, generator=torch.Generator().manual_seed(self.seed))
            self._chosen = order[: self.num_samples].tolist()
        return len(self._chosen)

    def draw(self, count: int, rank: int, world_size: int) -> list[Row]:
        """The next ``count`` samples of the shuffled walk."""
        return [self.row(i) for i in self._walk.take(count, self.available(), rank, world_size)]

    def row(self, index: int) -> Row:
        """The ``index``-th of the chosen samples, encoded."""
        if index not in self._rows:
            self.available()
            assert self._samples is not None
            place = self._chosen[index]
            content = self._content(self._samples[place])
            self._rows[index] = Row(content, str(place), loss_tokens(content), None, self.name)
        return self._rows[index]

    @property
    def version(self) -> int:
        """The samples are chosen once."""
        return 0

    def known_rows(self) -> list[Row]:
        """All chosen samples."""
        return [self.row(index) for index in range(self.available())]

    def fingerprint(self) -> str:
        """A hash of the samples in use, in order: equal texts, choice and length give equal fingerprints."""
        digest = hashlib.sha256()
        for index in range(self.available()):
            for path, value in sorted(self.row(index).content.items()):
                digest.update(path.encode())
                digest.update(value.numpy().tobytes() if isinstance(value, Tensor) else repr(value).encode())
        return digest.hexdigest()

    def _content(self, sample: Any) -> dict[str, Any]:
        if isinstance(sample, Mapping) and "input_ids" in sample:
            content = {
                k: torch.as_tensor(v) for k, v in sample.items() if k in ("input_ids", "attention_mask", "labels")
            }
            return {k: v[: self.max_tokens] for k, v in content.items()}
        if not _is_text(sample):
            return split_rows(layout_of(torch.utils.data.default_collate([sample])))[0].content
        if isinstance(sample, Mapping) and "text" not in sample:
            return dict(self._encode.encode_train(sample))
        text = sample if isinstance(sample, str) else sample["text"]
        ids = self._encode.tokenizer(text, add_special_tokens=False, truncation=True, max_length=self._limit)
        input_ids = torch.tensor(ids["input_ids"], dtype=torch.long)
        return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "labels": input_ids.clone()}

    def state_dict(self) -> dict[str, Any]:
        """Where in the shuffled walk the ranks stand."""
        return {"walk": self._walk.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self._walk.load_state_dict(state["walk"])


def _is_text(sample: Any) -> bool:
    if isinstance(sample, str):
        return True
    return (
        isinstance(sample, Mapping) and bool({"text", "prompt", "messages"} & set(sample)) and "input_ids" not in sample
    )


def _read(data: Any) -> Sequence[Any]:
    if isinstance(data, (list, tuple)):
        return data
    if isinstance(data, torch.utils.data.Dataset) and hasattr(data, "__len__"):
        return data  # type: ignore[return-value]
    from lightning_cl.data import read_rows

    rows: Any = read_rows(data)
    if not hasattr(rows, "__len__"):
        raise ValueError(
            f"`GeneralSamples(data={_short(data)})` has no length. Give a map-style data set, or a file of its first rows."
        )
    return rows


def _short(data: Any) -> str:
    text = repr(data)
    return text if len(text) < 80 else text[:77] + "..."
