# SPDX-License-Identifier: Apache-2.0
"""The router alone, exported folders, and serving without Lightning."""

from __future__ import annotations

import json

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_cl.routing import AnalyticRouter, Expansion, load_routed, save_routed
from lightning_cl.routing.router import RouteClass
from tests.helpers import models
from tests.routing.tools import TASKS, prompts


def test_classes_without_rows_are_never_chosen_and_margins_are_differences():
    expansion = Expansion(2, 4)
    weight = torch.zeros(4, 3, dtype=torch.float64)
    weight[:, 1], weight[:, 2] = 1.0, 5.0
    classes = [RouteClass(n, n) for n in "abc"]
    router = AnalyticRouter("x", expansion, classes, weight, seen=[True, True, False])
    pooled = torch.randn(4, 2)
    routes = router.route(pooled)
    assert set(routes.names) == {"b"}
    torch.testing.assert_close(routes.margin, expansion(pooled).double().sum(1))
    alone = AnalyticRouter("x", expansion, classes[:1], weight[:, 1:2]).route(pooled)
    torch.testing.assert_close(alone.margin, expansion(pooled).double().sum(1))
    with pytest.raises(ValueError, match=r"shape \[4, 3\], but `expansion_dim=4` with 2 classes"):
        AnalyticRouter("x", expansion, classes[:2], weight)


def test_hidden_states_without_a_route_are_named():
    router = AnalyticRouter("x", Expansion(2, 4), [RouteClass(n, n) for n in "ab"], torch.rand(4, 2).double())
    pooled = torch.ones(3, 2)
    pooled[1, 0] = torch.nan
    with pytest.raises(
        ValueError, match=r"hidden states of 1 of 3 samples .*\(first: sample 1\), so they have no route"
    ):
        router.route(pooled)
    with pytest.raises(ValueError, match="layer 'x' gives 5 numbers a sample, but the router was fitted on 2"):
        router.route(torch.ones(3, 5))


@pytest.mark.parametrize("four_bits", [False, True])
def test_exported_folder_serves_without_lightning(ready, tmp_path, four_bits):
    from peft import PeftModel

    batch = prompts(left=True)
    save_routed(tmp_path, ready.routed.router, ready.bank)
    with torch.no_grad():
        expected = ready.model(**batch).logits
    base = models.tiny_llama(num_hidden_layers=4)
    if four_bits:
        bnb = pytest.importorskip("bitsandbytes")
        for block in base.model.layers:
            layer = block.mlp.down_proj
            block.mlp.down_proj = bnb.nn.Linear4bit(64, 32, bias=False, quant_type="nf4", compute_dtype=torch.float32)
            block.mlp.down_proj.load_state_dict(layer.state_dict())
        base.to("cpu")
    served = load_routed(base, tmp_path)
    with torch.no_grad():
        logits = served(**batch).logits
    assert served.routed.last.adapters == [f"task_{row % TASKS}" for row in range(8)]
    text = served.generate(**batch, max_new_tokens=3, do_sample=False)
    assert text.shape == (8, 12)
    if not four_bits:
        assert torch.equal(logits, expected)
        alone = PeftModel.from_pretrained(models.tiny_llama(num_hidden_layers=4), str(tmp_path / "task_1"))
        row = {k: v[1:2] for k, v in batch.items()}
        with torch.no_grad():  # an ordinary PEFT folder
            torch.testing.assert_close(alone(**row).logits, expected[1:2], atol=1e-5, rtol=1e-4)
    served.routed.detach()


def test_bad_folders_and_models_are_refused(ready, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"holds no `router\.safetensors`"):
        load_routed(models.tiny_llama(), tmp_path)
    save_routed(tmp_path, ready.routed.router, ready.bank)
    assert {p.name for p in tmp_path.iterdir()} == {"router.safetensors", "task_0", "task_1", "task_2"}
    with pytest.raises(MisconfigurationException, match="has adapter layers already"):
        load_routed(models.lora(models.tiny_llama()), tmp_path)
    with pytest.raises(MisconfigurationException, match=r"No submodule is called 'model\.layers\.0'"):
        load_routed(nn.Sequential(nn.Linear(2, 2)), tmp_path)
    (tmp_path / "task_1" / "adapter_config.json").rename(tmp_path / "moved.json")
    with pytest.raises(FileNotFoundError, match="sends samples to 'task_1'"):
        load_routed(models.tiny_llama(num_hidden_layers=4), tmp_path)
    config = json.loads((tmp_path / "moved.json").read_text())
    config["layers_to_transform"], config["layers_pattern"] = None, None
    (tmp_path / "task_1" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(MisconfigurationException, match="adapters at or below the feature layer"):
        load_routed(models.tiny_llama(num_hidden_layers=4), tmp_path, verify=False)
    monkeypatch.setattr(Expansion, "fingerprint", lambda self: [0.0])
    with pytest.raises(MisconfigurationException, match=r"`seed=0` gives other random numbers here"):
        load_routed(models.tiny_llama(num_hidden_layers=4), tmp_path, verify=False)
