# SPDX-License-Identifier: Apache-2.0
"""One device: the accelerator's device, adapter-only checkpoints, resuming, 4 bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

import lightning_cl  # noqa: F401
from lightning_cl.strategies import CLSingleDeviceStrategy, QuantizationConfig, checks
from lightning_cl.strategies.quantization import quantize
from tests.helpers import models
from tests.strategies import workers


def _trainer(folder: Path, **kwargs: Any) -> pl.Trainer:
    return models.trainer(folder, **{"strategy": "cl_single_device", "max_epochs": 2, "max_steps": -1, **kwargs})


def test_device_comes_from_the_accelerator_by_name(tmp_path: Path) -> None:
    assert _trainer(tmp_path).strategy.root_device == torch.device("cpu")
    strategy = CLSingleDeviceStrategy()
    strategy.parallel_devices = [torch.device("cuda", 1)]
    assert strategy.root_device == torch.device("cuda", 1)


def test_more_than_one_device_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=r"drives one device, but the Trainer found 2 .*`devices=1`"):
        _trainer(tmp_path, devices=2)


def test_resumed_run_equals_the_unbroken_one(tmp_path: Path) -> None:
    unbroken = workers.plain()
    _trainer(tmp_path).fit(unbroken, models.loader())

    first = workers.plain()
    trainer = _trainer(tmp_path, max_epochs=1)
    trainer.fit(first, models.loader())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    resumed = workers.plain()
    _trainer(tmp_path).fit(resumed, models.loader(), ckpt_path=tmp_path / "a.ckpt")

    for name, value in workers.whole(unbroken).items():
        assert torch.equal(value, workers.whole(resumed)[name]), name


def test_checkpoint_holds_what_trains_and_no_base(tmp_path: Path) -> None:
    module = models.PlainLM(models.lora(models.tiny_llama()))
    trainer = _trainer(tmp_path)
    trainer.fit(module, models.loader())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert {n for n, p in module.named_parameters() if p.requires_grad} == set(checkpoint["state_dict"])
    assert all("lora_" in n for n in checkpoint["state_dict"])
    frozen = {n for n, p in module.named_parameters() if not p.requires_grad}
    assert set(checkpoint["lightning_cl"]["base_fingerprint"]) == frozen


def test_adapters_frozen_by_a_later_task_stay_in_the_checkpoint(tmp_path: Path) -> None:
    module = models.PlainLM(models.lora(models.tiny_llama()))
    _trainer(tmp_path, max_epochs=1).fit(module, models.loader())
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    module.model.base_model.model.lm_head.weight.requires_grad_(True)
    trainer = _trainer(tmp_path, max_epochs=1)
    trainer.fit(module, models.loader())
    trainer.save_checkpoint(tmp_path / "b.ckpt")
    names = torch.load(tmp_path / "b.ckpt", weights_only=True)["state_dict"].keys()
    assert any("lora_A" in n for n in names)
    assert any("lm_head" in n for n in names)


def test_buffers_travel_with_the_checkpoint(tmp_path: Path) -> None:
    class Normed(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 1))

        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            return self.net(batch).mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    data = torch.utils.data.DataLoader(torch.randn(16, 4), batch_size=4)
    module, other = Normed(), Normed()
    trainer = _trainer(tmp_path)
    trainer.fit(module, data)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    other_trainer = _trainer(tmp_path, max_epochs=2)
    other_trainer.fit(other, data, ckpt_path=tmp_path / "a.ckpt")
    assert torch.equal(module.net[1].running_mean, other.net[1].running_mean)
    assert int(other.net[1].num_batches_tracked) == 8


def test_module_trains_twice_with_one_strategy_and_two(tmp_path: Path) -> None:
    module = workers.plain()
    for seed in (0, 1):
        _trainer(tmp_path, strategy="cl_single_device_4bit").fit(module, models.loader(seed=seed))
    layers = [m for m in module.modules() if type(m).__name__ == "Linear4bit" and hasattr(m, "quant_state")]
    assert len(layers) == 14


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_4bit_training_equals_training_on_the_dequantized_base(tmp_path: Path, quant_type: Any) -> None:
    module = workers.plain(also=["norm"])
    reference = workers.plain(also=["norm"])
    trainer = _trainer(tmp_path, strategy=CLSingleDeviceStrategy(quantization=quant_type))
    workers.round_to_4_bits(reference, quant_type, "cpu")
    trainer.fit(module, models.loader())
    _trainer(tmp_path).fit(reference, models.loader())
    assert len(trainer.strategy.quantized_layers) == 14
    for name, value in workers.whole(reference).items():
        torch.testing.assert_close(workers.whole(module)[name], value, atol=2e-4, rtol=1e-3)
    # A validation pass must leave the layers trainable (bitsandbytes repacks them in place on some CPUs).
    trainer.validate(module, models.loader(), verbose=False)
    module.train()
    module.model(**next(iter(models.loader()))).loss.backward()


def test_peft_layers_become_peft_4bit_layers() -> None:
    from peft.tuners.lora import bnb

    module = workers.plain()
    quantize(module, QuantizationConfig(), torch.device("cpu"), torch.float32)
    layers = [m for m in module.modules() if isinstance(m, bnb.Linear4bit)]
    assert len(layers) == 4
    before = module.model(input_ids=torch.arange(8)[None]).logits
    merged = module.model.merge_and_unload()
    assert torch.isfinite(merged(input_ids=torch.arange(8)[None]).logits).all()
    assert (merged(input_ids=torch.arange(8)[None]).logits - before).abs().max() < 0.5


def test_head_tied_and_trainable_layers_stay_in_full_precision() -> None:
    module = models.PlainLM(models.tiny_llama(tie_word_embeddings=True))
    module.requires_grad_(False)
    module.model.model.layers[0].mlp.up_proj.requires_grad_(True)
    done = quantize(module, QuantizationConfig(skip=["down_proj"]), torch.device("cpu"), torch.float32)
    assert "model.lm_head" not in done
    assert "model.model.layers.0.mlp.up_proj" not in done
    assert len(done) == 14 - 1 - 2


def test_4bit_layers_of_transformers_are_adopted(tmp_path: Path) -> None:
    import bitsandbytes as bnb

    module = workers.plain(also=[])
    model = module.model.base_model.model.model
    linear = model.layers[0].mlp.up_proj
    theirs = bnb.nn.Linear4bit(32, 64, bias=False, quant_type="nf4", quant_storage=torch.float32)
    theirs.weight = bnb.nn.Params4bit(
        linear.weight.data.clone(), quant_type="nf4", quant_storage=torch.float32, module=theirs
    ).to("cpu")
    model.layers[0].mlp.up_proj = theirs
    packed = theirs.weight.data.clone()
    _trainer(tmp_path, strategy="cl_single_device_4bit").fit(module, models.loader())
    assert torch.equal(model.layers[0].mlp.up_proj.weight.data, packed)


def test_nothing_frozen_is_refused_for_4bit(tmp_path: Path) -> None:
    module = models.PlainLM(models.tiny_llama())
    with pytest.raises(MisconfigurationException, match=r"no frozen `nn.Linear` layer .* Freeze the base"):
        _trainer(tmp_path, strategy="cl_single_device_4bit").fit(module, models.loader())


def test_trainable_layers_asked_to_be_quantized_are_refused() -> None:
    module = models.PlainLM(models.tiny_llama())
    with pytest.raises(MisconfigurationException, match=r"4 bits in 2 trainable layers \(first: .*up_proj\)"):
        quantize(module, QuantizationConfig(only=["up_proj"]), torch.device("cpu"), torch.float32)


def test_only_must_fit_something() -> None:
    with pytest.raises(MisconfigurationException, match=r"`only=\['nothing'\]` fits no frozen linear layer"):
        quantize(workers.plain(), QuantizationConfig(only=["nothing"]), torch.device("cpu"), torch.float32)


def test_unfreezing_a_quantized_layer_is_refused(tmp_path: Path) -> None:
    module = workers.plain()
    _trainer(tmp_path, strategy="cl_single_device_4bit").fit(module, models.loader())
    module.model.base_model.model.model.layers[0].mlp.up_proj.weight.requires_grad_(True)
    with pytest.raises(MisconfigurationException, match=r"held in 4 bits .* trainable"):
        _trainer(tmp_path, strategy="cl_single_device_4bit").fit(module, models.loader())


def test_fp16_on_a_cpu_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        MisconfigurationException, match=r"`precision='16-true'` computes in float16, .* Use .precision='bf16-true'"
    ):
        _trainer(tmp_path, precision="16-true").fit(workers.plain(), models.loader())


def test_4bit_on_a_device_without_kernels_is_refused() -> None:
    strategy = CLSingleDeviceStrategy(quantization="nf4")
    strategy._root_device = torch.device("mps")
    with pytest.raises(MisconfigurationException, match=r"4-bit layers were asked for on `mps`"):
        checks.raise_together(checks.precision(strategy, strategy.quantization))


def test_double_precision_with_4bit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=r"`precision='64-true'` with 4-bit layers"):
        _trainer(tmp_path, strategy="cl_single_device_4bit", precision="64-true").fit(workers.plain(), models.loader())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"quant_type": "int4"}, r"`quant_type='int4'` is no 4-bit type"),
        ({"skip": ["a"], "only": ["a"]}, r"`skip` and `only` both name a"),
    ],
)
def test_config_values(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        QuantizationConfig(**arguments)


def test_quantization_argument_of_another_type() -> None:
    with pytest.raises(TypeError, match=r"`quantization=4` is a `int`"):
        CLSingleDeviceStrategy(quantization=4)  # type: ignore[arg-type]


@pytest.mark.parametrize("strategy", ["cl_single_device", "cl_single_device_4bit"])
def test_compiled_blocks_train_to_the_same_weights(tmp_path: Path, strategy: str) -> None:
    expected = workers.plain()
    _trainer(tmp_path, strategy=strategy).fit(expected, models.loader())
    module = workers.plain()
    quantization: Any = "nf4" if strategy.endswith("4bit") else None
    with workers.without_compiler():
        compiled = CLSingleDeviceStrategy(compile_blocks=True, quantization=quantization)
        _trainer(tmp_path, strategy=compiled).fit(module, models.loader())
    assert all("_orig_mod" not in name for name, _ in module.named_parameters())
    workers.close(workers.whole(module), workers.whole(expected), atol=1e-4)


@pytest.mark.parametrize("kind", ["hugging_face", "plain"])
def test_activation_checkpointing_changes_memory_and_not_results(tmp_path: Path, kind: str) -> None:
    class Stack(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            with torch.random.fork_rng():
                torch.manual_seed(0)
                self.layers = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(3))
            self.calls = 0

        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            for layer in self.layers:
                batch = layer(batch).relu()
            return batch.sum()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    results, calls = [], []
    for on in (False, True):
        module = workers.plain() if kind == "hugging_face" else Stack()
        data = (
            models.loader()
            if kind == "hugging_face"
            else torch.utils.data.DataLoader(
                torch.randn(8, 4, generator=torch.Generator().manual_seed(0)), batch_size=4
            )
        )
        count = [0]
        watched = module.model.base_model.model.model.layers[0].mlp.up_proj if kind == "hugging_face" else None
        if watched is not None:
            watched.register_forward_pre_hook(lambda *_, count=count: count.__setitem__(0, count[0] + 1))
        strategy = CLSingleDeviceStrategy(activation_checkpointing=on)
        _trainer(tmp_path, strategy=strategy, max_epochs=1).fit(module, data)
        results.append(workers.whole(module))
        calls.append(count[0])
    for name, value in results[0].items():
        assert torch.allclose(value, results[1][name], atol=1e-6), name
    if kind == "hugging_face":
        assert calls[1] == 2 * calls[0] > 0
