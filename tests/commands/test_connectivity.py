# SPDX-License-Identifier: Apache-2.0
"""`lightning-cl connectivity` from folders and files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lightning_cl.commands import connectivity
from tests.helpers import models
from tests.test_connectivity import _adapter, _rows


@pytest.fixture
def run(tmp_path: Path) -> dict[str, Any]:
    base = tmp_path / "base"
    models.tiny_llama().save_pretrained(base)
    models.tiny_tokenizer().save_pretrained(base)
    for name in ("old", "new"):
        rows = _rows([f"{name} question {i}" for i in range(4)])
        (tmp_path / f"{name}.test.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return {
        "base": base,
        "a": _adapter(tmp_path, 1),
        "b": _adapter(tmp_path, 2),
        "tasks": [str(tmp_path / "old.test.jsonl"), str(tmp_path / "new.test.jsonl")],
    }


def _argv(run: dict[str, Any], out: Path, *more: str) -> list[str]:
    return ["--a", str(run["a"]), "--b", str(run["b"]), "--tasks", *run["tasks"], "--out", str(out), *more]


def test_writes_table_json_and_plot(run: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    argv = _argv(
        run, out, "--model", str(run["base"]), "--points", "3", "--rows", "3", "--device", "cpu", "--mode", "both"
    )
    assert connectivity.main(argv) == 0
    printed = capsys.readouterr().out
    assert "| alpha | old loss | old accuracy | new loss | new accuracy |" in printed
    assert "| barrier (product) |" in printed
    for mode in ("factors", "product"):
        found = json.loads((out / f"connectivity_{mode}.json").read_text())
        assert found["mode"] == mode
        assert found["alphas"] == [0.0, 0.5, 1.0]
        assert found["current"] == "new"
        assert found["rows"] == {"old": 3, "new": 3}
        assert len(found["tasks"]["old"]["loss"]) == 3
        assert (out / f"connectivity_{mode}.png").stat().st_size > 0
    # Both modes agree at the ends and differ between them.
    factors, product = (json.loads((out / f"connectivity_{m}.json").read_text()) for m in ("factors", "product"))
    losses = [line["tasks"]["new"]["loss"] for line in (factors, product)]
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-4)
    assert losses[0][2] == pytest.approx(losses[1][2], rel=1e-4)
    assert losses[0][1] != pytest.approx(losses[1][1], rel=1e-4)


def test_bad_input_is_named(run: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert connectivity.main(_argv(run, out)) == 1
    assert (
        "does not say which base model it belongs to. Give its folder or name with `--model`" in capsys.readouterr().err
    )
    assert connectivity.main(_argv(run, out, "--points", "1")) == 1
    assert "`--points 1` must be at least 2" in capsys.readouterr().err
    assert connectivity.main(_argv({**run, "a": tmp_path}, out)) == 1
    assert "no PEFT adapter folder" in capsys.readouterr().err
    assert connectivity.main(_argv({**run, "tasks": run["tasks"][:1] * 2}, out, "--model", str(run["base"]))) == 1
    assert "would both be called 'old'" in capsys.readouterr().err
    missing = {**run, "tasks": [str(tmp_path / "missing.jsonl")]}
    assert connectivity.main(_argv(missing, out, "--model", str(run["base"]))) == 1
    assert "missing.jsonl" in capsys.readouterr().err
