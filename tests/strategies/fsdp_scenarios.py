# SPDX-License-Identifier: Apache-2.0
"""Scenarios that two processes run under ``cl_fsdp``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_cl import weights
from lightning_cl.strategies import QuantizationConfig, quantization, sharding
from tests.helpers import models
from tests.strategies import workers


def fit_twice(rank: int, folder: Path) -> Any:
    module = workers.plain(optimizer="sgd")
    workers.trainer(folder).fit(module, models.loader(16, 4))
    kinds = {n: id(p) for n, p in module.named_parameters()}
    workers.trainer(folder).fit(module, models.loader(8, 4, seed=1))
    assert {n: id(p) for n, p in module.named_parameters()} == kinds, "sharded again"
    assert all(hasattr(p, "to_local") for p in module.parameters())
    blocks = [m for m in module.modules() if type(m).__name__ == "FSDPLlamaDecoderLayer"]
    assert len(blocks) == 2
    return workers.whole(module)


def tied(rank: int, folder: Path) -> Any:
    module = workers.plain(optimizer="sgd", lora=False, tie_word_embeddings=True)
    workers.trainer(folder, gradient_clip_val=0.5, accumulate_grad_batches=2).fit(module, models.loader(16, 4))
    return workers.whole(module)


def frozen_gradients(rank: int, folder: Path) -> Any:
    """Elements of gradient per rank, seen just before the optimizer step."""
    seen = {}

    class Look(pl.Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            seen["sum"] = sum(weights.local(p.grad).numel() for p in pl_module.parameters() if p.grad is not None)
            seen["trainable"] = sum(p.numel() for p in pl_module.parameters() if p.requires_grad)

    workers.trainer(folder, callbacks=[Look()]).fit(workers.plain(also=()), models.loader(8, 4))
    return seen


class RootBetweenSteps(pl.Callback):
    """Whether the root group is gathered after each step."""

    def __init__(self) -> None:
        self.gathered: list[bool] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if sharding.is_sharded(pl_module):
            self.gathered.append(all(group.is_unsharded for group in sharding.param_groups(pl_module)))


def frozen_root(rank: int, folder: Path, devices: int = 2, loaders: Any = None) -> Any:
    """A fit with all of the root frozen, and one in which its norm trains."""
    module, callback = workers.plain(also=(), optimizer="sgd"), RootBetweenSteps()
    first, second = loaders or (models.loader(16, 4), models.loader(16, 4, seed=1))
    workers.trainer(folder, devices=devices, callbacks=[callback]).fit(module, first)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(parameter.requires_grad or name.endswith("model.norm.weight"))
    workers.trainer(folder, devices=devices, callbacks=[callback]).fit(module, second)
    return workers.whole(module), callback.gathered


class SlowPass(pl.Callback):
    """A reference pass with other weights, in the network's pre-hook, as the attachment runs it."""

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        network = pl_module.model.base_model.model.model
        weights.reshard(pl_module)
        slow = {n: weights.local(p).clone() + 0.1 for n, p in weights.trainable(pl_module).items()}
        self.seen: list[Tensor] = []
        self.running = False

        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            if self.running or not torch.is_grad_enabled():
                return
            self.running = True
            with torch.no_grad(), weights.swapped(pl_module, slow):
                self.seen.append(network(**kwargs).last_hidden_state.clone())
            self.running = False

        self.handle = network.register_forward_pre_hook(hook, prepend=True, with_kwargs=True)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        self.handle.remove()


def slow_weights(rank: int, folder: Path) -> Any:
    module, callback = workers.plain(optimizer="sgd"), SlowPass()
    workers.trainer(folder, callbacks=[callback]).fit(module, models.loader(16, 4))
    return workers.whole(module), torch.cat([s.flatten() for s in callback.seen])


class Loose(pl.LightningModule):
    """Two networks, a parameter of the module itself, no ``forward``, weights read outside of their layer."""

    def __init__(self, manual: bool = False) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.first = nn.Sequential(*[nn.Linear(6, 6) for _ in range(3)])
            self.second = nn.Linear(6, 6)
            self.scale = nn.Parameter(torch.ones(1))
            self.fixed = nn.Parameter(torch.tensor(2.0), requires_grad=False)
            self.shift = nn.Parameter(torch.zeros(5))
        self.automatic_optimization = not manual

    def loss(self, batch: Tensor) -> Tensor:
        hidden = self.second(self.first(batch).tanh())
        rows = (hidden @ self.second.weight).mean(-1) * self.scale - 1 + self.shift.sum()
        return (rows**2 * self.fixed).mean()

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        if self.automatic_optimization:
            return {"loss": self.loss(batch), "rows": len(batch)}
        optimizer = self.optimizers()
        for _ in range(2):
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()
        return None

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.05)


def _loose_loader(batch: int) -> torch.utils.data.DataLoader:
    rows = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
    return torch.utils.data.DataLoader(rows, batch_size=batch)


def any_module(rank: int, folder: Path) -> Any:
    found = []
    for manual in (False, True):
        module = Loose(manual)
        workers.trainer(folder, max_epochs=2).fit(module, _loose_loader(4))
        found.append(workers.whole(module))
    return found


def four_bit(rank: int, folder: Path) -> Any:
    module = workers.plain(also=("norm",), optimizer="sgd")
    for seed in (0, 1):
        trainer = workers.trainer(folder, strategy="cl_fsdp_4bit")
        trainer.fit(module, models.loader(16, 4, seed=seed))
    layers = [m for m in module.modules() if type(m) is quantization.linear_4bit()]
    assert len(layers) == 14
    assert all(hasattr(layer.weight, "to_local") for layer in layers)
    trainer.save_checkpoint(folder / "a.ckpt")
    return workers.whole(module)


def four_bit_replicas(rank: int, folder: Path) -> Any:
    """Two copies with a 4-bit base, their checkpoint with the base in it, and two shards that read it."""
    module = workers.plain(also=("norm",), optimizer="sgd")
    for seed in (0, 1):
        strategy = workers.strategy(quantization="nf4", replicate=2, sharded_checkpoint=True, save_base=True)
        trainer = workers.trainer(folder, strategy=strategy)
        trainer.fit(module, models.loader(16, 4, seed=seed))
    trainer.save_checkpoint(folder / "base.ckpt")
    sharded = workers.plain(seed=5, also=("norm",))
    workers.trainer(folder, strategy=workers.strategy(quantization="nf4", check_base=False)).validate(
        sharded, models.loader(), ckpt_path=folder / "base.ckpt", verbose=False
    )
    packed = [[m.weight for m in net.modules() if type(m) is quantization.linear_4bit()] for net in (module, sharded)]
    assert all(hasattr(part, "to_local") != hasattr(whole, "to_local") for whole, part in zip(*packed, strict=True))
    return [workers.whole(net) for net in (module, sharded)], [workers.whole(net, False) for net in (module, sharded)]


def their_four_bit(rank: int, folder: Path) -> Any:
    """A model that transformers' own class holds in 4 bits, under the strategy without quantization."""
    import bitsandbytes as bnb

    module = workers.plain(also=("norm",), optimizer="sgd")
    for layer in module.model.base_model.model.model.layers:
        linear = layer.mlp.up_proj
        theirs = bnb.nn.Linear4bit(32, 64, bias=False, quant_type="nf4", quant_storage=torch.float32)
        theirs.weight = bnb.nn.Params4bit(
            linear.weight.data, quant_type="nf4", quant_storage=torch.float32, module=theirs
        ).to("cpu")
        layer.mlp.up_proj = theirs
    if rank < 0:
        return module
    workers.trainer(folder).fit(module, models.loader(16, 4))
    return workers.whole(module)


def four_bit_bf16(rank: int, folder: Path) -> Any:
    """bfloat16 and mixed precision, each with recomputation; storage follows the compute dtype."""
    found = {}
    for precision in ("bf16-true", "bf16-mixed"):
        module = workers.plain(also=("norm",))
        strategy = workers.strategy(quantization="nf4", activation_checkpointing=True)
        trainer = workers.trainer(folder, strategy=strategy, precision=precision)
        trainer.fit(module, models.loader(16, 4))
        layer = next(m for m in module.modules() if type(m) is quantization.linear_4bit())
        found[precision] = (layer.weight.dtype, trainer.callback_metrics["train_loss"].item())
    return found


def options(rank: int, folder: Path) -> Any:
    """Replicas, no resharding, prefetch, offload, given blocks: all train to the same weights."""
    found = {}
    for name, arguments in {
        "replicas": {"replicate": 2},
        "kept": {"reshard_after_forward": False, "prefetch": 1},
        "offload": {"cpu_offload": True},
        "blocks": {"blocks": ["LlamaMLP"], "reduce_dtype": "compute"},
        "size": {"min_parameters": 2000},
        "recompute": {"activation_checkpointing": True},
        "compile": {"compile_blocks": True, "activation_checkpointing": True},
    }.items():
        module = workers.plain(optimizer="sgd")
        with workers.without_compiler():
            workers.trainer(folder, strategy=workers.strategy(**arguments)).fit(module, models.loader(16, 4))
        found[name] = workers.whole(module)
    return found


def probe(rank: int, folder: Path) -> Any:
    """Sharding that changes packed bytes is found and said, on both ranks."""
    compare = quantization.Probe.compare

    def corrupt(self: Any) -> list[str]:
        if rank == 1:
            with torch.no_grad():
                layer = self._layer
                layer.weight.detach().view(torch.int32)[:4] ^= 1
        return compare(self)

    quantization.Probe.compare = corrupt  # type: ignore[method-assign]
    try:
        workers.trainer(folder, strategy="cl_fsdp_4bit").fit(workers.plain(), models.loader(16, 4))
    except MisconfigurationException as error:
        return str(error)
    finally:
        quantization.Probe.compare = compare  # type: ignore[method-assign]
    return "no error"


def refusals(rank: int, folder: Path) -> Any:
    """The messages of what cannot work."""
    messages: dict[str, str] = {}

    def attempt(name: str, module: Any, **kwargs: Any) -> None:
        try:
            workers.trainer(folder, **kwargs).fit(module, models.loader(16, 4))
        except Exception as error:
            messages[name] = f"{type(error).__name__}: {error}"

    module = workers.plain()
    if rank == 1:
        module.model.base_model.model.lm_head.weight.data = module.model.base_model.model.lm_head.weight.data.double()
    attempt("one_rank", module)
    attempt("product", workers.plain(), strategy=workers.strategy(replicate=2, shard=2))
    attempt("unknown_block", workers.plain(), strategy=workers.strategy(blocks=["Decoder"]))
    attempt("float16", workers.plain(), precision="16-true")
    attempt("double", workers.plain(), precision="64-true")
    uint8 = workers.plain()
    uint8.model.register_parameter("packed", nn.Parameter(torch.zeros(4, 1, dtype=torch.uint8), requires_grad=False))
    attempt("uint8", uint8, strategy="cl_fsdp_4bit")
    shared = workers.plain(lora=False)
    layers = shared.model.model.layers
    layers[1].mlp.up_proj.weight = layers[0].mlp.up_proj.weight
    attempt("shared", shared)
    scalar = workers.plain()
    scalar.temperature = nn.Parameter(torch.ones(()))
    attempt("scalar", scalar)
    attempt("all_trainable", workers.plain(lora=False), strategy="cl_fsdp_4bit")
    again = workers.plain()
    workers.trainer(folder).fit(again, models.loader(8, 4))
    attempt("other_precision", again, precision="bf16-true")
    again.extra = nn.Linear(2, 2)
    attempt("added", again)
    only = workers.strategy(quantization=QuantizationConfig(only=["lora_A"]))
    attempt("adapters", workers.plain(), strategy=only)
    return messages


ALL = [
    fit_twice,
    tied,
    frozen_gradients,
    frozen_root,
    slow_weights,
    any_module,
    four_bit,
    four_bit_replicas,
    their_four_bit,
    four_bit_bf16,
    options,
    probe,
    refusals,
]
