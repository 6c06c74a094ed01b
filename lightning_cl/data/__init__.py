# SPDX-License-Identifier: Apache-2.0
"""Reading, encoding and collating text tasks.

From a source to batches::

    rows = read_rows("train.jsonl")                      # list of rows, or the dataset itself
    encoder = Encoder.for_module(module, max_length=512)  # the module's tokenizer and prompt_loss_weight
    report_truncated(rows, encoder, "task name, train")   # warns when rows are too long
    collate = Collator(encoder.pad_token_id)
    train = DataLoader(EncodedDataset(rows, encoder, "train"), collate_fn=collate, shuffle=True)

    check_metric(rows, "accuracy", "task name, test")     # raises when rows cannot be scored by it
    dataset = EncodedDataset(rows, encoder, "eval", metric="accuracy")
    test = DataLoader(dataset, collate_fn=collate, sampler=EvalSampler(dataset.lengths(), rank, world_size))

Iterable sources take ``EncodedIterableDataset`` in place of ``EncodedDataset``. Rows that are no text (images, token
ids) pass through all of it unchanged.
"""

from lightning_cl.data.collating import Collator
from lightning_cl.data.datasets import EncodedDataset, EncodedIterableDataset
from lightning_cl.data.encoding import Encoder, load_tokenizer
from lightning_cl.data.errors import DataError
from lightning_cl.data.examples import Example, check_metric, example_kind
from lightning_cl.data.reading import read_rows, read_trace
from lightning_cl.data.sampling import EvalSampler
from lightning_cl.data.truncation import TruncationReport, count_truncated, report_truncated

__all__ = [
    "Collator",
    "DataError",
    "EncodedDataset",
    "EncodedIterableDataset",
    "Encoder",
    "EvalSampler",
    "Example",
    "TruncationReport",
    "check_metric",
    "count_truncated",
    "example_kind",
    "load_tokenizer",
    "read_rows",
    "read_trace",
    "report_truncated",
]
