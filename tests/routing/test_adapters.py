# SPDX-License-Identifier: Apache-2.0
"""One adapter a task: added, switched, stored, sent to host memory."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_cl.routing import AdapterBank
from lightning_cl.routing.features import find_feature_layer
from tests.helpers import models
from tests.routing.tools import TASKS, Setup, prompts


def test_adapters_lie_above_the_feature_layer_and_start_alike(ready):
    layers = {name.split("layers.")[1].split(".")[0] for name in ready.bank.parameters("task_0")}
    assert layers == {"1", "2", "3"}
    assert {n for n, p in ready.model.named_parameters() if p.requires_grad} == set(ready.bank.parameters("task_0"))
    torch.manual_seed(9)
    state = torch.get_rng_state()
    one = AdapterBank(models.PlainLM(models.lora(models.tiny_llama())), "model.base_model.model.model.layers.0")
    one.add("task_0")
    assert torch.equal(torch.get_rng_state(), state)  # a resumed run draws the same numbers afterwards
    torch.manual_seed(10)
    two = AdapterBank(models.PlainLM(models.lora(models.tiny_llama())), "model.base_model.model.model.layers.0")
    two.add("task_0")
    for name, parameter in one.parameters("task_0").items():
        assert torch.equal(parameter, two.parameters("task_0")[name])


def test_adapters_are_like_the_template():
    model = models.lora(models.tiny_llama(num_hidden_layers=3), target_modules="all-linear", r=3, lora_dropout=0.1)
    bank = AdapterBank(models.PlainLM(model.to(torch.bfloat16)), "model.base_model.model.model.layers.0")
    bank.add("task_0")
    kinds = {name.split(".")[-4] for name in bank.parameters("task_0")}
    assert kinds == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert {p.dtype for p in bank.parameters("task_0").values()} == {torch.bfloat16}
    assert model.peft_config["task_0"].r == 3


def test_snapshot_and_restore_are_exact(ready):
    before = ready.bank.snapshot("task_1")
    for parameter in ready.bank.parameters("task_1").values():
        parameter.data.zero_()
    ready.bank.restore("task_1", before)
    after = ready.bank.snapshot("task_1")
    assert all(torch.equal(before[name], after[name]) for name in before)
    before.popitem()
    with pytest.raises(MisconfigurationException, match="do not have the same weights"):
        ready.bank.restore("task_1", before)


def test_offloaded_adapters_come_back_as_they_were(ready, monkeypatch):
    """On a CPU nothing can leave the device, so `cpu` plays the device and `meta`-free copies play the host."""
    bank, moves = ready.bank, []
    monkeypatch.setattr(AdapterBank, "can_offload", property(lambda self: True))
    monkeypatch.setattr(bank, "_to_host", moves.append)
    bank.active = None
    bank.offload(keep=["task_0"])
    assert moves == ["default", "task_1", "task_2"]
    moves.clear()
    with torch.no_grad():
        ready.model(**prompts(rows=2))
        assert moves == []  # task_0 and task_1 are in use
        ready.model(**{k: v[2:3] for k, v in prompts(rows=3).items()})
    assert moves == ["task_0"]  # of those out of use, the last one stays
    bank.active = "task_1"
    moves.clear()
    bank.fetch(["task_0"])
    bank.fetch(["task_2"])
    bank.fetch(["task_0"])
    assert "task_1" not in moves  # it trains


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_dora": True}, "`use_dora=True`: PEFT cannot mix DoRA adapters"),
        ({"bias": "lora_only"}, "`bias='lora_only'` trains the base model's biases"),
        ({"modules_to_save": ["lm_head"]}, r"`modules_to_save=.*` trains whole modules"),
        ({"init_lora_weights": "pissa"}, "`init_lora_weights='pissa'` changes the base model for one adapter"),
        ({"layers_to_transform": [0, 1]}, r"adapters at or below the feature layer .*layers_to_transform=\[0, 1\]"),
    ],
)
def test_configurations_that_cannot_be_kept_apart_are_refused(config, message):
    module = models.PlainLM(models.lora(models.tiny_llama(), **config))
    with pytest.raises(MisconfigurationException, match=message):
        AdapterBank(module, find_feature_layer(module))


def test_other_adapters_are_refused():
    from peft import IA3Config, get_peft_model, inject_adapter_in_model
    from peft import LoraConfig as Lora

    ia3 = models.PlainLM(get_peft_model(models.tiny_llama(), IA3Config(task_type="CAUSAL_LM")))
    with pytest.raises(MisconfigurationException, match="routing inside a pass needs LoRA layers"):
        AdapterBank(ia3, find_feature_layer(ia3))
    bare = models.PlainLM(inject_adapter_in_model(Lora(target_modules=["q_proj"]), models.tiny_llama()))
    with pytest.raises(MisconfigurationException, match=r"has adapter layers but no `peft\.PeftModel`"):
        AdapterBank(bare, find_feature_layer(bare))
    low = models.PlainLM(models.lora(models.tiny_llama()))
    with pytest.raises(MisconfigurationException, match="All 4 LoRA layers are at or below the feature layer"):
        AdapterBank(low, "model.base_model.model.model.layers.1")


@pytest.mark.gpu
def test_offloaded_adapters_answer_as_they_did_on_the_device():
    ready = Setup()
    ready.module.cuda()
    batch = {k: v.cuda() for k, v in prompts().items()}
    rows = [{k: v[row : row + 1] for k, v in batch.items()} for row in range(6)]
    with torch.no_grad():
        expected = [ready.model(**row).logits for row in rows]
        ready.bank.active = None
        ready.bank.offload()
        assert {p.device.type for k in range(TASKS) for p in ready.bank.parameters(f"task_{k}").values()} == {"cpu"}
        for _ in range(2):  # there and back again
            for row, wanted in zip(rows, expected, strict=True):
                assert torch.equal(ready.model(**row).logits, wanted)
    there = [k for k in range(TASKS) if all(p.is_cuda for p in ready.bank.parameters(f"task_{k}").values())]
    assert len(there) == 2  # the one in use, and the last one before it
    with torch.no_grad():
        mixed = ready.model(**batch).logits[:6]
    real = batch["attention_mask"][:6].bool()
    torch.testing.assert_close(mixed[real], torch.cat(expected)[real], atol=1e-4, rtol=1e-3)


@pytest.mark.gpu
def test_adapters_fetched_in_an_evaluation_can_train_again():
    ready = Setup()
    ready.module.cuda()
    ready.bank.active = None
    ready.bank.offload()
    with torch.inference_mode():  # of the Trainer's evaluations
        ready.bank.fetch(["task_0"])
        ready.bank.fetch(["task_1"])
        ready.bank.fetch(["task_2"])  # sends the first one back
    for k in range(TASKS):
        ready.bank.activate(f"task_{k}")
        assert all(p.requires_grad for p in ready.bank.parameters(f"task_{k}").values())
    ready.bank.add("later")
