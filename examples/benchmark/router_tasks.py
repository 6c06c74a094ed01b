# SPDX-License-Identifier: Apache-2.0
"""The router benchmark on real tasks: where features alone send prompts, and what a stream of tasks scored."""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import compare_table
import torch
from torch import Tensor

from lightning_cl.routing import AnalyticRouter, RoutedForward
from lightning_cl.routing.features import find_feature_layer
from lightning_cl.routing.statistics import RouterStatistics

Result = dict[str, Any]
ORDER = ["dbpedia", "amazon", "agnews", "qqp", "sst2", "mnli", "cb", "copa", "imdb", "boolq", "wic"]


# ---------------------------------------------------------------------- rows


def read(folder: Path, name: str, split: str, limit: int) -> list[dict[str, Any]]:
    """Rows of one task; some sets hold unlabelled rows, whose answer is none of the options."""
    with gzip.open(folder / f"{name}.{split}.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return [row for row in rows if row["answer"] in row["options"]][:limit]


def names_of(options: Any) -> list[str]:
    """The tasks that are there, in the order of the stream."""
    there = [name for name in ORDER if (options.data / f"{name}.train.jsonl.gz").is_file()]
    return [name for name in there if options.only is None or name in options.only]


def without_instruction(prompt: str) -> str:
    """The prompt's own text: no question, no list of options, no "Answer:". The names of its fields stay."""
    lines = prompt.removesuffix("Answer:").strip().split("\n")
    premise = re.match(r'Which sentence is the (?:effect|cause) of "(.*)"\? Choose one between A and B\.$', lines[0])
    if premise:
        lines[0] = premise[1]
    elif lines[0].endswith("Choose one from the option."):
        lines = lines[1:]
    return "\n".join(line for line in lines if not line.startswith("Option:"))


def bare_text(prompt: str) -> str:
    """Without instruction and without the names of fields, which give a task away as well ("sentence 1:", "Title:")."""
    field = r"^(?:Title|Text|sentence [12]|first sentence|second sentence|question|passage|word|A|B): *"
    return re.sub(field, "", without_instruction(prompt), flags=re.MULTILINE)


def one_instruction(prompt: str) -> str:
    """The prompt's own text under one instruction that all tasks share."""
    return f"Read the following and answer with one of the labels.\n{without_instruction(prompt)}\nAnswer:"


WAYS: dict[str, Callable[[str], str]] = {
    "as_given": str,
    "one_instruction": one_instruction,
    "no_instruction": without_instruction,
    "bare_text": bare_text,
}


# ---------------------------------------------------------------------- parts


def routing(device: str, options: Any) -> Result:
    """Routing accuracy by stage from the features alone: prompts as given, and with less and less that names the task."""
    from transformers import AutoModelForCausalLM

    from lightning_cl.data import Collator, Encoder, load_tokenizer

    encoder = Encoder(load_tokenizer(options.model), max_length=384)
    collate = Collator(encoder.pad_token_id)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).to(device).eval()
    layer = find_feature_layer(model)
    reader = RoutedForward(model, layer)

    def pooled(texts: Sequence[str]) -> Tensor:
        rows = [encoder.encode_eval({"prompt": text, "answer": "."}, "exact_match") for text in texts]
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
        found: list[Tensor] = []
        for start in range(0, len(rows), 64):
            batch = collate([rows[i] for i in order[start : start + 64]])
            inputs = {k: batch[k].to(device) for k in ("input_ids", "attention_mask")}
            found.append(reader.features(inputs["attention_mask"].bool(), **inputs))
        return torch.cat(found)[torch.tensor(order).argsort()]

    names = names_of(options)
    result: Result = {"tasks": names, "feature_layer": layer, "width": options.width}
    rows = {(n, s): read(options.data, n, s, k) for n in names for s, k in (("train", options.rows), ("test", 500))}
    for way, change in WAYS.items():
        learner = RouterStatistics(options.width, "auto", seed=options.seed)
        held_out: list[Tensor] = []
        stages = []
        for k, name in enumerate(names):
            learner.observe(
                pooled([change(row["prompt"]) for row in rows[name, "train"]]), learner.label(name, f"task_{k}")
            )
            held_out.append(pooled([change(row["prompt"]) for row in rows[name, "test"]]))
            learner.end_task()
            assert learner.expansion is not None
            router = AnalyticRouter(layer, learner.expansion, learner.classes, learner.weight()[0])
            sent = [router.route(h).names for h in held_out]
            right = [s.count(n) / len(s) for s, n in zip(sent, names, strict=False)]
            stages.append(round(100 * sum(right) / len(right), 2))
        wrong = {n: Counter(m for m in s if m != n).most_common(1) for n, s in zip(names, sent, strict=True)}
        result[way] = {
            "accuracy_by_stage": stages,
            "by_task": dict(zip(names, [round(100 * r, 1) for r in right], strict=True)),
            "most_often_mistaken_for": {n: f"{found[0][0]} ({found[0][1]})" for n, found in wrong.items() if found},
            "ridge": learner.total.ridge,
        }
    return result


# ---------------------------------------------------------------------- together


def stage_table(routing: Mapping[str, Any]) -> str:
    """Routing accuracies by stage, as a Markdown table, and by task below it."""
    lines = ["| prompts | routing accuracy after 1, 2, ... tasks |", "| --- | --- |"]
    lines += [f"| {way} | {' '.join(f'{a:.1f}' for a in routing[way]['accuracy_by_stage'])} |" for way in WAYS]
    lines += [f"{way}, by task: {routing[way]['by_task']}" for way in WAYS]
    return "\n".join(lines)


def stream_table(folder: Path) -> str:
    """What the streams of the comparison scored, for each order: by the router, by oracle, with one adapter for all tasks.

    Args:
        folder: results of ``compare.py run --methods sequential,routed``. ``routed`` evaluates its last model by oracle and
            with the base model too; an adapter is left alone after its task, so by oracle nothing can be forgotten.
    """
    by_order: dict[str, dict[str, list[Any]]] = {}
    for run in compare_table.read(folder)[0]:
        if not {"cost", "equal-time"} & set(run.folder.parts):
            made = compare_table.part(run)
            by_order.setdefault(made["order"], {}).setdefault(made["method"], []).append(run)
    tables = [_order_table(order, runs) for order, runs in by_order.items() if {"sequential", "routed"} & runs.keys()]
    return "\n".join(tables)


def _order_table(order: str, runs: Mapping[str, Sequence[Any]]) -> str:
    """:func:`stream_table` of one order, from its runs by method."""
    lines = [
        f"{order}:",
        "",
        "| method | average | BWT | learning accuracy | seeds |",
        "| --- | --- | --- | --- | --- |",
    ]
    for method in ("sequential", "routed"):
        if found := [compare_table.figures(run) for run in runs.get(method, ())]:
            columns = ("average", "backward_transfer", "learning_accuracy")
            cells = [_mean([figures[column] for figures in found]) for column in columns]
            lines.append(f"| {method} | {' | '.join(cells)} | {len(found)} |")
    if routed := [(run.document["routing"], compare_table.part(run)["tasks"]) for run in runs.get("routed", ())]:
        for mode, rest in (("oracle", "0 by construction | -"), ("base", "- | -")):
            averages = [100 * sum(found["scores"][mode][t] for t in tasks) / len(tasks) for found, tasks in routed]
            lines.append(f"| {mode} | {_mean(averages)} | {rest} | {len(averages)} |")
        last = [100 * max(found["accuracy"].items(), key=lambda item: int(item[0]))[1] for found, _ in routed]
        lines += ["", f"Routing accuracy after the last task: {_mean(last)} %.", ""]
    return "\n".join(lines)


def _mean(values: Sequence[float | None]) -> str:
    return compare_table.Mean.of(values).text()


def tiny_assets(folder: Path) -> Path:
    """A random model, a tokenizer of single characters and two tasks, to run every part without any file."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocab = {t: i for i, t in enumerate(["<pad>", "<s>", "</s>", "<unk>", "\n", *[chr(c) for c in range(32, 127)]])}
    raw = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    raw.decoder = decoders.Fuse()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=raw, model_max_length=512, **special).save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    for name, letters in (("sst2", "abc"), ("qqp", "123")):
        for split in ("train", "test"):
            lines = [
                {
                    "prompt": f"Is it {letters[i % 3] * (3 + i % 4)}?\nAnswer:",
                    "answer": letters[0],
                    "options": list(letters),
                }
                for i in range(12)
            ]
            with gzip.open(folder / f"{name}.{split}.jsonl.gz", "wt") as file:
                file.write("\n".join(json.dumps(line) for line in lines))
    return folder
