# SPDX-License-Identifier: Apache-2.0
"""Adapters and merged models that plain transformers and PEFT load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_cl.strategies.checkpoint import METADATA, load_checkpoint
from lightning_cl.strategies.export import export_adapter, export_checkpoint, load_for_inference, merge
from lightning_cl.strategies.files import save_file
from tests.helpers import models, spawn
from tests.strategies import workers

IDS = torch.arange(4, 20)[None]


def _base(folder: Path, dtype: torch.dtype = torch.float32, **config: Any) -> Path:
    """A base on disk, in several files."""
    model = models.tiny_llama(**config).to(dtype)
    model.save_pretrained(folder / "base", max_shard_size="20KB")
    return folder / "base"


def _load(folder: Path, **kwargs: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=kwargs.pop("dtype", torch.float32), **kwargs)


def _logits(model: Any) -> Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=IDS).logits.float()


def _trained(base: Path, folder: Path, also: tuple[str, ...] = (), **lora: Any) -> tuple[Path, Any]:
    """A 4-bit run's checkpoint, and the unquantized model with the same trained weights."""
    module = models.PlainLM(models.lora(_load(base), **lora), optimizer="adamw")
    for name, p in module.model.named_parameters():
        if any(name.endswith(a) for a in also):
            p.requires_grad_(True)
    trainer = workers.trainer(folder, devices=1, strategy="cl_single_device_4bit")
    trainer.fit(module, models.loader())
    trainer.save_checkpoint(folder / "run.ckpt")
    reference = models.lora(_load(base), **lora)
    own = dict(reference.named_parameters())
    with torch.no_grad():
        for name, p in module.model.named_parameters():
            if p.requires_grad:
                own[name].copy_(p)
    return folder / "run.ckpt", reference


@pytest.mark.parametrize(
    "lora",
    [
        {},
        {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
        {"use_dora": True},
        {"target_modules": "all-linear"},
        {"modules_to_save": ["lm_head"]},
    ],
    ids=["plain", "rank-stabilised", "dora", "all-linear", "saved-head"],
)
def test_adapter_and_merged_model_equal_the_unquantized_model(tmp_path: Path, lora: dict[str, Any]) -> None:
    from peft import PeftModel

    base = _base(tmp_path)
    assert len(list(base.glob("*.safetensors"))) > 2
    checkpoint, reference = _trained(base, tmp_path, **lora)
    expected = _logits(reference)
    assert (expected - _logits(_load(base))).abs().max() > 1e-3

    adapter = export_checkpoint(checkpoint, tmp_path / "adapter")
    torch.testing.assert_close(_logits(PeftModel.from_pretrained(_load(base), adapter)), expected)
    for source in (checkpoint, adapter):
        merged = merge(source, base, tmp_path / f"merged-{source.stem}")
        torch.testing.assert_close(_logits(_load(merged)), expected, atol=2e-5, rtol=1e-4)
        assert len(list(merged.glob("*.safetensors"))) == len(list(base.glob("*.safetensors")))
    torch.testing.assert_close(_logits(load_for_inference(checkpoint, base, dtype=torch.float32)), expected)


def test_merging_into_a_bfloat16_base_rounds_once(tmp_path: Path) -> None:
    base = _base(tmp_path, torch.bfloat16)
    checkpoint, reference = _trained(base, tmp_path)
    merged = _load(merge(checkpoint, base, tmp_path / "merged"), dtype=torch.bfloat16)
    assert merged.dtype == torch.bfloat16
    assert (_logits(merged) - _logits(reference)).abs().max() < 0.02 * _logits(reference).abs().max()


@pytest.mark.parametrize("tied", [False, True])
def test_weights_trained_outside_of_the_adapter_are_merged_too(tmp_path: Path, tied: bool) -> None:
    base = _base(tmp_path, tie_word_embeddings=tied)
    checkpoint, reference = _trained(base, tmp_path, also=("model.norm.weight", "embed_tokens.weight"))
    merged = _load(merge(checkpoint, base, tmp_path / "merged"))
    torch.testing.assert_close(_logits(merged), _logits(reference), atol=2e-5, rtol=1e-4)
    with pytest.raises(MisconfigurationException, match=r"2 weights outside of the adapter 'default' were trained"):
        export_checkpoint(checkpoint, tmp_path / "adapter")


def test_full_fine_tuning_is_written_whole(tmp_path: Path) -> None:
    base = _base(tmp_path)
    module = models.PlainLM(_load(base))
    trainer = workers.trainer(tmp_path, devices=1)
    trainer.fit(module, models.loader())
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    merged = merge(tmp_path / "run.ckpt", None, tmp_path / "merged")
    torch.testing.assert_close(_logits(_load(merged)), _logits(module.model))


def test_export_of_a_live_module_with_other_values(tmp_path: Path) -> None:
    from peft import PeftModel

    base = _base(tmp_path)
    module = models.PlainLM(models.lora(_load(base)))
    name = next(n for n, _ in module.named_parameters() if "lora_B" in n)
    state = {name: torch.ones_like(module.get_parameter(name))}
    loaded = PeftModel.from_pretrained(_load(base), export_adapter(module, tmp_path / "a", state=state))
    assert (loaded.get_parameter(name.removeprefix("model.")) == 1).all()
    with pytest.raises(ValueError, match=r"`state` has a tensor for 'nobody'"):
        export_adapter(module, tmp_path / "b", state={"nobody": torch.ones(1)})


def test_one_adapter_of_several(tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel

    base = _base(tmp_path)
    module = models.PlainLM(models.lora(_load(base)))
    module.model.add_adapter("second", LoraConfig(r=2, target_modules=["k_proj"], task_type="CAUSAL_LM"))
    folder = export_adapter(module, tmp_path / "second", adapter_name="second")
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == 2
    PeftModel.from_pretrained(_load(base), folder)
    with pytest.raises(MisconfigurationException, match=r"no adapter 'third' to export \(adapters: default, second\)"):
        export_adapter(module, tmp_path / "third", adapter_name="third")


def test_the_card_says_what_it_is(tmp_path: Path) -> None:
    base = _base(tmp_path)
    checkpoint, _ = _trained(base, tmp_path)
    card = (export_checkpoint(checkpoint, tmp_path / "adapter") / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: peft\nbase_model: ")
    assert "| 4 | 8 | q_proj, v_proj |" in card
    assert "step 4 of the run that wrote `run.ckpt`" in card
    merged = (merge(checkpoint, base, tmp_path / "merged") / "README.md").read_text()
    assert "library_name: transformers" in merged


def test_slow_weights_of_a_checkpoint(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    base = _base(tmp_path)
    path, _ = _trained(base, tmp_path)
    checkpoint = load_checkpoint(path)
    with pytest.raises(MisconfigurationException, match=r"holds no slow weights"):
        export_checkpoint(path, tmp_path / "slow", weights="slow")
    checkpoint["callbacks"]["LoRAInterpolator"] = {
        "slow": {n: torch.full_like(t, 0.5) for n, t in checkpoint["state_dict"].items()}
    }
    save_file(checkpoint, path)
    tensors = load_file(export_checkpoint(path, tmp_path / "slow", weights="slow") / "adapter_model.safetensors")
    assert all((t == 0.5).all() for t in tensors.values())


def test_another_base_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    base = _base(tmp_path)
    checkpoint, _ = _trained(base, tmp_path)
    other = _base(tmp_path / "other", seed=9)
    with pytest.raises(MisconfigurationException, match=r"is not the one that the adapter was trained on: fingerprint"):
        merge(checkpoint, other, tmp_path / "merged")
    assert list((tmp_path / "merged").iterdir()) == []
    with pytest.raises(MisconfigurationException, match=r"was trained on another base"):
        load_for_inference(checkpoint, other)


def test_refusals(tmp_path: Path) -> None:
    base = _base(tmp_path)
    checkpoint, _ = _trained(base, tmp_path)
    adapter = export_checkpoint(checkpoint, tmp_path / "adapter")
    with pytest.raises(FileNotFoundError, match=r"holds neither model.safetensors nor"):
        merge(adapter, tmp_path / "adapter", tmp_path / "merged")
    with pytest.raises(MisconfigurationException, match=r"is also the folder to write to"):
        merge(adapter, base, base)
    config = json.loads((adapter / "adapter_config.json").read_text())
    for change, message in (
        ({"peft_type": "IA3"}, r"does not know an adapter of the type `IA3`"),
        ({"trainable_token_indices": [1]}, r"does not know `trainable_token_indices`"),
        ({"base_model_name_or_path": None}, r"does not say which base model"),
    ):
        (adapter / "adapter_config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(MisconfigurationException, match=message):
            merge(adapter, None if "base_model_name_or_path" in change else base, tmp_path / "merged")
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    model_config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(
        json.dumps({**model_config, "quantization_config": {"quant_method": "bitsandbytes"}})
    )
    with pytest.raises(MisconfigurationException, match=r"is quantized \(bitsandbytes\), and merging"):
        merge(adapter, base, tmp_path / "merged")
    smaller = _base(tmp_path / "smaller", num_hidden_layers=1)
    with pytest.raises(MisconfigurationException, match=r"has no tensor 'model.layers.1.self_attn.q_proj.weight'"):
        merge(adapter, smaller, tmp_path / "merged")
    narrow = _base(tmp_path / "narrow", hidden_size=16)
    with pytest.raises(MisconfigurationException, match=r"The adapter's change of .* has shape"):
        merge(adapter, narrow, tmp_path / "merged")
    loaded = load_checkpoint(checkpoint)
    del loaded[METADATA]
    save_file(loaded, checkpoint)
    with pytest.raises(MisconfigurationException, match=r"is no checkpoint of `cl_single_device` or `cl_fsdp`"):
        export_checkpoint(checkpoint, tmp_path / "x")


def _sharded(rank: int, folder: Path) -> None:
    module = models.PlainLM(models.lora(_load(folder / "base")), optimizer="adamw")
    trainer = workers.trainer(folder, strategy=workers.strategy(quantization="nf4", sharded_checkpoint=True))
    trainer.fit(module, models.loader(16, 4))
    export_adapter(module, folder / "live")
    trainer.save_checkpoint(folder / "run.ckpt")


@pytest.mark.slow
def test_two_ranks_export_what_one_reads_from_their_checkpoint(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    base = _base(tmp_path)
    spawn.run(_sharded, 2, tmp_path)
    live = load_file(tmp_path / "live" / "adapter_model.safetensors")
    stored = load_file(export_checkpoint(tmp_path / "run.ckpt", tmp_path / "stored") / "adapter_model.safetensors")
    assert live.keys() == stored.keys()
    assert all(torch.equal(live[n], stored[n]) for n in live)
    _load(merge(tmp_path / "run.ckpt", base, tmp_path / "merged"))
