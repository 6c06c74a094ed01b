# SPDX-License-Identifier: Apache-2.0
"""Tokens a second and memory of the strategies, beside what users would pick instead.

python examples/benchmark/strategies.py --out one.json                                   # one GPU
torchrun --nproc-per-node 2 examples/benchmark/strategies.py --out two.json              # two GPUs
python examples/benchmark/strategies.py --tiny --out tiny.json                           # CPU: runs all of it

A Llama with random weights (the shape of Llama-3-8B), LoRA r16 on q, k, v, o, rows of 1,024 tokens that all carry labels,
AdamW. Each case checks first that its loss is that of the plain model on the same rows, then times steps inside Lightning's
Trainer (the median). Model FLOP utilisation counts 4 FLOPs a parameter of the frozen matrix products and token (forward,
and the gradient of the activations), 6 a trainable one, and attention; products that are computed twice to save memory count
once. It is a fraction of the matrix-product rate measured here.

Switched off one at a time, to see what each brings: compiled blocks, the loss in chunks, prefetching. ``rival`` is the
Hugging Face Trainer with PEFT and bitsandbytes (with accelerate's FSDP2 under torchrun) on the same model. ``callbacks`` has
ReplayMixer, ReplayDistillation, ActivationMarginRegularizer, LoRAInterpolator and ForgettingMonitor on, with a fifth of the
rows replayed; its ratio is to the arithmetic that they must do. ``load`` loads such a checkpoint from disk in 4 bits
and reports the host memory of the node. ``checkpoint`` saves and resumes.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import itertools
import json
import logging
import os
import statistics
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from training import DTYPE, SHAPES, make_rows, sync
from training import make_base as make_random

import lightning_cl
from lightning_cl.report.provenance import provenance
from lightning_cl.strategies import CLFSDPStrategy, CLSingleDeviceStrategy

CUDA = torch.cuda.is_available()
WORLD = int(os.environ.get("WORLD_SIZE", 1))
RANK = int(os.environ.get("RANK", 0))
DEVICE = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if CUDA else torch.device("cpu")


@dataclass
class Case:
    """A strategy's arguments, the rows of a device, and whose loss is taken: ours, or the model's own over all logits."""

    options: dict[str, Any]
    rows: int = 4
    chunked: bool = True


_4BIT: dict[str, Any] = {"quantization": "nf4", "compile_blocks": True}
ONE = {
    "bf16": Case({"compile_blocks": True}),
    "nf4": Case(_4BIT),
    "nf4 recompute": Case({**_4BIT, "activation_checkpointing": True}),
    "bf16 no-compile": Case({}),
    "nf4 no-compile": Case({"quantization": "nf4"}),
    "bf16 plain-loss": Case({"compile_blocks": True}, chunked=False),
}
MANY = {
    "fsdp bf16": Case({"compile_blocks": True}),
    "fsdp nf4": Case(_4BIT),
    "fsdp nf4 recompute": Case({**_4BIT, "activation_checkpointing": True}, rows=8),
    "fsdp nf4 gathered": Case({**_4BIT, "reshard_after_forward": False}),
    "fsdp bf16 gathered": Case({"compile_blocks": True, "reshard_after_forward": False}),
    "fsdp bf16 prefetch": Case({"compile_blocks": True, "prefetch": 2}),
    "fsdp bf16 no-compile": Case({}),
    "fsdp nf4 no-compile": Case({"quantization": "nf4"}),
    "fsdp bf16 plain-loss": Case({"compile_blocks": True}, chunked=False),
    "replicas nf4": Case({**_4BIT, "replicate": WORLD, "shard": 1}),
    "replicas bf16": Case({"compile_blocks": True, "replicate": WORLD, "shard": 1}),
}
EXTRAS = ("rival bf16", "rival nf4", "callbacks", "checkpoint", "load")


@dataclass
class Results:
    """What has been measured so far; written after each case, so that a run that is cut short is not lost."""

    args: argparse.Namespace
    matrix_flops: float
    cases: list[dict[str, Any]] = field(default_factory=list)

    def add(self, name: str, **values: Any) -> None:
        """Print a line, and write them all."""
        self.cases.append({"case": name, **values})
        if RANK != 0:
            return
        shown = "  ".join(
            f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items() if k != "top"
        )
        print(f"{name:24s} {shown}", flush=True)
        for line in values.get("top", ()):
            print(f"    {line['ms']:8.2f} ms {line['calls']:6d} x {line['kernel']}")
        if self.args.out:
            document = {
                **provenance(),
                "processes": WORLD,
                "shape": self.args.shape,
                "tokens": self.args.tokens,
                "matrix_tflops": self.matrix_flops / 1e12,
                "cases": self.cases,
            }
            self.args.out.write_text(json.dumps(document, indent=2))

    def speed(self, name: str, seconds: float, peak: float, rows: int, **more: Any) -> None:
        """A line of the table of speeds."""
        rate = rows * self.args.tokens / seconds
        self.add(
            name,
            tokens_per_second_per_device=rate,
            peak_gib=peak,
            utilisation=rate * flops_per_token(self.args.shape, self.args.tokens) / self.matrix_flops,
            rows=rows,
            step_ms=1e3 * seconds,
            **more,
        )

    def step_seconds(self, name: str) -> float | None:
        """Seconds of a step of a case that has been measured."""
        return next((c["step_ms"] / 1e3 for c in self.cases if c["case"] == name and "step_ms" in c), None)


# ----------------------------------------------------------------------- the model and its rows


def make_base(shape: str, dtype: torch.dtype = DTYPE) -> Any:
    """Random weights on this process's device."""
    return make_random(shape, DEVICE, dtype, tie_word_embeddings=False, rope_theta=500000.0).train()


def add_lora(model: Any) -> Any:
    """LoRA r16 on the attention's projections, in the model's dtype."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    config = LoraConfig(r=16, lora_alpha=32, target_modules=targets, task_type="CAUSAL_LM")
    return get_peft_model(model, config, autocast_adapter_dtype=False)


def make_tokenizer() -> Any:
    """A tokenizer of three words, since a model folder has one."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({"<pad>": 0, "<eos>": 1, "<unk>": 2}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


class Plain(pl.LightningModule):
    """An ordinary LightningModule: the model's own loss, over all logits at once."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.model(**batch, use_cache=False).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-4, fused=CUDA)


class Ours(lightning_cl.CausalLMModule):
    """Our module, with the same optimizer as the plain one."""

    configure_optimizers = Plain.configure_optimizers


# ----------------------------------------------------------------------- timing


class Stopwatch(pl.Callback):
    """The median of the steps after the first few, the first loss, the memory's peak, and where the time goes."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.seconds, self.peak, self.loss = 0.0, 0.0, 0.0
        self.marks: list[Any] = []
        self.top: list[dict[str, Any]] = []
        self._profiler: Any = None

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if not self.marks:
            self.loss = float(outputs["loss"])
        self.marks.append(mark())
        done = len(self.marks)
        if done == self.args.warmup:
            sync()
            if CUDA:
                torch.cuda.reset_peak_memory_stats()
        if done == self.args.warmup + self.args.steps:
            sync()
            self.peak = torch.cuda.max_memory_allocated() / 2**30 if CUDA else 0.0
            if self.args.profile:
                self._profiler = torch.profiler.profile()
                self._profiler.start()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        sync()
        if self._profiler is not None:
            self._profiler.stop()
            self.top = kernels(self._profiler, self.args.profile)
        timed = self.marks[self.args.warmup - 1 : self.args.warmup + self.args.steps]
        self.seconds = statistics.median(between(a, b) for a, b in itertools.pairwise(timed))


def mark() -> Any:
    """A point of time on the device, without waiting for it."""
    if not CUDA:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(first: Any, second: Any) -> float:
    """Seconds between two marks."""
    return first.elapsed_time(second) / 1e3 if CUDA else second - first


def kernels(profiler: Any, steps: int) -> list[dict[str, Any]]:
    """The kernels that took most of the profiled steps, per step."""
    found = [e for e in profiler.key_averages() if e.device_type != torch.autograd.DeviceType.CPU]
    found.sort(key=lambda e: -e.self_device_time_total)
    total = sum(e.self_device_time_total for e in found)
    lines = [{"kernel": "all kernels", "ms": total / 1e3 / steps, "calls": sum(e.count for e in found) // steps}]
    return lines + [
        {"kernel": e.key[:100], "ms": e.self_device_time_total / 1e3 / steps, "calls": e.count // steps}
        for e in found[:22]
    ]


def free() -> None:
    """Give the last case's memory back."""
    torch.compiler.reset()
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def make_trainer(strategy: Any, args: argparse.Namespace, callbacks: list[Any], precision: str = "") -> pl.Trainer:
    """A quiet Trainer on all devices of this run."""
    return pl.Trainer(
        accelerator="gpu" if CUDA else "cpu",
        devices=WORLD,
        strategy=strategy,
        precision=precision or ("bf16-true" if CUDA else "32-true"),  # type: ignore[arg-type]
        max_steps=args.warmup + args.steps + args.profile,
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
    )


# ----------------------------------------------------------------------- cases


def ours(case: Case, args: argparse.Namespace, callbacks: list[Any] | None = None) -> tuple[Stopwatch, pl.Trainer]:
    """Train a case."""
    model = add_lora(make_base(args.shape))
    module = Ours(model) if case.chunked else Plain(model)
    strategy = CLFSDPStrategy(**case.options) if WORLD > 1 else CLSingleDeviceStrategy(**case.options)
    loader = DataLoader(make_rows(args.shape, case.rows * WORLD * 4, args.tokens), batch_size=case.rows)
    watch = Stopwatch(args)
    trainer = make_trainer(strategy, args, [*(callbacks or []), watch])
    trainer.fit(module, loader)
    return watch, trainer


def reference_loss(args: argparse.Namespace, rows: int) -> float:
    """The plain model's loss on what the first step of this rank sees."""
    model = add_lora(make_base(args.shape))
    data = make_rows(args.shape, rows * WORLD * 4, args.tokens)
    order: Any = range(len(data))
    if WORLD > 1:
        order = list(torch.utils.data.DistributedSampler(data, WORLD, RANK, shuffle=True, seed=0))
    batch = {key: torch.stack([data[i][key] for i in list(order)[:rows]]).to(DEVICE) for key in data[0]}
    with torch.no_grad():
        return float(model(**batch, use_cache=False).loss)


def rival(quantized: bool, rows: int, args: argparse.Namespace) -> tuple[float, float]:
    """Seconds a step and peak memory of the Hugging Face Trainer with PEFT (and bitsandbytes, and accelerate's FSDP2)."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    base = make_base(args.shape)
    if quantized:
        import bitsandbytes as bnb

        for name, layer in list(base.named_modules()):
            if type(layer) is torch.nn.Linear and "lm_head" not in name:
                new = bnb.nn.Linear4bit(
                    layer.in_features, layer.out_features, False, DTYPE, quant_type="nf4", quant_storage=DTYPE
                )
                new.weight = bnb.nn.Params4bit(layer.weight.data, quant_type="nf4", quant_storage=DTYPE, module=new)
                parent, _, child = name.rpartition(".")
                setattr(base.get_submodule(parent), child, new.to(DEVICE))
    model = add_lora(base)
    marks: list[Any] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            marks.append(mark())
            if len(marks) == args.warmup and CUDA:
                sync()
                torch.cuda.reset_peak_memory_stats()

    with tempfile.TemporaryDirectory() as folder:
        sharded: dict[str, Any] = {}
        if WORLD > 1:
            wrap = {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
            sharded = {"fsdp": "full_shard auto_wrap", "fsdp_config": {"version": 2, **wrap}}
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=rows,
            max_steps=args.warmup + args.steps,
            learning_rate=1e-4,
            bf16=CUDA,
            use_cpu=not CUDA,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            optim="adamw_torch_fused" if CUDA else "adamw_torch",
            **sharded,
        )
        data: Any = make_rows(args.shape, rows * WORLD * 8, args.tokens)
        Trainer(model=model, args=arguments, train_dataset=data, callbacks=[Clock()]).train()
    sync()
    timed = marks[args.warmup - 1 :]
    seconds = statistics.median(between(a, b) for a, b in itertools.pairwise(timed))
    return seconds, torch.cuda.max_memory_allocated() / 2**30 if CUDA else 0.0


def with_callbacks(results: Results, case: Case) -> None:
    """All five callbacks together, against the arithmetic that they must do.

    With R replayed rows beside B of the task: forward and backward of B + R rows, one forward of R rows for the shared
    reference of distillation and margin (the adapters off), and one for the slow weights. A forward pass is a half of a
    step with a frozen base. Beside them the same B rows without callbacks.
    """
    from lightning_cl import callbacks, replay

    args, rows, replayed = results.args, case.rows, case.rows // 4
    alone, _ = ours(case, args)
    free()
    texts = make_rows(args.shape, 16, args.tokens, 7)
    watch, _ = ours(
        case,
        args,
        [
            callbacks.ReplayMixer(
                replay.GeneralSamples(texts, num_samples=16, max_tokens=args.tokens), rows_per_batch=replayed
            ),
            callbacks.ReplayDistillation(),
            callbacks.ActivationMarginRegularizer(),
            callbacks.LoRAInterpolator(),
            callbacks.ForgettingMonitor("val_loss", mode="min"),
        ],
    )
    must = alone.seconds * ((rows + replayed) / rows + 2 * 0.5 * replayed / rows)
    results.add(
        "callbacks",
        ratio=watch.seconds / must,
        step_ms=1e3 * watch.seconds,
        alone_ms=1e3 * alone.seconds,
        must_ms=1e3 * must,
        peak_gib=watch.peak,
        rows=rows,
        replayed=replayed,
        **({"top": watch.top} if watch.top else {}),
    )


def save_and_resume(results: Results, case: Case) -> None:
    """Size and time of an adapter-only checkpoint."""
    _, trainer = ours(case, argparse.Namespace(**{**vars(results.args), "warmup": 1, "steps": 1, "profile": 0}))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(trainer.strategy.broadcast(folder)) / "a.ckpt"
        start = time.perf_counter()
        trainer.save_checkpoint(path)
        saved = time.perf_counter()
        trainer.strategy.load_checkpoint(path)
        loaded = time.perf_counter()
        trainer.strategy.barrier()
        results.add(
            "checkpoint",
            megabytes=path.stat().st_size / 1e6,
            save_seconds=saved - start,
            load_seconds=loaded - saved,
        )
        trainer.strategy.barrier()


def load_in_4bit(results: Results) -> None:
    """Host memory of a node whose processes load a checkpoint of this shape from disk under the 4-bit strategy."""
    from lightning_cl.distributed import gather_objects

    args = results.args
    if WORLD > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if CUDA else "gloo")
    folder = Path(gather_objects(tempfile.mkdtemp(prefix="lightning-cl-"))[0])
    if RANK == 0:
        make_base(args.shape, torch.bfloat16).save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)
    gather_objects(None)
    free()
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    strategy = CLFSDPStrategy(quantization="nf4") if WORLD > 1 else CLSingleDeviceStrategy(quantization="nf4")
    trainer = make_trainer(strategy, args, [], "bf16-true")
    trainer.limit_val_batches = 1
    lora = {"r": 16, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
    with growth_of_own_memory() as peak:
        start = time.perf_counter()
        module = lightning_cl.CausalLMModule(str(folder), lora=lora)
        trainer.validate(module, DataLoader(make_rows(args.shape, 2 * WORLD, 16), batch_size=2), verbose=False)
        seconds = time.perf_counter() - start
    # The file's own pages are in memory once, however many processes read them.
    node = sum(gather_objects(peak[0])) + size
    results.add("load", seconds=seconds, checkpoint_gib=size / 2**30, node_over_checkpoint=node / size)
    gather_objects(None)
    if RANK == 0:
        for file in folder.iterdir():
            file.unlink()


@contextlib.contextmanager
def growth_of_own_memory() -> Iterator[list[int]]:
    """The most that this process's own (anonymous) memory grows by while the context lasts, in bytes."""

    def anonymous() -> int:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
        return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Anonymous:"))

    before, peak, done = anonymous(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            peak[0] = max(peak[0], anonymous() - before)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


# ----------------------------------------------------------------------- arithmetic


def matrix_rate() -> float:
    """FLOP/s of a large matrix product in the run's dtype."""
    size = 8192 if CUDA else 256
    a, b = (torch.randn(size, size, device=DEVICE, dtype=DTYPE) for _ in range(2))
    for _ in range(3):
        a @ b
    times = []
    for _ in range(20):
        start = mark()
        a @ b
        times.append((start, mark()))
    sync()
    return 2 * size**3 / statistics.median(between(*pair) for pair in times)


def flops_per_token(shape: str, tokens: int) -> float:
    """What the model must compute for one token of a training step."""
    c = SHAPES[shape]
    hidden, layers = c["hidden_size"], c["num_hidden_layers"]
    kv = hidden * c["num_key_value_heads"] // c["num_attention_heads"]
    frozen = layers * (2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * c["intermediate_size"])
    head = hidden * c["vocab_size"]
    lora = layers * 16 * (2 * hidden + 2 * (hidden + kv) + 2 * hidden)
    # Scores and mixing: 2 products of half a square (causal), forward once and backward twice.
    attention = layers * 2 * 2 * hidden * tokens / 2 * 3
    return 4 * (frozen + head) + 6 * lora + attention


# ----------------------------------------------------------------------- the run


def main(argv: list[str] | None = None) -> int:
    """Run the cases that were asked for."""
    args = parse(argv)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    if CUDA:
        torch.cuda.set_device(DEVICE)
    else:
        # Tracing without code generation, which takes longer on a CPU than all else here.
        torch.compile = functools.partial(torch.compile, backend="aot_eager")  # type: ignore[assignment]
    cases = MANY if WORLD > 1 else ONE
    results = Results(args, matrix_rate())
    references: dict[int, float] = {}
    if RANK == 0:
        print(f"matrix product {results.matrix_flops / 1e12:.1f} TFLOP/s; commit {provenance()['commit']}", flush=True)
    for name in args.cases or [*cases, *EXTRAS]:
        start = time.perf_counter()
        try:
            if name in cases:
                run_case(name, cases[name], results, references)
            else:
                run_extra(name, results, next(iter(cases.values())))
        except Exception as error:
            # What a user of a rival meets on this machine is a result too; one of ours must not take the rest along.
            first = str(error).splitlines()[0] if str(error) else ""
            results.add(name, error=f"{type(error).__name__}: {first}")
            if args.strict and not name.startswith("rival"):
                raise
        free()
        if RANK == 0:
            print(f"    ({time.perf_counter() - start:.0f} s)", flush=True)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return 0


def run_case(name: str, case: Case, results: Results, references: dict[int, float]) -> None:
    """Check a case's loss and add its figures."""
    if case.rows not in references:
        references[case.rows] = reference_loss(results.args, case.rows)
        free()
    watch, _ = ours(case, results.args)
    # 4-bit rounding moves the loss of random weights by little; a wrong layer moves it by much.
    tolerance = 0.1 if "nf4" in name else 0.02
    if abs(watch.loss - references[case.rows]) > tolerance:
        raise RuntimeError(f"{name} has the loss {watch.loss}, the plain model {references[case.rows]}")
    results.speed(name, watch.seconds, watch.peak, case.rows, **({"top": watch.top} if watch.top else {}))


def run_extra(name: str, results: Results, first: Case) -> None:
    """Run what is no case of the table."""
    if name.startswith("rival"):
        seconds, peak = rival(name.endswith("nf4"), first.rows, results.args)
        results.speed(name, seconds, peak, first.rows)
    elif name == "callbacks":
        with_callbacks(results, Case(first.options, rows=8))
    elif name == "checkpoint":
        save_and_resume(results, Case({}))
    else:
        load_in_4bit(results)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*(MANY if WORLD > 1 else ONE), *EXTRAS]
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"default: all of {', '.join(map(repr, names))}")
    parser.add_argument("--out", type=Path, help="write the figures as JSON, after each case")
    parser.add_argument("--shape", choices=SHAPES, default="llama-8b")
    parser.add_argument("--tiny", action="store_true", help="run everything in a minute, without meaning")
    parser.add_argument("--steps", type=int, default=8, help="timed steps of each case")
    parser.add_argument("--warmup", type=int, default=4, help="steps before the timed ones (compilation)")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens a row")
    parser.add_argument("--profile", type=int, default=0, metavar="STEPS", help="list the kernels of this many steps")
    parser.add_argument("--strict", action="store_true", help="stop at a case that fails")
    args = parser.parse_args(argv)
    unknown = sorted(set(args.cases) - set(names))
    if unknown:
        parser.error(f"there is no case {unknown[0]!r}; there are {', '.join(map(repr, names))}")
    if args.tiny:
        args.shape, args.tokens, args.steps, args.warmup = "tiny", 16, 2, 1
    return args


if __name__ == "__main__":
    raise SystemExit(main())
