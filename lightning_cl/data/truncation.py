# SPDX-License-Identifier: Apache-2.0
"""How many rows are too long, counted before training and reported once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_cl.data.encoding import Encoder
from lightning_cl.data.examples import example_kind

_EXACT_ROWS = 5000


@dataclass(frozen=True)
class TruncationReport:
    """What does not fit into ``max_length``.

    Attributes:
        rows: rows looked at.
        truncated: of these, rows that lose tokens.
        tokens_cut: tokens they lose together.
        longest: tokens of the longest row.
        total: rows of the source; where it is more than ``rows``, these were an even sample.
    """

    rows: int
    truncated: int
    tokens_cut: int
    longest: int
    total: int

    def message(self, name: str, encoder: Encoder) -> str:
        """The report in one sentence, with the ways out."""
        looked = f"{self.rows} rows" if self.rows == self.total else f"{self.rows} of {self.total} rows looked at"
        return (
            f"{name}: {self.truncated} of {looked} are longer than `max_length={encoder.max_length}` tokens (the "
            f"longest has {self.longest}) and lose {self.tokens_cut} tokens at the {encoder.truncation_side} of the "
            "prompt, in training and evaluation alike. Raise `max_length`, or set `truncation_side`."
        )


def count_truncated(rows: Sequence[Any], encoder: Encoder, limit: int = _EXACT_ROWS) -> TruncationReport:
    """Counts the rows that are longer than the encoder's ``max_length``.

    Args:
        rows: a map-style source; rows that are no text are skipped.
        encoder: the encoder.
        limit: of a longer source, so many evenly spaced rows are looked at.

    Example:
        >>> from tests.helpers.models import tiny_tokenizer
        >>> encoder = Encoder(tiny_tokenizer(chat=False), max_length=8)
        >>> count_truncated([{"text": "short"}, {"text": "far too long"}], encoder).truncated
        1
    """
    total = len(rows)
    places = range(total) if total <= limit else [i * total // limit for i in range(limit)]
    lengths = [encoder.length(rows[i]) for i in places if example_kind(rows[i]) is not None]
    over = [length - encoder.max_length for length in lengths if length > encoder.max_length]
    return TruncationReport(len(lengths), len(over), sum(over), max(lengths, default=0), total)


def report_truncated(rows: Sequence[Any], encoder: Encoder, name: str) -> TruncationReport:
    """Counts as :func:`count_truncated` does and warns, on rank zero, when any row is too long."""
    report = count_truncated(rows, encoder)
    if report.truncated:
        rank_zero_warn(report.message(name, encoder))
    return report
