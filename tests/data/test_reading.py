# SPDX-License-Identifier: Apache-2.0
"""Sources of rows, and the errors of bad ones."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import datasets
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_cl.data import DataError, check_metric, read_rows, read_trace

PROMPT = {"prompt": "2+2=", "answer": "4"}
OPTIONS = {"prompt": "Is it?", "answer": "yes", "options": ["yes", "no"]}
TEXT = {"text": "Some words."}
MESSAGES = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}


def write(path: Path, lines: list[str]) -> str:
    data = "\n".join(lines).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return str(path)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_jsonl_plain_and_compressed(tmp_path, name):
    rows = [PROMPT, OPTIONS, TEXT, MESSAGES]
    path = write(tmp_path / name, [json.dumps({**row, "id": 7}) for row in rows] + [""])
    assert read_rows(path) == rows
    assert read_rows(Path(path)) == rows


def test_byte_order_mark_and_blank_lines_are_skipped(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(TEXT).encode() + b"\r\n\r\n" + json.dumps(TEXT).encode())
    assert read_rows(str(path)) == [TEXT, TEXT]


BAD_LINES = {
    '{"text": "unfinished': r"line 2: not JSON \(.*column 10\), found '\{\"text\": \"unfinished'",
    "[1, 2]": r"line 2: found a list where a row",
    '{"question": "q", "answer": "a"}': r"line 2: found the keys \['answer', 'question'\], but a row needs `text`",
    '{"prompt": "q", "answer": 4}': r"line 2: `answer` must be a string, found a number \(4\)",
    '{"prompt": "q", "answer": " "}': r"line 2: `answer` is empty",
    '{"text": ""}': r"line 2: `text` is empty",
    '{"prompt": "q", "answer": "c", "options": ["a", "b"]}': r"answer 'c' is not among the options \['a', 'b'\]",
    '{"prompt": "q", "answer": "a", "options": ["a"]}': r"`options` must be a list of at least two strings",
    '{"prompt": "q", "answer": "a", "options": ["a", "a"]}': r"`options` holds an option twice",
    '{"messages": []}': r"`messages` must be a list of turns, found \[\]",
    '{"messages": [{"content": "a"}]}': r"turn 0 of `messages` must be an object with a `role`",
    '{"messages": [{"role": "assistant"}]}': r"turn 0 of `messages` \(assistant\) has neither `content` nor `tool_calls`",
    '{"messages": [{"role": "user", "content": "a"}]}': r"no turn of the role 'assistant'.*\['user'\]",
}


@pytest.mark.parametrize("line", BAD_LINES)
def test_bad_line_names_file_and_line(tmp_path, line):
    path = write(tmp_path / "bad.jsonl", [json.dumps(TEXT), line])
    with pytest.raises(
        DataError, match=f"bad.jsonl, .*{BAD_LINES[line]}" if "line 2" in BAD_LINES[line] else BAD_LINES[line]
    ):
        read_rows(path)


def test_up_to_five_bad_lines_at_once(tmp_path):
    path = write(tmp_path / "bad.jsonl", [json.dumps(TEXT)] + ["nonsense"] * 8)
    with pytest.raises(DataError) as caught:
        read_rows(path)
    assert [f"line {n}:" in str(caught.value) for n in range(1, 9)] == [False] + [True] * 5 + [False] * 2


def test_error_is_configuration_and_value_error(tmp_path):
    path = write(tmp_path / "bad.jsonl", ["{"])
    with pytest.raises(MisconfigurationException, match="line 1"):
        read_rows(path)
    with pytest.raises(ValueError, match="line 1"):
        read_rows(path)


def test_empty_sources(tmp_path):
    with pytest.raises(DataError, match=r"empty.jsonl: no rows. A task needs at least one row"):
        read_rows(write(tmp_path / "empty.jsonl", []))
    with pytest.raises(DataError, match="the list of rows: no rows"):
        read_rows([])
    with pytest.raises(DataError, match=r"datasets.Dataset: no rows"):
        read_rows(datasets.Dataset.from_dict({"text": []}))


def test_missing_file_names_its_neighbours(tmp_path):
    write(tmp_path / "train.jsonl", [json.dumps(TEXT)])
    with pytest.raises(DataError, match=r"trian.jsonl: no such file. Did you mean train.jsonl"):
        read_rows(str(tmp_path / "trian.jsonl"))
    with pytest.raises(DataError, match="its folder does not exist either"):
        read_rows(str(tmp_path / "nowhere" / "train.jsonl"))


def test_unknown_kinds_of_source(tmp_path):
    with pytest.raises(DataError, match=r"rows.csv: unknown kind of file. Rows are read from .jsonl"):
        read_rows(str(tmp_path / "rows.csv"))
    with pytest.raises(DataError, match="found int as a source of rows"):
        read_rows(5)


def test_damaged_gzip_and_wrong_encoding(tmp_path):
    damaged = tmp_path / "cut.jsonl.gz"
    damaged.write_bytes(gzip.compress(b'{"text": "a"}\n' * 500)[:60])
    with pytest.raises(DataError, match=r"cut.jsonl.gz, after line \d+: no gzip file, or damaged"):
        read_rows(str(damaged))
    (tmp_path / "no.jsonl.gz").write_bytes(b"plain")
    with pytest.raises(DataError, match="no gzip file, or damaged"):
        read_rows(str(tmp_path / "no.jsonl.gz"))
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xe9"}\n')
    with pytest.raises(DataError, match=r"latin.jsonl, line 2: not UTF-8"):
        read_rows(str(tmp_path / "latin.jsonl"))


def test_trace_form(tmp_path):
    rows = [{"prompt": f"q{i}", "answer": f"a{i}"} for i in range(3)]
    for name, part in (("train", rows), ("eval", rows[:2]), ("test", rows[:1])):
        (tmp_path / f"{name}.json").write_text(json.dumps(part))
    assert read_rows(str(tmp_path / "train.json")) == rows
    assert read_trace(tmp_path) == {"train": rows, "val": rows[:2], "test": rows[:1]}
    (tmp_path / "eval.json").unlink()
    assert set(read_trace(tmp_path)) == {"train", "test"}


def test_bad_trace_files(tmp_path):
    with pytest.raises(DataError, match=r"found none of train.json, eval.json, test.json"):
        read_trace(tmp_path)
    (tmp_path / "train.json").write_text('[{"prompt": "a",\n "answer" "b"}]')
    with pytest.raises(DataError, match=r"train.json, line 2: not JSON"):
        read_trace(tmp_path)
    (tmp_path / "train.json").write_text('{"prompt": "a"}')
    with pytest.raises(DataError, match=r"found dict at the top of the file, but a `.json` file holds one list"):
        read_trace(tmp_path)
    (tmp_path / "train.json").write_text('[{"prompt": "a", "answer": "b"}, {"prompt": "a"}]')
    with pytest.raises(DataError, match=r"train.json, row 1: found the keys \['prompt'\]"):
        read_trace(tmp_path)


def test_hugging_face_objects():
    rows = read_rows(datasets.Dataset.from_list([{**OPTIONS, "idx": 1}, {**OPTIONS, "idx": 2}]))
    assert rows == [OPTIONS, OPTIONS]
    # Arrow gives every message every key; absent ones must not reach the template as None.
    mixed = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "name": "x"}]}]
    assert read_rows(datasets.Dataset.from_list(mixed)) == mixed
    images = datasets.Dataset.from_dict({"pixels": [[0.0, 1.0]], "label": [3]})
    assert read_rows(images) is images


def test_bad_hugging_face_objects():
    split = datasets.Dataset.from_list([TEXT])
    with pytest.raises(DataError, match=r"DatasetDict` with the splits \['test', 'train'\].*`dataset\['test'\]`"):
        read_rows(datasets.DatasetDict(train=split, test=split))
    with pytest.raises(DataError, match=r"found the columns \['question', 'answer'\].*rename_column"):
        read_rows(datasets.Dataset.from_dict({"question": ["a"], "answer": ["b"]}))
    with pytest.raises(DataError, match="row 1: the answer 'x' is not among"):
        read_rows(datasets.Dataset.from_list([OPTIONS, {**OPTIONS, "answer": "x"}]))


def test_rows_without_text_are_left_out_with_a_warning():
    with pytest.warns(UserWarning, match="1 of 3 rows hold no text"):
        assert len(read_rows(datasets.Dataset.from_dict({"text": ["a", " ", "b"]}))) == 2


@pytest.fixture
def hub_copy(tmp_path, monkeypatch):
    """A local copy of a hub repository `owner/name` with two configurations and two splits."""
    root = tmp_path / "owner" / "name"
    root.mkdir(parents=True)
    for config in ("easy", "hard"):
        for split in ("train", "test"):
            row = {"prompt": f"{config} {split}", "answer": "a"}
            write(root / f"{config}_{split}.jsonl", [json.dumps(row)] * (3 if split == "train" else 2))
    configs = "".join(
        f"- config_name: {c}\n  data_files:\n  - split: train\n    path: {c}_train.jsonl\n"
        f"  - split: test\n    path: {c}_test.jsonl\n"
        for c in ("easy", "hard")
    )
    (root / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    return root


def test_hub_name_through_load_dataset(hub_copy):
    assert read_rows("hf://owner/name/easy") == [{"prompt": "easy train", "answer": "a"}] * 3
    assert read_rows("hf://owner/name/hard:test") == [{"prompt": "hard test", "answer": "a"}] * 2
    assert read_rows("hf://owner/name/hard:train[:1]") == [{"prompt": "hard train", "answer": "a"}]


def test_bad_hub_names(hub_copy):
    with pytest.raises(DataError, match=r"hf://owner/name/none: cannot be loaded \(ValueError: .*none"):
        read_rows("hf://owner/name/none")
    with pytest.raises(DataError, match=r"hf://owner/name/easy:dev: cannot be loaded .*Check owner, name"):
        read_rows("hf://owner/name/easy:dev")
    with pytest.raises(DataError, match=r"is not a hub name. Write `hf://owner/name`"):
        read_rows("hf://a/b/c/d")
    with pytest.raises(DataError, match="is not a hub name"):
        read_rows("hf://")


def test_lists_and_datasets():
    assert read_rows(["one", "two"]) == [{"text": "one"}, {"text": "two"}]
    with pytest.raises(DataError, match="the list of rows, row 1: found the keys"):
        read_rows([TEXT, {"a": 1}])
    tensors = torch.utils.data.TensorDataset(torch.zeros(3))
    assert read_rows(tensors) is tensors
    stream = datasets.Dataset.from_list([TEXT]).to_iterable_dataset()
    assert read_rows(stream) is stream


def test_check_metric():
    check_metric([OPTIONS], "accuracy", "a")
    check_metric([TEXT, PROMPT], "loss", "a")
    with pytest.raises(DataError, match=r"task a, row 1: the metric 'accuracy' needs .*\['answer', 'prompt'\]"):
        check_metric([OPTIONS, PROMPT], "accuracy", "task a")
    with pytest.raises(DataError, match="the metric 'rouge_l' needs an answer to compare with"):
        check_metric([TEXT], "rouge_l", "a")
    with pytest.raises(DataError, match="unknown metric 'acuracy': use one of"):
        check_metric([OPTIONS], "acuracy", "a")
    unanswered = {"messages": [*MESSAGES["messages"], {"role": "user", "content": "?"}]}
    with pytest.raises(DataError, match="needs an assistant's turn at the end"):
        check_metric([unanswered], "exact_match", "a")
