# SPDX-License-Identifier: Apache-2.0
"""`lightning-cl route` on checkpoints and exported folders of a real run."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_cl import CausalLMModule, Task, TaskStream, fit_stream
from lightning_cl.callbacks import RLSRouterFitter
from lightning_cl.commands.route import main
from tests.helpers import models

TASKS = {"digits": "0123456789", "letters": "abcdef"}


def rows(task: str, count: int = 16) -> list[dict[str, str]]:
    signs = TASKS[task]
    return [
        {"prompt": "".join(signs[(i * 7 + j * 3) % len(signs)] for j in range(6)), "answer": signs[0]}
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    models.tiny_llama(num_hidden_layers=3).save_pretrained(folder / "base")
    models.tiny_tokenizer().save_pretrained(folder / "base")
    module = CausalLMModule(str(folder / "base"), lora={"r": 4, "target_modules": ["q_proj", "v_proj"]}, lr=1e-2)
    router = RLSRouterFitter(expansion_dim=64, ridge=1e-4)
    stream = TaskStream([Task(name, train=rows(name)) for name in TASKS], batch_size=8, max_length=64)
    trainer = models.trainer(folder, callbacks=[router], max_epochs=1, max_steps=-1)
    fit_stream(trainer, module, stream)
    trainer.save_checkpoint(folder / "run.ckpt")
    router.export(folder / "served")
    with (folder / "prompts.jsonl").open("w") as file:
        for name in TASKS:
            file.writelines(json.dumps({"prompt": row["prompt"]}) + "\n" for row in rows(name, 3))
    return folder


def lines(capsys: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize("source", ["run.ckpt", "served"])
def test_it_prints_route_margin_and_answer(run: Path, capsys: pytest.CaptureFixture[str], source: str) -> None:
    arguments = ["--ckpt", str(run / source), "--input", str(run / "prompts.jsonl"), "--max-new-tokens", "3"]
    assert main([*arguments, "--batch-size", "4", "--device", "cpu"]) == 0
    found = lines(capsys)
    assert [line["route"] for line in found] == ["digits"] * 3 + ["letters"] * 3
    assert [line["adapter"] for line in found] == ["task_0"] * 3 + ["task_1"] * 3
    assert all(line["margin"] > 0 and isinstance(line["answer"], str) for line in found)
    assert found[0]["prompt"] == rows("digits")[0]["prompt"]


def test_without_answers_and_below_the_margin(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = {"messages": [{"role": "user", "content": rows("letters")[0]["prompt"]}]}
    monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps(chat) + "\n\n"))
    arguments = ["--ckpt", str(run / "served"), "--input", "-", "--max-new-tokens", "0", "--device", "cpu"]
    assert main([*arguments, "--min-margin", "9"]) == 0
    (line,) = lines(capsys)
    assert line["route"] == "letters"
    assert line["adapter"] == "__base__"
    assert line["prompt"] == chat["messages"]
    assert "answer" not in line


def test_bad_input_is_named(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fails(*arguments: str) -> str:
        assert main([*arguments]) == 1
        return capsys.readouterr().err

    prompts = str(run / "prompts.jsonl")
    assert "There is no checkpoint at" in fails("--ckpt", str(tmp_path / "none.ckpt"), "--input", prompts)
    assert "`--batch-size 0` gives no batch" in fails("--ckpt", "x", "--input", prompts, "--batch-size", "0")
    (tmp_path / "bad.jsonl").write_text('{"prompt": "x"}\n{"text": "y"}\n')
    assert "Line 2 of" in fails("--ckpt", str(run / "served"), "--input", str(tmp_path / "bad.jsonl"))
    (tmp_path / "empty.jsonl").write_text("\n")
    assert "holds no rows" in fails("--ckpt", str(run / "served"), "--input", str(tmp_path / "empty.jsonl"))
    torch.save({"state_dict": {}, "callbacks": {"Other": {}}}, tmp_path / "other.ckpt")
    assert "holds no state of `RLSRouterFitter` (callbacks: Other)" in fails(
        "--ckpt", str(tmp_path / "other.ckpt"), "--input", prompts
    )
    fresh = RLSRouterFitter(expansion_dim=8)
    torch.save({"callbacks": {"RLSRouterFitter": fresh.state_dict()}}, tmp_path / "fresh.ckpt")
    assert "has no finished task with an adapter" in fails("--ckpt", str(tmp_path / "fresh.ckpt"), "--input", prompts)
    checkpoint = torch.load(run / "run.ckpt", weights_only=True)
    checkpoint["hyper_parameters"].pop("model")
    torch.save(checkpoint, tmp_path / "nameless.ckpt")
    assert "does not say which base model" in fails("--ckpt", str(tmp_path / "nameless.ckpt"), "--input", prompts)
