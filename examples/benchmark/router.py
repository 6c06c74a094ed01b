# SPDX-License-Identifier: Apache-2.0
"""Measures RLSRouterFitter: its mathematics, its cost inside a pass, many tasks, and routing on real tasks.

    python examples/benchmark/router.py --out router.json                      # one GPU, without a real model
    python examples/benchmark/router.py --parts routing tasks --model FOLDER --data FOLDER --out router_tasks.json
    python examples/benchmark/router.py --tiny --out tiny.json                 # end to end on a CPU, in seconds

``--data`` is a folder of ``NAME.train.jsonl.gz`` and ``NAME.test.jsonl.gz`` (rows of prompt, answer and options).
"""

from __future__ import annotations

import argparse
import gzip
import json
import logging
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_cl.functional import RecursiveLeastSquares
from lightning_cl.routing import AdapterBank, AnalyticRouter, Expansion, RoutedForward
from lightning_cl.routing.features import find_feature_layer
from lightning_cl.routing.router import RouteClass
from lightning_cl.routing.statistics import RouterStatistics

ORDER = ["dbpedia", "amazon", "agnews", "qqp", "sst2", "mnli", "cb", "copa", "imdb", "boolq", "wic"]
PARTS = ["recursion", "fit", "numerics", "overhead", "many_tasks", "routing", "tasks"]
Result = dict[str, Any]


def clock(device: str, run: Callable[[], Any], repeats: int = 1) -> float:
    """Median seconds of one run."""
    times = []
    for _ in range(repeats):
        if device != "cpu":
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if device != "cpu":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def released_update(inverse: Tensor, weight: Tensor, row: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The released recursion, one sample at a time, with its order of multiplication: E^3 a sample."""
    gain = 1.0 / (1.0 + row @ inverse @ row.T)
    inverse = inverse - gain * (inverse @ (row.T @ row) @ inverse)
    return inverse, weight + inverse @ row.T @ (target - row @ weight)


def rows_for(rows: int, width: int, device: str, dim: int = 64, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Features like the router's (ReLU of a random expansion), and labels of eight tasks."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(rows) % 8
    hidden = torch.randn(rows, dim, generator=generator) + 2 * torch.randn(8, dim, generator=generator)[labels]
    features = Expansion(dim, width)(hidden)
    return (scale * features).to(device), labels.to(device)


def recursion(device: str, tiny: bool) -> Result:
    """Our update against the released one: same features, float32, one thread."""
    width, samples = (200, 64) if tiny else (3000, 512)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    features, labels = rows_for(samples, width, "cpu")
    targets = torch.nn.functional.one_hot(labels).float()
    state = torch.eye(width) / 100.0, torch.zeros(width, 8)
    few = 4 if tiny else 2

    def theirs() -> None:
        inverse, weight = state
        for i in range(few):
            inverse, weight = released_update(inverse, weight, features[i : i + 1], targets[i : i + 1])

    per_sample = clock("cpu", theirs) / few
    found: Result = {"width": width, "released_s_per_sample": per_sample}
    for method in ("cholesky", "woodbury"):
        learner = RecursiveLeastSquares(width, ridge=100.0, method=method, dtype=torch.float32)

        def ours(learner: RecursiveLeastSquares = learner) -> Tensor:
            learner.update(features, labels)
            return learner.weight

        seconds = clock("cpu", ours) / samples
        found[method] = {"s_per_sample": seconds, "times_faster": per_sample / seconds}
    torch.set_num_threads(threads)
    found["ok"] = tiny or min(found[m]["times_faster"] for m in ("cholesky", "woodbury")) >= 100
    return found


def fit(device: str, tiny: bool) -> Result:
    """The whole fit of eight tasks against the time of its matrix products alone."""
    width, per_task, block = (256, 200, 100) if tiny else (10_000, 5_000, 1_000)
    blocks = [rows_for(block, width, device)[0] for _ in range(2)]
    counts = [min(block, per_task - start) for start in range(0, per_task, block)]

    def whole() -> RecursiveLeastSquares:
        learner = RecursiveLeastSquares(width, ridge=1.0)
        for task in range(8):
            for number, rows in enumerate(counts):
                learner.update(blocks[number % 2][:rows], torch.full((rows,), task, device=device))
        assert learner.weight.shape == (width, 8)
        return learner

    kind = torch.float64
    gram = torch.zeros(width, width, dtype=kind, device=device)

    def products() -> None:
        for _ in range(8):
            for number, rows in enumerate(counts):
                part = blocks[number % 2][:rows].to(kind)
                gram.addmm_(part.T, part)

    for run in (whole, products):
        run()  # libraries initialise
    seconds, alone = clock(device, whole), clock(device, products)
    learner = whole()
    solve = clock(device, lambda: RecursiveLeastSquares._factor(learner, learner.gram, 1.0))
    result = {"width": width, "rows": 8 * per_task, "fit_s": seconds, "products_s": alone, "one_factorisation_s": solve}
    return {**result, "ratio": seconds / alone, "ok": tiny or seconds / alone <= 1.5}


def numerics(device: str, tiny: bool) -> Result:
    """Relative error of W against the float64 joint solve, easy and hard; the released recursion beside it."""
    width, samples = (128, 200) if tiny else (1000, 2000)
    found: Result = {"width": width, "rows": samples, "ok": True}
    for ridge, scale, limit in ((0.1, 1.0, 1e-9), (1e-3, 30.0, 1e-3)):
        features, labels = rows_for(samples, width, "cpu", scale=scale)
        x, y = features.double(), torch.nn.functional.one_hot(labels).double()
        joint = torch.linalg.solve(x.T @ x + ridge * torch.eye(width, dtype=torch.float64), x.T @ y)
        entry: Result = {}
        for method in ("cholesky", "woodbury"):
            learner = RecursiveLeastSquares(width, ridge=ridge, method=method)
            for rows, wanted in zip(features.split(100), labels.split(100), strict=True):
                learner.update(rows.to(device), wanted.to(device))
            entry[method] = float((learner.weight.cpu() - joint).norm() / joint.norm())
        inverse, weight = torch.eye(width) / ridge, torch.zeros(width, 8)
        targets = y.float()
        for i in range(samples):  # the released update, in the cheap order
            row = features[i : i + 1]
            gain = inverse @ row.T
            inverse = inverse - gain @ gain.T / (1 + row @ gain)
            weight = weight + inverse @ row.T @ (targets[i : i + 1] - row @ weight)
        entry["released_float32"] = float((weight.double() - joint).norm() / joint.norm())
        found[f"ridge={ridge:g} scale={scale:g}"] = entry
        found["ok"] &= max(entry["cholesky"], entry["woodbury"]) <= limit
    return found


def routed_model(device: str, layers: int, hidden: int, vocab: int, adapters: int, dtype: torch.dtype) -> Any:
    """A random Llama with a bank of adapters."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=int(hidden * 3.5),
        num_hidden_layers=layers,
        num_attention_heads=max(2, hidden // 128),
        num_key_value_heads=max(1, hidden // 512),
    )
    torch.set_default_dtype(dtype)
    with torch.device(device):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    lora = LoraConfig(r=8, lora_alpha=32, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    peft = get_peft_model(model, lora, autocast_adapter_dtype=False)
    bank = AdapterBank(peft, find_feature_layer(peft))
    for k in range(adapters):
        bank.add(f"task_{k}")
    return peft, bank


def overhead(device: str, tiny: bool) -> Result:
    """Time that routing adds to a forward pass at batch 32: against the same pass with its routes given."""
    shape = (2, 32, 128) if tiny else (30, 1024, 49_152)
    length, width, tasks = (16, 64, 4) if tiny else (256, 4096, 4)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    model, bank = routed_model(device, *shape, tasks, dtype)
    bank.activate("task_0")
    model.eval()
    routed = RoutedForward(model, bank.feature_layer, bank).attach()
    batch = torch.randint(0, shape[2], (32, length), device=device)
    mask = torch.ones_like(batch)
    learner = RecursiveLeastSquares(width)
    expansion = Expansion(shape[1], width)
    learner.update(expansion(routed.features(mask.bool(), input_ids=batch)), torch.arange(32, device=device) % tasks)
    classes = [RouteClass(f"t{k}", f"task_{k}") for k in range(tasks)]
    routed.router = AnalyticRouter(bank.feature_layer, expansion, classes, learner.weight)

    @torch.no_grad()
    def forward() -> None:
        model(input_ids=batch, attention_mask=mask, logits_to_keep=1)

    forward()
    assert routed.last is not None
    names = routed.last.adapters
    times: dict[str, list[float]] = {"routed": [], "given": [], "one_adapter": []}
    for _ in range(3 if tiny else 30):  # in turn, so that clocks and caches favour none
        times["routed"].append(clock(device, forward))
        with routed.given(names):
            times["given"].append(clock(device, forward))
        with routed.paused():
            times["one_adapter"].append(clock(device, forward))
    found = {f"{name}_ms": 1e3 * statistics.median(values) for name, values in times.items()}
    ratio = found["routed_ms"] / found["given_ms"] - 1
    return {**found, "added": ratio, "used": len(set(names)), "ok": tiny or ratio <= 0.02}


def many_tasks(device: str, tiny: bool) -> Result:
    """Step time and GPU memory of training task 20 against training task 1, at an 8B shape."""
    shape = (2, 32, 128) if tiny else (32, 4096, 32_000)
    length = 16 if tiny else 512
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    model, bank = routed_model(device, *shape, 1, dtype)
    batch = torch.randint(0, shape[2], (2, length), device=device)

    def measure(task: str) -> tuple[float, int]:
        bank.activate(task)
        bank.offload(keep=[task])
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
        model.train()

        def step() -> None:
            model(input_ids=batch, labels=batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        for _ in range(3):
            step()
        seconds = clock(device, step, 3 if tiny else 15)
        return seconds, torch.cuda.memory_allocated() if device != "cpu" else 0

    first_s, first = measure("task_0")
    adapter = sum(p.numel() * p.element_size() for p in bank.parameters("task_0").values())
    for k in range(1, 20):
        bank.add(f"task_{k}")
    last_s, last = measure("task_19")
    again_s, _ = measure("task_19")
    extra = (last - first) / adapter
    slower = min(last_s, again_s) / first_s - 1
    result = {"adapter_mb": adapter / 1e6, "first_step_s": first_s, "twentieth_step_s": last_s, "slower": slower}
    return {**result, "extra_adapters_on_device": extra, "ok": tiny or (extra <= 2 and slower <= 0.03)}


def read(folder: Path, name: str, split: str, limit: int) -> list[dict[str, Any]]:
    """Rows of one task; some sets hold unlabelled rows, whose answer is none of the options."""
    with gzip.open(folder / f"{name}.{split}.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return [row for row in rows if row["answer"] in row["options"]][:limit]


def without_instruction(prompt: str) -> str:
    """The prompt's own text: no question, no list of options, no "Answer:"."""
    lines = prompt.removesuffix("Answer:").strip().split("\n")
    if lines[0].endswith("Choose one from the option."):
        lines = lines[1:]
    return "\n".join(line for line in lines if not line.startswith("Option:"))


def same_instruction(prompt: str) -> str:
    """The prompt's own text under one instruction that all tasks share."""
    return f"Read the following and answer with one of the labels.\n{without_instruction(prompt)}\nAnswer:"


def routing(device: str, model_name: str, data: Path, rows: int, tests: int, width: int) -> Result:
    """Routing accuracy by stage, from the features alone, with, without and under one shared instruction."""
    from transformers import AutoModelForCausalLM

    from lightning_cl.data import Collator, Encoder, load_tokenizer

    encoder = Encoder(load_tokenizer(model_name), max_length=384)
    collate = Collator(encoder.pad_token_id)
    model = AutoModelForCausalLM.from_pretrained(model_name, dtype=torch.float32).to(device).eval()
    layer = find_feature_layer(model)
    reader = RoutedForward(model, layer)

    def features(texts: list[str]) -> Tensor:
        found = []
        for start in range(0, len(texts), 32):
            part = [encoder.encode_eval({"prompt": t, "answer": "."}, "exact_match") for t in texts[start : start + 32]]
            batch = collate(part)
            inputs = {k: batch[k].to(device) for k in ("input_ids", "attention_mask")}
            found.append(reader.features(inputs["attention_mask"].bool(), **inputs))
        return torch.cat(found)

    names = [name for name in ORDER if (data / f"{name}.train.jsonl.gz").is_file()]
    result: Result = {"tasks": names, "feature_layer": layer, "width": width, "ok": True}
    ways: dict[str, Callable[[str], str]] = {"as_given": str, "no_instruction": without_instruction}
    for way, change in {**ways, "one_instruction": same_instruction}.items():
        learner = RouterStatistics(width, "auto", seed=0)
        held_out: list[Tensor] = []
        stages = []
        for k, name in enumerate(names):
            prompts = [
                [change(r["prompt"]) for r in read(data, name, s, n)] for s, n in (("train", rows), ("test", tests))
            ]
            learner.observe(features(prompts[0]), learner.label(name, f"task_{k}"))
            held_out.append(features(prompts[1]))
            learner.end_task()
            assert learner.expansion is not None
            router = AnalyticRouter(layer, learner.expansion, learner.classes, learner.weight()[0])
            right = [router.route(h).names.count(n) / len(h) for h, n in zip(held_out, names, strict=False)]
            stages.append(round(100 * sum(right) / len(right), 2))
        result[way] = {
            "accuracy_by_stage": stages,
            "by_task": dict(zip(names, [round(100 * r, 1) for r in right], strict=True)),
        }
        result[way]["ridge"] = learner.total.ridge
    return result


def tasks(device: str, model_name: str, data: Path, rows: int, tests: int, width: int) -> Result:
    """Average and BWT of the stream: adapters routed, by oracle, base model, and one adapter trained on all in turn."""
    import lightning.pytorch as pl

    from lightning_cl import CausalLMModule, Task, TaskStream, fit_stream
    from lightning_cl.callbacks import RLSRouterFitter

    names = [name for name in ORDER if (data / f"{name}.train.jsonl.gz").is_file()]
    found: Result = {"tasks": names, "rows": rows, "tests": tests, "ok": True}
    for method in ("sequential", "routed"):
        pl.seed_everything(0)
        stream = TaskStream(
            [
                Task(n, read(data, n, "train", rows), test=read(data, n, "test", tests), metric="accuracy")
                for n in names
            ],
            batch_size=32,
            eval_batch_size=64,
            max_length=384,
        )
        module = CausalLMModule(model_name, lora={"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}, lr=1e-3)
        router = RLSRouterFitter(expansion_dim=width)
        trainer = pl.Trainer(
            accelerator="cpu" if device == "cpu" else "gpu",
            devices=1,
            max_epochs=1,
            precision="32-true" if device == "cpu" else "bf16-mixed",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            callbacks=[router] if method == "routed" else [],
        )
        start = time.perf_counter()
        scores = fit_stream(trainer, module, stream).compute()
        found[method] = {
            "average": scores["average"],
            "bwt": scores["backward_transfer"],
            "s": time.perf_counter() - start,
        }
        if method == "routed":
            accuracies = [router.confusion.accuracy(stage) for stage in sorted(router.confusion.stages)]
            found[method]["routing_accuracy_by_stage"] = accuracies
            found[method]["confusion"] = router.confusion.table()
            for mode in ("oracle", "base"):
                with router.evaluating_with(mode):
                    logged = trainer.test(module, datamodule=stream, verbose=False)
                values = [v for row in logged for k, v in row.items() if k.startswith("test_accuracy")]
                found[mode] = {"average": sum(values) / len(values), "bwt": 0.0}
    return found


def tiny_assets(folder: Path) -> tuple[str, Path]:
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
    return str(folder), folder


def show(name: str, value: Any, depth: int = 0) -> None:
    """Print one part as an indented list."""
    if isinstance(value, dict):
        print(f"{'  ' * depth}{name}")
        for key, inner in value.items():
            show(key, inner, depth + 1)
    elif isinstance(value, str) and "\n" in value:
        print(f"{'  ' * depth}{name}\n{value}")
    else:
        print(f"{'  ' * depth}{name}: {f'{value:.5g}' if isinstance(value, float) else value}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="where to write the JSON")
    parser.add_argument("--tiny", action="store_true", help="small sizes and a random model, on any machine")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=None, help="default: all that need no files")
    parser.add_argument("--model", default=None, help="folder of a causal LM (parts routing and tasks)")
    parser.add_argument("--data", type=Path, default=None, help="folder of the tasks (parts routing and tasks)")
    parser.add_argument("--rows", type=int, default=640, help="train rows a task")
    parser.add_argument("--tests", type=int, default=100, help="test rows a task")
    parser.add_argument("--width", type=int, default=4096, help="expansion_dim of the parts routing and tasks")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    device = "cuda" if torch.cuda.is_available() and not arguments.tiny else "cpu"
    chosen = arguments.parts or (PARTS if arguments.tiny or arguments.data else PARTS[:5])
    results: Result = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "torch": torch.__version__,
    }
    torch.manual_seed(0)
    if arguments.tiny:
        import tempfile

        arguments.model, arguments.data = tiny_assets(Path(tempfile.mkdtemp()))
        arguments.rows, arguments.tests, arguments.width = 12, 6, 64
    if {"routing", "tasks"} & set(chosen) and not (arguments.model and arguments.data):
        parser.error("the parts `routing` and `tasks` need --model and --data")
    for name in chosen:
        part: Callable[..., Result] = globals()[name]
        if name in ("routing", "tasks"):
            options = arguments.model, arguments.data, arguments.rows, arguments.tests, arguments.width
            results[name] = part(device, *options)
        else:
            results[name] = part(device, arguments.tiny)
        show(name, results[name])
        if device == "cuda":
            torch.cuda.empty_cache()
        arguments.out.write_text(json.dumps(results, indent=1))
    failed = [name for name in chosen if not results[name]["ok"]]
    print("failed: " + ", ".join(failed) if failed else "all targets met")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
