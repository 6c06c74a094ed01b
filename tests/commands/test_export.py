# SPDX-License-Identifier: Apache-2.0
"""``lightning-cl export`` on a real checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_cl.commands.export import main
from tests.helpers import models


@pytest.fixture
def run(tmp_path: Path) -> Path:
    import lightning_cl  # noqa: F401

    models.tiny_llama().save_pretrained(tmp_path / "base")
    from transformers import AutoModelForCausalLM

    module = models.PlainLM(models.lora(AutoModelForCausalLM.from_pretrained(tmp_path / "base")))
    trainer = models.trainer(tmp_path, strategy="cl_single_device")
    trainer.fit(module, models.loader())
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    return tmp_path


def test_adapter_then_merged_model(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    assert main([str(run / "run.ckpt"), "--out", str(run / "adapter")]) == 0
    assert "Wrote the adapter to" in capsys.readouterr().out
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(run / "base"), run / "adapter")
    assert main([str(run / "adapter"), "--merge", "--out", str(run / "merged")]) == 0
    AutoModelForCausalLM.from_pretrained(run / "merged")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{run}/none.ckpt", "--out", "{run}/x"], "Checkpoint file not found"),
        (["{run}/run.ckpt", "--out", "{run}/x", "--adapter", "mine"], "There is no adapter 'mine' to export"),
        (["{run}/run.ckpt", "--out", "{run}/x", "--weights", "slow"], "holds no slow weights"),
    ],
)
def test_what_is_wrong_is_said(
    run: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main([a.format(run=run) for a in arguments]) == 1
    assert message in capsys.readouterr().err


def test_an_adapter_folder_needs_merge(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(run / "run.ckpt"), "--out", str(run / "adapter")])
    assert main([str(run / "adapter"), "--out", str(run / "again")]) == 1
    assert "is a PEFT adapter folder already. Pass `--merge`" in capsys.readouterr().err
