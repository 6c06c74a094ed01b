# SPDX-License-Identifier: Apache-2.0
"""What LoRAInterpolator costs, and which of its parts help.

python examples/benchmark/interpolator.py --out interpolator.json      # step time and memory: one GPU, two minutes
python examples/benchmark/interpolator.py --only fsdp --devices 2 --out fsdp.json
python examples/benchmark/interpolator.py --only ablation --data FOLDER --model FOLDER --out ablation.json
python examples/benchmark/interpolator.py --tiny --out t.json          # two CPU cores: runs all but fsdp, means nothing

average      the average alone on LoRA rank 16 in the shape of Llama-3-8B (random weights): step time and memory against
             the same run without it and against Lightning's EMAWeightAveraging.
consistency  the slow forward on 8 memory rows to 32: its time against the forward arithmetic that it must do.
fsdp         the same under FSDP2, where the blocks are gathered once more.
ablation     three text tasks in a row: teachers, decays, the set that is evaluated, the form of the term. FOLDER holds
             NAME.train.jsonl[.gz] and NAME.test.jsonl[.gz]. Finished runs in --out are kept, so it may be split up.

Times are medians over alternating short runs inside Lightning's Trainer; a ratio is the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_cl import weights
from lightning_cl.callbacks import LoRAInterpolator, ReplayMixer
from lightning_cl.replay import EpisodicMemory, GeneralSamples

SHAPES: dict[str, dict[str, Any]] = {
    "llama-8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "tiny": {
        "vocab_size": 128,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32


# ------------------------------------------------------------------------------------------------- step time


def sync() -> None:
    """Wait for the device."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def make_model(shape: str) -> Any:
    """A causal LM with random weights and LoRA rank 16 on the attention projections, on the device."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(DTYPE)
    with torch.device(DEVICE):
        model = LlamaForCausalLM(LlamaConfig(**SHAPES[shape], tie_word_embeddings=False))
    torch.set_default_dtype(before)
    config = LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    return get_peft_model(model, config)


def make_rows(shape: str, count: int, tokens: int, seed: int) -> list[dict[str, Tensor]]:
    """Rows of random tokens, all of one length."""
    ids = torch.randint(0, SHAPES[shape]["vocab_size"], (count, tokens), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row.clone()} for row in ids]


class Plain(pl.LightningModule):
    """An ordinary LightningModule."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.model(**batch, use_cache=False).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-5, fused=DEVICE == "cuda")

    def cpu(self) -> Plain:
        # Lightning moves the module to the CPU after each fit, which takes longer than these runs.
        return self


class Stopwatch(pl.Callback):
    """Seconds a step after the first few, and the peak of the memory."""

    def __init__(self, warmup: int) -> None:
        self.warmup, self.seconds, self.peak, self._start, self._done = warmup, 0.0, 0, 0.0, 0

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._done += 1
        if self._done == self.warmup:
            sync()
            if DEVICE == "cuda":
                torch.cuda.reset_peak_memory_stats()
            self._start = time.perf_counter()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        sync()
        self.seconds = (time.perf_counter() - self._start) / (self._done - self.warmup)
        self.peak = torch.cuda.max_memory_allocated() if DEVICE == "cuda" else 0


def run(module: Any, loader: DataLoader, args: argparse.Namespace, callbacks: list[Any], **kwargs: Any) -> Stopwatch:
    """One short training run."""
    watch = Stopwatch(args.warmup)
    settings = {"accelerator": "gpu" if DEVICE == "cuda" else "cpu", "devices": 1, **kwargs}
    if "strategy" in settings:
        settings["strategy"] = settings["strategy"]()  # one object serves one Trainer
    trainer = pl.Trainer(
        max_steps=args.steps,
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[*callbacks, watch],
        **settings,
    )
    trainer.fit(module, loader)
    # A copy of the whole model, as Lightning's average keeps one, must be gone before the next run.
    del trainer, callbacks
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
    return watch


def rounds(variants: dict[str, Any], count: int) -> dict[str, list[Stopwatch]]:
    """Run the variants in turn, in alternating order; the first round warms up."""
    watches: dict[str, list[Stopwatch]] = {name: [] for name in variants}
    for index in range(count + 1):
        for name in list(variants)[:: 1 if index % 2 else -1]:
            watch = variants[name]()
            if index:
                watches[name].append(watch)
    return watches


def ratio(numerator: list[Stopwatch], denominator: list[Stopwatch]) -> float:
    """Median of the rounds' time ratios."""
    return statistics.median(a.seconds / b.seconds for a, b in zip(numerator, denominator, strict=True))


def milliseconds(watches: list[Stopwatch]) -> float:
    """Median of a step."""
    return 1e3 * statistics.median(w.seconds for w in watches)


def gib(watches: list[Stopwatch]) -> float:
    """Peak of the memory."""
    return max(w.peak for w in watches) / 2**30


def check_average() -> None:
    """One update is the formula."""
    model = Plain(make_model("tiny"))
    callback = LoRAInterpolator(decay=0.25, warmup=False, consistency_weight=0, evaluate_with="fast")
    start = {n: p.detach().float().clone() for n, p in weights.trainable(model).items()}
    args = argparse.Namespace(steps=1, warmup=0)
    run(model, DataLoader(make_rows("tiny", 4, 8, 0), batch_size=4), args, [callback])
    slow = callback.slow_weights()
    for name, parameter in weights.trainable(model).items():
        expected = 0.25 * start[name] + 0.75 * parameter.detach().float().to(start[name].device)
        torch.testing.assert_close(slow[name], expected.cpu(), rtol=0, atol=1e-6)


def measure_average(args: argparse.Namespace) -> dict[str, Any]:
    """The average alone, and Lightning's own, in the same rounds."""
    from lightning.pytorch.callbacks import EMAWeightAveraging

    check_average()
    module = Plain(make_model(args.shape))
    loader = DataLoader(make_rows(args.shape, args.rows * 4, args.tokens, 1), batch_size=args.rows)
    trainable = sum(p.numel() for p in weights.trainable(module).values())
    callbacks: list[LoRAInterpolator] = []

    def ours() -> Stopwatch:
        callback = LoRAInterpolator(decay=0.999, consistency_weight=0, evaluate_with="fast")
        callbacks.append(callback)
        return run(module, loader, args, [callback])

    variants: dict[str, Any] = {
        "plain": lambda: run(module, loader, args, []),
        "ours": ours,
        "lightning": lambda: run(module, loader, args, [EMAWeightAveraging(decay=0.999)]),
    }
    watches = rounds(variants, args.rounds)
    held = sum(shard.numel() * shard.element_size() for shard in callbacks[-1]._average.shards.values())
    return {
        "shape": args.shape,
        "rows": args.rows,
        "tokens": args.tokens,
        "trainable": trainable,
        "bytes_a_parameter": held / trainable,
        "plain_ms": milliseconds(watches["plain"]),
        "ours_ms": milliseconds(watches["ours"]),
        "lightning_ms": milliseconds(watches["lightning"]),
        "ours_ratio": ratio(watches["ours"], watches["plain"]),
        "lightning_ratio": ratio(watches["lightning"], watches["plain"]),
        "plain_peak_gib": gib(watches["plain"]),
        "ours_peak_gib": gib(watches["ours"]),
        "lightning_peak_gib": gib(watches["lightning"]),
    }


def time_forward(module: Plain, rows: list[dict[str, Tensor]], repeats: int = 5) -> float:
    """Milliseconds of a forward of the backbone on these rows, without gradient."""
    batch = {k: torch.stack([row[k] for row in rows]).to(DEVICE) for k in ("input_ids", "attention_mask")}
    backbone = module.model.to(DEVICE).get_base_model().model.eval()
    times = []
    with torch.no_grad():
        for _ in range(repeats + 2):
            sync()
            start = time.perf_counter()
            backbone(**batch, use_cache=False)
            sync()
            times.append(time.perf_counter() - start)
    module.model.train()
    return 1e3 * statistics.median(times[2:])


def measure_consistency(args: argparse.Namespace, **kwargs: Any) -> dict[str, Any]:
    """The slow forward and the term on top of the same replay."""
    module = kwargs.pop("module", None) or Plain(make_model(args.shape))
    tokens, rows, replayed = args.replay_tokens, 32 if not args.tiny else 8, 8 if not args.tiny else 2
    loader = DataLoader(make_rows(args.shape, rows * 4, tokens, 1), batch_size=rows)
    memory = make_rows(args.shape, 64, tokens, 2)

    def mixer() -> ReplayMixer:
        return ReplayMixer(GeneralSamples(memory, num_samples=len(memory), max_tokens=tokens), rows_per_batch=replayed)

    def with_layers(layers: Any) -> Stopwatch:
        callback = LoRAInterpolator(decay=0.999, layers=layers, evaluate_with="fast")
        return run(module, loader, args, [mixer(), callback], **kwargs)

    watches = rounds(
        {
            "replay": lambda: run(module, loader, args, [mixer()], **kwargs),
            "last": lambda: with_layers("last"),
            "all": lambda: with_layers("all"),
        },
        args.rounds,
    )
    figures = {
        "shape": args.shape,
        "rows": rows,
        "memory_rows": replayed,
        "tokens": tokens,
        "replay_ms": milliseconds(watches["replay"]),
        "last_ms": milliseconds(watches["last"]),
        "all_ms": milliseconds(watches["all"]),
        "replay_peak_gib": gib(watches["replay"]),
        "last_peak_gib": gib(watches["last"]),
        "all_peak_gib": gib(watches["all"]),
    }
    if not kwargs:
        whole = time_forward(module, make_rows(args.shape, rows, tokens, 3))
        part = time_forward(module, make_rows(args.shape, replayed, tokens, 3))
        must = whole * replayed / rows
        figures |= {"forward_of_all_rows_ms": whole, "forward_of_memory_rows_ms": part, "must_ms": must}
        for name in ("last", "all"):
            extra = figures[f"{name}_ms"] - figures["replay_ms"]
            figures |= {f"{name}_extra_ms": extra, f"{name}_extra_over_must": extra / must}
    return figures


class Sharded(Plain):
    """Blocks and then the network are FSDP2 groups."""

    def configure_model(self) -> None:
        from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

        if isinstance(self.model, FSDPModule):
            return
        mesh = self.device_mesh["data_parallel"]
        policy = MixedPrecisionPolicy(param_dtype=DTYPE)
        for block in self.model.get_base_model().model.layers:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(self.model, mesh=mesh, mp_policy=policy)


def measure_fsdp(args: argparse.Namespace) -> dict[str, Any]:
    """The consistency under FSDP2; every process gathers the blocks once more in each step."""
    from lightning.pytorch.strategies import ModelParallelStrategy

    class Strategy(ModelParallelStrategy):
        def __init__(self) -> None:
            super().__init__(data_parallel_size=args.devices, tensor_parallel_size=1)

    model = make_model(args.shape)
    # FSDP2 groups hold one dtype; PEFT makes the adapters float32.
    model.to(DTYPE)
    blocks = model.get_base_model().model.layers
    gathered = sum(p.numel() * p.element_size() for p in blocks.parameters())
    figures = measure_consistency(args, module=Sharded(model), devices=args.devices, strategy=Strategy)
    return {**figures, "devices": args.devices, "gathered_again_gib": gathered / 2**30}


# -------------------------------------------------------------------------------------------------- ablation


class FrozenTeacher(LoRAInterpolator):
    """The weights as they stood when the task began, which never move: a distillation from the previous model."""

    def on_task_start(self, trainer: Any, pl_module: Any) -> None:
        self.reset()
        super().on_task_start(trainer, pl_module)

    def should_update(self, step_idx: int) -> bool:
        return False


class BaseTeacher(LoRAInterpolator):
    """The model without its adapter."""

    def on_task_start(self, trainer: Any, pl_module: Any) -> None:
        self._network = pl_module
        super().on_task_start(trainer, pl_module)

    def teacher(self) -> AbstractContextManager[None]:
        return weights.adapters_disabled(self._network)


CONFIGURATIONS: dict[str, Any] = {
    "sequential": None,
    "memory": {},
    "average alone": lambda: LoRAInterpolator(consistency_weight=0),
    "I-LoRA (defaults)": LoRAInterpolator,
    "I-LoRA, fast evaluated": lambda: LoRAInterpolator(evaluate_with="fast"),
    "frozen previous-task teacher": lambda: FrozenTeacher(evaluate_with="fast"),
    "base teacher": lambda: BaseTeacher(evaluate_with="fast"),
    "decay 0.25": lambda: LoRAInterpolator(decay=0.25),
    "decay 0.99": lambda: LoRAInterpolator(decay=0.99),
    "decay 0.999": lambda: LoRAInterpolator(decay=0.999),
    "one-sided": lambda: LoRAInterpolator(consistency="one_sided"),
    "all layers": lambda: LoRAInterpolator(layers="all"),
    "as released, but working": lambda: LoRAInterpolator(
        decay=0.25, consistency="one_sided", layers="all", evaluate_with="fast"
    ),
}


def tiny_assets(folder: Path, tasks: list[str]) -> Path:
    """A random model, a tokenizer of characters and rows of nothing, for a run without meaning."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = ["<pad>", "<s>", "</s>", "<unk>", *[chr(c) for c in range(32, 127)]]
    raw = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(vocabulary)}, merges=[], unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    LlamaForCausalLM(LlamaConfig(**SHAPES["tiny"])).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for task in tasks:
        for split in ("train", "test"):
            rows = [
                {"prompt": f"{task} {i}?", "answer": ("yes", "no")[i % 2], "options": ["yes", "no"]} for i in range(8)
            ]
            (folder / f"{task}.{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def rows_of(folder: Path, task: str, split: str, count: int, seed: int) -> list[Any]:
    """The first ``count`` rows of a split, shuffled once."""
    from lightning_cl.data import read_rows

    path = next(p for p in (folder / f"{task}.{split}.jsonl", folder / f"{task}.{split}.jsonl.gz") if p.exists())
    rows: Any = read_rows(str(path))
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    return [rows[i] for i in order[:count]]


def one_run(name: str, seed: int, folder: Path, model: Path, args: argparse.Namespace) -> dict[str, float]:
    """Train the tasks in turn and score all of them after each."""
    from lightning_cl import CausalLMModule, Task, TaskStream, fit_stream

    pl.seed_everything(seed, verbose=False)
    tasks = [
        Task(
            task,
            train=rows_of(folder, task, "train", args.train_rows, seed),
            test=rows_of(folder, task, "test", args.test_rows, 0),
            metric="accuracy",
        )
        for task in args.tasks
    ]
    stream = TaskStream(
        tasks, batch_size=args.batch, eval_batch_size=2 * args.batch, max_length=args.max_length, seed=seed
    )
    module = CausalLMModule(
        str(model), lora={"r": 16, "lora_alpha": 32}, lr=args.lr, dtype="bfloat16" if DEVICE == "cuda" else "float32"
    )
    callbacks: list[Any] = []
    if CONFIGURATIONS[name] is not None:
        callbacks.append(ReplayMixer(EpisodicMemory(args.capacity, seed=seed), rows_per_batch=args.memory_rows))
        if CONFIGURATIONS[name] != {}:
            callbacks.append(CONFIGURATIONS[name]())
    trainer = pl.Trainer(
        accelerator="gpu" if DEVICE == "cuda" else "cpu",
        devices=1,
        max_epochs=args.epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=callbacks,
    )
    start = time.perf_counter()
    figures = fit_stream(trainer, module, stream).compute()
    kept = ("average", "backward_transfer", "learning_accuracy")
    return {**{key: 100 * float(figures[key]) for key in kept}, "seconds": time.perf_counter() - start}


def measure_ablation(args: argparse.Namespace, done: dict[str, Any]) -> dict[str, Any]:
    """Every configuration with every seed; what ``done`` holds is not run again."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = tiny_assets(Path(temporary), args.tasks) if args.tiny else args.data
        model = folder if args.tiny else args.model
        runs: dict[str, Any] = done.get("runs", {})
        for name in args.configurations or CONFIGURATIONS:
            for seed in range(args.seeds):
                if str(seed) not in runs.setdefault(name, {}):
                    runs[name][str(seed)] = one_run(name, seed, folder, model, args)
                    print(name, seed, runs[name][str(seed)], flush=True)
                    write(args, {"ablation": {"tasks": args.tasks, "runs": runs}})
    summary = {}
    for name, seeds in runs.items():
        summary[name] = {}
        for key in ("average", "backward_transfer", "learning_accuracy", "seconds"):
            values = [values[key] for values in seeds.values()]
            summary[name][key] = statistics.mean(values)
            summary[name][f"{key}_std"] = statistics.stdev(values) if len(values) > 1 else 0.0
        summary[name]["seeds"] = len(seeds)
    settings = ("tasks", "train_rows", "test_rows", "epochs", "batch", "memory_rows", "capacity", "lr")
    return {**{key: getattr(args, key) for key in settings}, "runs": runs, "summary": summary}


# ---------------------------------------------------------------------------------------------------- output


def table(title: str, rows: list[dict[str, Any]]) -> None:
    """Print rows of figures."""
    print(f"\n{title}")
    for row in rows:
        for key, value in row.items():
            print(f"  {key:<28} {value:.4f}" if isinstance(value, float) else f"  {key:<28} {value}")


def ablation_table(summary: dict[str, Any]) -> str:
    """The ablation as Markdown: mean and standard deviation over the seeds."""
    lines = ["| configuration | average | BWT | learning accuracy | seeds |", "| --- | --- | --- | --- | --- |"]
    for name, row in summary.items():
        cells = [
            f"{row[key]:.1f} ± {row[f'{key}_std']:.1f}" for key in ("average", "backward_transfer", "learning_accuracy")
        ]
        lines.append(f"| {name} | {' | '.join(cells)} | {row['seeds']} |")
    return "\n".join(lines)


def commit() -> str:
    """The commit of the code, where git knows it."""
    found = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent, check=False
    )
    return found.stdout.strip() or "unknown"


def write(args: argparse.Namespace, figures: dict[str, Any]) -> None:
    """Write the figures beside those of the file's other parts."""
    if not args.out:
        return
    known = json.loads(args.out.read_text()) if args.out.exists() else {}
    known |= {
        "command": " ".join(["python", "examples/benchmark/interpolator.py", *args.argv]),
        "hardware": torch.cuda.get_device_name() if DEVICE == "cuda" else f"CPU {platform.machine()}",
        "torch": torch.__version__,
        "commit": commit(),
    }
    args.out.write_text(json.dumps(known | figures, indent=2) + "\n")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--tiny", action="store_true", help="run everything in seconds, without meaning")
    parser.add_argument("--only", choices=["average", "consistency", "fsdp", "ablation"], help="one part")
    parser.add_argument("--devices", type=int, default=2, help="processes of the part fsdp")
    parser.add_argument("--rows", type=int, default=4, help="rows of a batch of the part average")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens of its rows")
    parser.add_argument("--replay-tokens", type=int, default=96, help="tokens a row of the part consistency")
    parser.add_argument("--steps", type=int, default=12, help="steps of each run")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of runs")
    parser.add_argument("--data", type=Path, help="folder of NAME.train.jsonl[.gz] and NAME.test.jsonl[.gz]")
    parser.add_argument("--model", type=Path, default=Path("examples/assets/smollm2-135m-instruct"))
    parser.add_argument("--tasks", nargs="+", default=["dbpedia", "amazon", "agnews"])
    parser.add_argument("--configurations", nargs="+", choices=list(CONFIGURATIONS), help="default: all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--train-rows", type=int, default=640)
    parser.add_argument("--test-rows", type=int, default=200)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--memory-rows", type=int, default=8)
    parser.add_argument("--capacity", type=int, default=200)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--lr", type=float, default=1e-3)
    args = parser.parse_args(argv)
    args.argv = sys.argv[1:] if argv is None else argv
    args.warmup, args.shape = 4, "llama-8b"
    if args.tiny:
        tiny = {"warmup": 1, "shape": "tiny", "rows": 4, "tokens": 16, "replay_tokens": 16, "steps": 3, "rounds": 1}
        tiny |= {"seeds": 1, "train_rows": 8, "test_rows": 4, "epochs": 1, "batch": 4, "memory_rows": 2, "capacity": 8}
        vars(args).update(tiny)
    if args.only == "ablation" and args.data is None and not args.tiny:
        parser.error("the ablation needs --data, the folder of its tasks")
    return args


def main(argv: list[str] | None = None) -> int:
    """Check, time, print, write."""
    args = parse(argv)
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if args.only in (None, "average"):
        figures = measure_average(args)
        write(args, {"average": figures})
        table("The average alone", [figures])
    if args.only in (None, "consistency"):
        figures = measure_consistency(args)
        write(args, {"consistency": figures})
        table("The consistency on memory rows", [figures])
    if args.only == "fsdp":
        figures = measure_fsdp(args)
        if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
            write(args, {"fsdp": figures})
            table("The consistency under FSDP2", [figures])
    if args.only == "ablation" or (args.only is None and (args.data or args.tiny)):
        done = json.loads(args.out.read_text()) if args.out and args.out.exists() else {}
        figures = measure_ablation(args, done.get("ablation", {}))
        write(args, {"ablation": figures})
        print(f"\n{ablation_table(figures['summary'])}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
