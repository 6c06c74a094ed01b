# SPDX-License-Identifier: Apache-2.0
"""Short training runs of models of a real shape with random weights, in turns: shared by the benchmarks beside it."""

from __future__ import annotations

import gc
import json
import logging
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_cl.report.provenance import provenance

SHAPES: dict[str, dict[str, Any]] = {
    "smollm2-135m": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
    "llama-1b": {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
    "llama-8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
    },
    "tiny": {
        "vocab_size": 128,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": False,
    },
}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32


def sync() -> None:
    """Wait for the device."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def quiet() -> None:
    """Leave the figures alone on the screen."""
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)


def make_base(shape: str, device: str | torch.device = DEVICE, dtype: torch.dtype = DTYPE, **changes: Any) -> Any:
    """A causal LM with random weights made on the device; ``changes`` go over the shape's config."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return LlamaForCausalLM(LlamaConfig(**{**SHAPES[shape], **changes}))
    finally:
        torch.set_default_dtype(before)


def make_model(shape: str, lora: Mapping[str, Any] | None) -> Any:
    """Such a model, with the LoRA layers that ``lora`` describes."""
    model = make_base(shape)
    if lora is None:
        return model
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(**lora))


def make_rows(shape: str, count: int, tokens: int, seed: int = 0) -> list[dict[str, Tensor]]:
    """Rows of random tokens, all of one length and labelled."""
    ids = torch.randint(0, SHAPES[shape]["vocab_size"], (count, tokens), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row.clone()} for row in ids]


class Plain(pl.LightningModule):
    """An ordinary LightningModule: the model's own loss, over all logits at once."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.model(**batch, use_cache=False).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-5, fused=DEVICE == "cuda")

    def on_train_end(self) -> None:
        # As with the module (below), Lightning would move the optimizer's state to the CPU.
        for optimizer in self.trainer.optimizers:
            optimizer.state.clear()

    def cpu(self) -> Plain:
        # Lightning moves the module to the CPU after each fit, which takes longer than these runs.
        return self


class Stopwatch(pl.Callback):
    """Seconds a step after the first few, and the peak of the memory."""

    clock = staticmethod(time.perf_counter)

    def __init__(self, warmup: int) -> None:
        self.warmup, self.seconds, self.peak, self._start, self._done = warmup, 0.0, 0, 0.0, 0

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._done += 1
        if self._done == self.warmup:
            sync()
            if DEVICE == "cuda":
                torch.cuda.reset_peak_memory_stats()
            self._start = self.clock()
        elif self._done == trainer.max_steps:
            sync()
            self.seconds = (self.clock() - self._start) / (self._done - self.warmup)
            self.peak = torch.cuda.max_memory_allocated() if DEVICE == "cuda" else 0


def run(
    module: pl.LightningModule,
    rows: list[dict[str, Tensor]],
    batch: int,
    steps: int,
    warmup: int,
    callbacks: list[Any],
    make_strategy: Callable[[], Any] = lambda: "auto",
    **settings: Any,
) -> Stopwatch:
    """One short training run on ``rows``, which are repeated so that it is one epoch."""
    watch = Stopwatch(warmup)
    enough = rows * (1 + steps * batch // len(rows))
    trainer = pl.Trainer(
        **{"accelerator": "gpu" if DEVICE == "cuda" else "cpu", "devices": 1, **settings},
        strategy=make_strategy(),
        max_steps=steps,
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[*callbacks, watch],
    )
    trainer.fit(module, DataLoader(enough, batch_size=batch))
    # What a callback holds, such as a second copy of the model, must be gone before the next run; the module, too, keeps
    # its last Trainer.
    module.trainer = None
    del trainer, callbacks
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
    return watch


def rounds(
    variants: Mapping[str, Callable[[], Stopwatch]], count: int, warm_up: bool = True
) -> dict[str, list[Stopwatch]]:
    """Run the variants in turn, in alternating order; with ``warm_up`` one more round comes first and does not count."""
    watches: dict[str, list[Stopwatch]] = {name: [] for name in variants}
    for index in range(0 if warm_up else 1, count + 1):
        for name in list(variants)[:: 1 if index % 2 else -1]:
            watch = variants[name]()
            if index:
                watches[name].append(watch)
    return watches


def ratio(numerator: list[Stopwatch], denominator: list[Stopwatch]) -> float:
    """Median of the rounds' time ratios."""
    return statistics.median(a.seconds / b.seconds for a, b in zip(numerator, denominator, strict=True))


def milliseconds(watches: list[Stopwatch]) -> float:
    """Median milliseconds a step."""
    return 1e3 * statistics.median(watch.seconds for watch in watches)


def gib(watches: list[Stopwatch]) -> float:
    """Peak of the device's memory over all rounds."""
    return max(watch.peak for watch in watches) / 2**30


def table(title: str, rows: list[dict[str, Any]]) -> None:
    """Print figures, one a line, with a column for each of the rows."""
    print(f"\n{title}")
    for key in rows[0]:
        cells = [f"{row[key]:.4f}" if isinstance(row[key], float) else str(row[key]) for row in rows]
        print(f"  {key:<28}" + "".join(f"{cell:>16}" for cell in cells), flush=True)


def write(path: Path | None, figures: Mapping[str, Any]) -> None:
    """Write figures, and what they were measured on, beside what the file holds already."""
    if path is None:
        return
    known = json.loads(path.read_text()) if path.exists() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**known, **provenance(), **figures}, indent=2) + "\n")
