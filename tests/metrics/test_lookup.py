# SPDX-License-Identifier: Apache-2.0
"""Names of logged metrics to tasks."""

from __future__ import annotations

import pytest

from lightning_cl.metrics import find_score
from lightning_cl.metrics.lookup import label_of

TWO = {
    "val_acc/dataloader_idx_0": 0.1,
    "val_acc/dataloader_idx_1": 0.2,
    "val_loss/dataloader_idx_1": 3.0,
    "train_loss": 9.0,
    "news/acc": 0.4,
}


@pytest.mark.parametrize(
    ("loader", "loaders", "metric", "own", "expected"),
    [
        (1, 2, "val_acc", None, "val_acc/dataloader_idx_1"),
        (0, 2, "{task}/acc", None, "news/acc"),
        (1, 2, "val_{metric}", "loss", "val_loss/dataloader_idx_1"),
        # A probe measured by its loss beside tasks measured by accuracy: its own metric stands in.
        (1, 2, "val_rouge_l", "loss", "val_loss/dataloader_idx_1"),
        # What the validation loop calls val_acc, the test loop calls test_acc.
        (0, 2, "test_acc", None, "val_acc/dataloader_idx_0"),
        (1, 2, None, "acc", "val_acc/dataloader_idx_1"),
        (0, 2, None, None, "val_acc/dataloader_idx_0"),
    ],
)
def test_found(loader, loaders, metric, own, expected) -> None:
    assert find_score(TWO, loader, loaders, "news", metric, own) == (expected, "")


@pytest.mark.parametrize(
    ("loader", "loaders", "metric", "own", "reason"),
    [
        (0, 2, "val_f1", None, "nothing logs 'val_f1' for 'news' (logged: val_acc)"),
        (0, 2, "train_loss", None, "nothing logs 'train_loss'"),
        (1, 2, None, None, "several metrics were logged for 'news' (val_acc, val_loss): name one"),
        (2, 3, None, None, "nothing was logged for 'news'"),
    ],
)
def test_not_found(loader, loaders, metric, own, reason) -> None:
    name, why = find_score(TWO, loader, loaders, "news", metric, own)
    assert name is None
    assert reason in why


def test_one_loader_has_no_suffix() -> None:
    assert find_score({"acc": 0.5}, 0, 1, "a", "acc") == ("acc", "")
    assert find_score({"acc": 0.5}, 0, 1, "a") == ("acc", "")


def test_label_is_the_same_in_both_loops() -> None:
    assert label_of("val_acc/dataloader_idx_0", "news") == label_of("test_acc/dataloader_idx_4", "news") == "acc"
    assert label_of("news/acc", "news") == "acc"
    assert label_of("news", "news") == "news"
