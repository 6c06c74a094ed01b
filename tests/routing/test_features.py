# SPDX-License-Identifier: Apache-2.0
"""What the router sees of a sample."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_cl.routing import Expansion
from lightning_cl.routing.features import find_feature_layer, pool, prompt_mask, shallow_modules
from lightning_cl.routing.router import BASE
from tests.helpers import models
from tests.routing.tools import TASKS, prompts


def test_pool_is_the_mean_over_the_marked_tokens_whatever_lies_elsewhere():
    hidden = torch.randn(3, 5, 4)
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [0, 0, 1, 1, 0]]).bool()
    expected = torch.stack([hidden[i][mask[i]].mean(dim=0) for i in range(3)])
    torch.testing.assert_close(pool(hidden, mask), expected)
    hidden[0, 3] = torch.nan
    torch.testing.assert_close(pool(hidden, mask), expected)
    assert pool(hidden.bfloat16(), mask).dtype == torch.float32


def test_pool_takes_maps_and_vectors():
    maps = torch.randn(2, 3, 4, 5)
    torch.testing.assert_close(pool(maps), maps.mean(dim=(2, 3)))
    assert torch.equal(pool(maps[:, :, 0, 0]), maps[:, :, 0, 0])
    torch.testing.assert_close(pool(maps[:, 0]), maps[:, 0].mean(dim=1))


def test_prompt_mask_ends_at_the_first_label():
    attended = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 0]])
    labels = torch.tensor([[-100, -100, -100, 5, -100], [3, 4, 5, 6, -100]])
    expected = torch.tensor([[False, True, True, False, False], [True, True, True, True, False]])  # row 1 has no prompt
    assert torch.equal(prompt_mask(attended, labels), expected)
    assert torch.equal(prompt_mask(None, labels[:1]), torch.tensor([[True, True, True, False, False]]))
    assert prompt_mask(None, None) is None


def test_expansion_comes_from_its_seed_alone():
    pooled = torch.randn(3, 8)
    first, again, other = Expansion(8, 16, seed=1), Expansion(8, 16, seed=1), Expansion(8, 16, seed=2)
    assert torch.equal(first(pooled), again(pooled))
    assert not torch.equal(first(pooled), other(pooled))
    assert bool((first(pooled) >= 0).all())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(first(pooled), again(pooled))


def test_padding_changes_nothing(ready):
    short, left = prompts(), prompts(left=True)
    long = prompts(pad=7)
    layer = [ready.routed.features(b["attention_mask"].bool(), **b) for b in (short, long)]
    torch.testing.assert_close(layer[0], layer[1], atol=1e-6, rtol=1e-5)
    with torch.no_grad():
        a = ready.model(**short).logits
        routes = ready.routed.last.adapters
        b = ready.model(**long).logits
        assert ready.routed.last.adapters == routes
        positions = (left["attention_mask"].cumsum(1) - 1).clamp_min(0)
        ready.model(**left, position_ids=positions)
        assert ready.routed.last.adapters == routes
    real = short["attention_mask"].bool()
    torch.testing.assert_close(a[real], b[:, : a.shape[1]][real], atol=1e-4, rtol=1e-4)


def test_features_are_the_same_to_the_bit_whichever_adapter_is_active_and_in_training(ready):
    batch, seen = prompts(), []
    mask = batch["attention_mask"].bool()
    ready.routed.on_hidden = lambda hidden, arguments: seen.append(pool(hidden, mask))
    with torch.no_grad():
        for adapter in (*ready.bank.names, BASE):
            with ready.routed.given(adapter):
                ready.model(**batch)
        ready.model.set_adapter("default")  # it has layers below the feature layer
        ready.model(**batch)  # routed
        ready.routed.features(mask, **batch)
    for adapter in ready.bank.names:
        ready.bank.activate(adapter)
        ready.model.train()
        ready.model(**batch, labels=batch["input_ids"]).loss.backward()
        ready.model.eval()
    seen.append(ready.routed.features(mask, **batch))
    assert len(seen) == TASKS + 3 + TASKS + 2  # `features` passes the layer's own hook as well
    assert all(torch.equal(s, seen[0]) for s in seen)


@pytest.mark.parametrize(("depth", "expected"), [(2, 0), (4, 0), (16, 1), (32, 3)])
def test_auto_is_an_eighth_of_the_depth(depth, expected):
    model = models.tiny_llama(num_hidden_layers=depth, hidden_size=8, intermediate_size=8)
    assert find_feature_layer(model) == f"model.layers.{expected}"


def test_feature_layer_by_number_and_by_name():
    model = models.tiny_llama(num_hidden_layers=4)
    assert find_feature_layer(model, 3) == "model.layers.2"
    assert find_feature_layer(model, "layers.1.mlp") == "model.layers.1.mlp"
    for wrong in (0, 4):
        with pytest.raises(MisconfigurationException, match=rf"`feature_layer={wrong}` leaves no block.*from 1 to 3"):
            find_feature_layer(model, wrong)
    with pytest.raises(MisconfigurationException, match=r"No submodule is called 'model.layer.1'.*model\.layers\.1"):
        find_feature_layer(model, "model.layer.1")
    below = shallow_modules(model, "model.layers.1")
    assert {"model.embed_tokens", "model.layers.0.mlp", "model.layers.1", "model.layers.1.self_attn.q_proj"} <= below
    assert not below & {"", "model", "model.layers", "model.layers.2", "lm_head", "model.norm"}


def test_a_network_without_blocks_counts_its_layers():
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(3, 2))
    assert find_feature_layer(net) == "0"
    assert find_feature_layer(net, 2) == "2"
