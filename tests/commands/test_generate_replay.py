# SPDX-License-Identifier: Apache-2.0
"""``lightning-cl generate-replay``: what it writes, that GeneralSamples reads it, and every refusal."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_cl.commands.generate_replay import main
from lightning_cl.replay import GeneralSamples
from lightning_cl.replay.generation import DecodeEngine
from tests.helpers.models import lora, tiny_llama, tiny_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny_llama(vocab_size=100).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def run(folder: Path, out: Path, *extra: str) -> int:
    return main(["--model", str(folder), "--num-samples", "6", "--out", str(out), "--length", "16", *extra])


def read(path: Path) -> list[dict[str, Any]]:
    data = path.read_bytes()
    return [json.loads(line) for line in (gzip.decompress(data) if path.suffix == ".gz" else data).splitlines()]


def test_general_samples_replays_the_rows_as_sampled(folder: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "made" / "samples.jsonl"
    assert run(folder, out) == 0
    assert "Wrote 6 samples (96 tokens)" in capsys.readouterr().out
    expected = DecodeEngine(tiny_llama(vocab_size=100), length=16).generate([[1]] * 6).rows
    assert [row["input_ids"] for row in read(out)] == [row.tolist() for row in expected]
    assert list(out.parent.iterdir()) == [out]

    source = GeneralSamples(str(out), num_samples=6, max_tokens=16, tokenizer=tiny_tokenizer())

    class FakeTrainer:
        datamodule = None

    source.prepare(FakeTrainer(), torch.nn.Module(), 0)  # type: ignore[arg-type]
    rows = [source.row(i).content["input_ids"].tolist() for i in range(6)]
    assert sorted(rows) == sorted(row.tolist() for row in expected)


def test_parts_of_one_set(folder: Path, tmp_path: Path) -> None:
    assert run(folder, tmp_path / "all.jsonl.gz") == 0
    assert run(folder, tmp_path / "end.jsonl", "--first-row", "4", "--batch-size", "2") == 0
    assert read(tmp_path / "end.jsonl")[:2] == read(tmp_path / "all.jsonl.gz")[4:]


def test_prompts_adapter_and_eos(folder: Path, tmp_path: Path) -> None:
    lora(tiny_llama(vocab_size=100)).save_pretrained(tmp_path / "adapter")
    out = tmp_path / "x.jsonl"
    extra = ["--adapter", str(tmp_path / "adapter"), "--prompt", "ab", "--prompt", "c", "--on-eos", "stop"]
    assert run(folder, out, *extra, "--temperature", "0.8", "--dtype", "float32", "--device", "cpu") == 0
    texts = [row["text"] for row in read(out)]
    assert [text[:2] for text in texts[0::2]] == ["ab"] * 3
    assert [text[:1] for text in texts[1::2]] == ["c"] * 3


def test_an_existing_file_is_kept(folder: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "x.jsonl"
    out.write_text("precious")
    assert run(folder, out) == 1
    assert "exists already" in capsys.readouterr().err
    assert out.read_text() == "precious"
    assert run(folder, out, "--force") == 0
    assert len(read(out)) == 6


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--num-samples", "0"], "`--num-samples 0`: must be at least 1"),
        (["--out", "x.txt"], "its name ends in .jsonl"),
        (["--length", "500"], "`length=500` is beyond the context"),
        (["--temperature", "0"], "`temperature=0.0`"),
        (["--model", "no/such/folder"], "no/such/folder"),
    ],
)
def test_refusals(folder: Path, tmp_path: Path, capsys: Any, extra: list[str], message: str) -> None:
    assert run(folder, tmp_path / "x.jsonl", *extra) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "x.jsonl").exists()


def test_a_tokenizer_without_bos(tmp_path: Path, capsys: Any) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = None
    tiny_llama(vocab_size=100).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert run(tmp_path, tmp_path / "x.jsonl") == 1
    assert "has no BOS token" in capsys.readouterr().err
