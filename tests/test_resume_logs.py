# SPDX-License-Identifier: Apache-2.0
"""The CSV log and the monitor's files of a resumed run are those of an unbroken one, from every checkpoint."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from lightning_cl import fit_stream
from lightning_cl.callbacks import ForgettingMonitor
from tests.stream_tools import Net, stream, trainer


class Logs(Net):
    """Logs by step, by epoch and both."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("both", loss, on_step=True, on_epoch=True)
        self.log("by_epoch", loss, on_step=False, on_epoch=True)
        return loss


def run(folder: Path, ckpt_path: Any = None) -> None:
    torch.manual_seed(1)
    callbacks = [
        ForgettingMonitor("val_acc", plots=False, print_table=False),
        ModelCheckpoint(save_top_k=-1, every_n_train_steps=1, filename="s{step}"),
        ModelCheckpoint(save_top_k=-1, every_n_epochs=1, filename="e{epoch}"),
        ModelCheckpoint(save_top_k=-1, monitor="val_acc", save_on_train_epoch_end=False, filename="v{step}"),
    ]
    logger = CSVLogger(folder, name="", version="")
    fit_stream(
        trainer(folder, callbacks=callbacks, logger=logger, log_every_n_steps=1, max_epochs=2),
        Logs(),
        stream(count=2),
        ckpt_path=ckpt_path,
    )


def results(folder: Path) -> dict[str, Any]:
    with open(folder / "metrics.csv", newline="") as file:
        rows = [{key: value for key, value in row.items() if value != ""} for row in csv.DictReader(file)]
    matrix = json.loads((folder / "task_matrix.json").read_text())
    costs = matrix.pop("costs")
    del matrix["provenance"]
    return {"rows": rows, "matrix": matrix, "stages": sorted(costs), "csv": (folder / "task_matrix.csv").read_text()}


def _without_means(found: dict[str, Any]) -> dict[str, Any]:
    rows = [{key: value for key, value in row.items() if "epoch" not in key[1:]} for row in found["rows"]]
    # After the last step of an epoch no mean is left to log, so a row that held nothing else is not written.
    return {**found, "rows": [row for row in rows if row.keys() > {"epoch", "step"}], "matrix": None}


def test_logs_are_set_back_to_the_checkpoint(tmp_path: Path) -> None:
    run(tmp_path / "whole")
    expected = results(tmp_path / "whole")
    found = sorted(tmp_path.glob("whole/task_*/*.ckpt"))
    assert len(found) > 16
    for path in found:
        # The run got to its end, and goes on from one of its older checkpoints in the same folder.
        shutil.rmtree(tmp_path / "again", ignore_errors=True)
        shutil.copytree(tmp_path / "whole", tmp_path / "again")
        run(tmp_path / "again", tmp_path / "again" / path.relative_to(tmp_path / "whole"))
        found_again = results(tmp_path / "again")
        if path.name[0] in "sv":
            # Lightning's checkpoints hold no running means: those of the epoch begin anew where it is taken up.
            assert _without_means(found_again) == _without_means(expected), path
        else:
            assert found_again == expected, path


def test_the_monitors_files_are_set_back_before_training_goes_on(tmp_path: Path) -> None:
    run(tmp_path)

    class Stop(ModelCheckpoint):
        def on_train_batch_end(self, *args: Any) -> None:
            raise KeyboardInterrupt

    early = next(iter(tmp_path.glob("task_0_t0/sstep=2*.ckpt")))
    monitor = ForgettingMonitor("val_acc", plots=False, print_table=False)
    logger = CSVLogger(tmp_path, name="", version="")
    loop = trainer(tmp_path, callbacks=[monitor, Stop()], logger=logger, max_epochs=2)
    with pytest.raises(SystemExit):
        fit_stream(loop, Logs(), stream(count=2), ckpt_path=early)
    assert {
        entry["stage"] for entry in json.loads((tmp_path / "task_matrix.json").read_text())["matrix"]["scores"]
    } == {-1}
    assert {line.split(",")[0] for line in (tmp_path / "task_matrix.csv").read_text().splitlines()[1:]} == {"-1"}
