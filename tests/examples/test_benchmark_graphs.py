# SPDX-License-Identifier: Apache-2.0
"""Training steps from CUDA graphs do what they do without."""

from __future__ import annotations

import importlib
import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_cl.strategies import CLSingleDeviceStrategy
from lightning_cl.strategies.blocks import run_uncompiled
from tests.helpers.graphs import make_graphed_callables
from tests.helpers.models import lora, tiny_llama

FOLDER = Path(__file__).parents[2] / "examples" / "benchmark"


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("compare_graphs")


@pytest.fixture
def replays(graphs: Any, monkeypatch: pytest.MonkeyPatch) -> Counter[Any]:
    """How often the first block ran from graphs with gradients, and how many sets of graphs were captured.

    Without a GPU what would be captured is called, by the rules of captures: all but the capture itself runs there too.
    """
    found: Counter[Any] = Counter()
    if not torch.cuda.is_available():
        monkeypatch.setattr(torch.cuda, "make_graphed_callables", make_graphed_callables)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    run, make = graphs.Graphs.__call__, graphs.Graphs.__init__

    def counted(self: Any, index: int, hidden: Tensor) -> Tensor:
        found["passes"] += index == 0 and torch.is_grad_enabled()
        return run(self, index, hidden)

    def made(self: Any, *args: Any) -> None:
        found["captured"] += 1
        make(self, *args)

    monkeypatch.setattr(graphs.Graphs, "__call__", counted)
    monkeypatch.setattr(graphs.Graphs, "__init__", made)
    return found


@pytest.mark.parametrize("lengths", [None, [13, 5, 9], [13, 13, 13]])
@pytest.mark.parametrize("left", [False, True])
def test_tokens_do_not_see_what_they_are_padded_with(graphs: Any, lengths: list[int] | None, left: bool) -> None:
    model = lora(tiny_llama()).base_model.model.model
    tokens, generator = 13, torch.Generator().manual_seed(0)
    hidden = torch.randn(3, tokens, 32, generator=generator, requires_grad=True)
    positions = model.rotary_emb(hidden, torch.arange(tokens)[None])
    mask = None
    if lengths is not None:
        place = torch.arange(tokens)
        real = torch.stack([place >= tokens - n if left else place < n for n in lengths])
        # A row's padding sees itself, as transformers has it.
        seen = real[:, None] & torch.ones(tokens, tokens, dtype=torch.bool).tril() | torch.eye(tokens, dtype=torch.bool)
        mask = seen[:, None]
    block, weights = model.layers[0], [p for p in model.layers[0].parameters() if p.requires_grad]
    pull = torch.randn(3, tokens, 32, generator=generator)

    def found(out: Tensor) -> list[Tensor]:
        return [out.detach(), *torch.autograd.grad((out * pull).sum(), [hidden, *weights])]

    expected = found(block(hidden, attention_mask=mask, position_embeddings=positions))
    wide = graphs.pad(hidden, 64), *graphs.context(hidden, mask, positions, 64)
    assert [value.shape[-2] for value in wide] == [64] * 4
    assert wide[1].any(-1).all()  # the softmax over nothing is not a number
    call = graphs.Call(block, block.forward, None)
    for one, other in zip(found(call(*wide)[:, :tokens]), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["sequential", "memory", "self-kl", "margin", "i-lora", "routed"])
def test_a_run_from_graphs_comes_out_as_one_without(
    compare: Any,
    config: Path,
    replays: Counter[Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
) -> None:
    if not torch.cuda.is_available():
        monkeypatch.setattr(sys.modules["compare_run"], "graphed", lambda recipe: recipe["graphs"])
    text = json.dumps(compare.read_config(compare.STANDARD)["methods"][method])
    for old, new in {
        '"examples/assets/general.jsonl", "num_samples": 1000': f'"{tmp_path}/news.jsonl", "num_samples": 3',
        '"expansion_dim": 4096': '"expansion_dim": 32',  # which takes a CPU a minute
        '"pool_size": 320, "length": 128': '"pool_size": 8, "length": 16',
    }.items():
        text = text.replace(old, new)
    content = compare.read_config(config)
    content["methods"][method] = json.loads(text)
    results = []
    for switch in (False, True):
        changed = {**content, "recipe": {**content["recipe"], "graphs": switch}}
        (tmp_path / "graphs.yaml").write_text(json.dumps(changed))
        out = tmp_path / str(switch)
        arguments = ["run", "--config", str(tmp_path / "graphs.yaml"), "--out", str(out), "--seeds", "0"]
        assert not replays
        assert compare.main([*arguments, "--methods", method]) == 0
        results.append(json.loads((out / "two" / method / "seed_0" / "task_matrix.json").read_text()))
    assert replays["passes"] > 4
    without, with_graphs = ([score["value"] for score in document["matrix"]["scores"]] for document in results)
    assert with_graphs == pytest.approx(without, abs=2e-3)


def loss_of(module: Net, batch: Tensor, **arguments: Any) -> Tensor:
    return module.model(input_ids=batch, labels=batch, **{"use_cache": False, **arguments}).loss


class Net(pl.LightningModule):
    """A small adapter on a small network; ``step`` gives the loss of a batch."""

    def __init__(self, step: Callable[[Net, Tensor], Tensor] = loss_of, model: Any = None) -> None:
        super().__init__()
        self.model = lora(tiny_llama()) if model is None else model
        self.step = step

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.step(self, batch)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        loss_of(self, batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1.0)


def fit(
    module: Net, *callbacks: pl.Callback, lengths: tuple[int, ...] = (20, 20, 31, 70), **settings: Any
) -> list[Tensor]:
    """The weights after a step for each length."""
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(4, 100, (4, length), generator=generator) for length in lengths]
    trainer = pl.Trainer(
        **{"accelerator": "auto", "devices": 1, "max_epochs": 1, "limit_val_batches": 0, **settings},
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(batches, batch_size=None), DataLoader(batches[:1], batch_size=None))
    return [p.detach().cpu() for p in module.parameters()]


def close(found: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def layers(module: Net) -> Any:
    return module.model.base_model.model.model.layers


def test_each_padded_length_is_captured_once(graphs: Any, replays: Counter[Any]) -> None:
    expected = fit(Net())
    assert not replays
    module = Net()
    close(fit(module, graphs.GraphedBlocks()), expected)
    assert replays == {"passes": 4, "captured": 2}
    assert all("forward" not in part.__dict__ for part in module.modules())


def test_layers_below_the_adapters_have_no_gradient(graphs: Any, replays: Counter[Any]) -> None:
    modules = [Net(), Net()]
    for module in modules:
        layers(module)[0].requires_grad_(False).eval()
    close(fit(modules[0], graphs.GraphedBlocks()), fit(modules[1]))
    assert replays["passes"] == 4


def train_from(batch: int, choose: Callable[[Net], Any]) -> pl.Callback:
    """Lets a part train from a batch on."""

    class Unfreeze(pl.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, _: Any, batch_idx: int) -> None:
            if batch_idx == batch:
                choose(pl_module).requires_grad_(True)

    return Unfreeze()


@pytest.mark.parametrize(
    "choose",
    [lambda module: layers(module)[0].mlp, lambda module: module.model.get_input_embeddings()],
    ids=["a layer", "the embedding"],
)
def test_what_begins_to_train_is_captured_anew(graphs: Any, replays: Counter[Any], choose: Any) -> None:
    expected = fit(Net(), train_from(2, choose), lengths=(20, 20, 20, 20))
    close(fit(Net(), train_from(2, choose), graphs.GraphedBlocks(), lengths=(20, 20, 20, 20)), expected)
    assert replays == {"passes": 4, "captured": 2}


class Louder(torch.nn.Module):
    """Twice as loud in training, as dropout is another in it."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden: Tensor) -> Tensor:
        return self.layer(hidden) * (2 if self.training else 1)


class Release(pl.Callback):
    """The first layer runs as in evaluation until the third batch, as under a router."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        layers(pl_module)[0].train(batch_idx > 1)


def test_layers_that_go_back_to_training_are_captured_anew(graphs: Any, replays: Counter[Any]) -> None:
    modules = [Net(), Net()]
    for module in modules:
        layers(module)[0].mlp = Louder(layers(module)[0].mlp)
    expected = fit(modules[0], Release(), lengths=(20,) * 4)
    close(fit(modules[1], Release(), graphs.GraphedBlocks(), lengths=(20,) * 4), expected)
    assert replays == {"passes": 4, "captured": 2}


def test_another_module_and_another_precision_are_captured_anew(graphs: Any, replays: Counter[Any]) -> None:
    callback, module, other = graphs.GraphedBlocks(), Net(), Net()
    fit(Net(), callback, lengths=(20, 20))
    for one, callbacks in ((module, [callback]), (other, [])):
        fit(one, *callbacks, lengths=(20, 20))
        mixed = fit(one, *callbacks, lengths=(20, 20), precision="bf16-mixed")
        assert all(value.isfinite().all() for value in mixed)
    for one, same in zip(module.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, same, rtol=2e-2, atol=2e-3)
    assert replays == {"passes": 6, "captured": 3}


def test_a_second_pass_of_a_step_runs_without_graphs(graphs: Any, replays: Counter[Any]) -> None:
    def step(module: Net, batch: Tensor) -> Tensor:
        return torch.stack([loss_of(module, part) for part in batch.chunk(2)]).mean()

    close(fit(Net(step), graphs.GraphedBlocks()), fit(Net(step)))
    assert replays == {"passes": 4, "captured": 2}


def test_a_pass_without_gradients_leaves_the_graphs_to_the_next(graphs: Any, replays: Counter[Any]) -> None:
    def step(module: Net, batch: Tensor) -> Tensor:
        with torch.no_grad():
            reference = loss_of(module, batch)
        return loss_of(module, batch) + reference

    close(fit(Net(step), graphs.GraphedBlocks()), fit(Net(step)))
    assert replays == {"passes": 4, "captured": 2}


def test_positions_may_be_each_rows_own(graphs: Any, replays: Counter[Any]) -> None:
    def step(module: Net, batch: Tensor) -> Tensor:
        positions = torch.arange(batch.shape[1], device=batch.device) * 2
        own = positions.expand_as(batch) + torch.arange(len(batch), device=batch.device)[:, None]
        return loss_of(module, batch, position_ids=own if batch.shape[1] > 20 else positions[None])

    close(fit(Net(step), graphs.GraphedBlocks()), fit(Net(step)))
    assert replays == {"passes": 4, "captured": 3}


def test_passes_with_a_cache_run_without_graphs(graphs: Any, replays: Counter[Any]) -> None:
    def step(module: Net, batch: Tensor) -> Tensor:
        return loss_of(module, batch, use_cache=True)

    close(fit(Net(step), graphs.GraphedBlocks()), fit(Net(step)))
    assert not replays


def test_checkpointed_blocks_run_without_graphs(graphs: Any, replays: Counter[Any]) -> None:
    strategy = CLSingleDeviceStrategy(activation_checkpointing=True)
    close(fit(Net(), graphs.GraphedBlocks(), strategy=strategy), fit(Net()))
    assert not replays


def test_evaluation_between_steps_runs_without_graphs(graphs: Any, replays: Counter[Any]) -> None:
    settings = {"limit_val_batches": 1, "val_check_interval": 1, "num_sanity_val_steps": 1}
    close(fit(Net(), graphs.GraphedBlocks(), **settings), fit(Net()))
    assert replays == {"passes": 4, "captured": 2}


def test_hooks_inside_blocks_are_heard(graphs: Any, replays: Counter[Any]) -> None:
    module, heard = Net(), []
    layer = layers(module)[1].mlp
    weight = next(p for p in module.parameters() if p.requires_grad)

    def hook(*args: Any) -> None:
        heard.append(args)

    for register in (
        layer.register_forward_hook,
        layer.register_forward_pre_hook,
        layer.register_full_backward_hook,
        layer.register_full_backward_pre_hook,
        weight.register_hook,
    ):
        handle = register(hook)
        fit(module, graphs.GraphedBlocks())
        handle.remove()
        assert len(heard) == 4
        assert not replays
        heard.clear()
    undo = run_uncompiled(module, [layer])  # as this package's own hooks tell of themselves
    fit(module, graphs.GraphedBlocks())
    assert not replays
    undo()
    fit(module, graphs.GraphedBlocks())
    assert replays["passes"] == 4


def test_after_an_error_the_network_is_as_before(graphs: Any, replays: Counter[Any]) -> None:
    def step(module: Net, batch: Tensor) -> Tensor:
        if batch.shape[1] == 31:
            raise RuntimeError("broken")
        return loss_of(module, batch)

    module = Net(step)
    with pytest.raises(RuntimeError, match="broken"):
        fit(module, graphs.GraphedBlocks())
    assert replays["passes"] == 2
    assert all("forward" not in part.__dict__ for part in module.modules())


def test_blocks_with_masks_of_their_own_are_refused(graphs: Any, replays: Counter[Any]) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    settings = Qwen2Config(
        **{"vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": 4},
        layer_types=["full_attention", "sliding_attention"],
    )
    with pytest.raises(
        MisconfigurationException, match=r"network's differ \(some with sliding attention\?\)\. Train it"
    ):
        fit(Net(model=lora(Qwen2ForCausalLM(settings))), graphs.GraphedBlocks())


class ByHand(Net):
    """Takes its optimizer's steps itself."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


@pytest.mark.parametrize("how", ["argument", "scheduler", "by hand"])
def test_gradients_are_not_accumulated_in_the_memory_of_graphs(graphs: Any, how: str) -> None:
    module = ByHand() if how == "by hand" else Net()
    extra = [GradientAccumulationScheduler({0: 2})] if how == "scheduler" else []
    settings = {"accumulate_grad_batches": 2} if how == "argument" else {}
    with pytest.raises(MisconfigurationException, match=r"Use automatic optimization and `accumulate_grad_batches=1`"):
        fit(module, *extra, graphs.GraphedBlocks(), **settings)
