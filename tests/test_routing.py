# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_cl.functional import RecursiveLeastSquares
from lightning_cl.modules.option_scores import option_scores
from lightning_cl.routing import AdapterBank, AnalyticRouter, Expansion, RoutedForward, load_routed, save_routed
from lightning_cl.routing.confusion import RoutingConfusion
from lightning_cl.routing.features import find_feature_layer, pool, prompt_mask, shallow_modules
from lightning_cl.routing.router import BASE, RouteClass, Routes
from lightning_cl.routing.statistics import RouterStatistics
from tests.helpers import models

TASKS = 3
PROMPTS = [torch.arange(4 + 40 * k, 34 + 40 * k) for k in range(TASKS)]  # each task has its own tokens


def prompts(rows: int = 8, length: int = 9, seed: int = 0, pad: int = 0, left: bool = False) -> dict[str, Tensor]:
    """Prompts of mixed tasks and lengths."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.zeros(rows, length + pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row in range(rows):
        n = int(torch.randint(4, length + 1, (1,), generator=generator))
        tokens = PROMPTS[row % TASKS][torch.randint(30, (n,), generator=generator)]
        where = slice(ids.shape[1] - n, None) if left else slice(0, n)
        ids[row, where], mask[row, where] = tokens, 1
    return {"input_ids": ids, "attention_mask": mask}


class Setup:
    """A PEFT model with three adapters that differ, and a router fitted on its features."""

    def __init__(self, min_margin: float | None = None, general: bool = False, **config: Any) -> None:
        self.model = models.lora(models.tiny_llama(num_hidden_layers=4, **config))
        self.module = models.PlainLM(self.model)
        self.layer = find_feature_layer(self.module)
        self.bank = AdapterBank(self.module, self.layer)
        generator = torch.Generator().manual_seed(5)
        for k in range(TASKS):
            self.bank.add(f"task_{k}")
            for name, parameter in self.bank.parameters(f"task_{k}").items():
                if "lora_B" in name:
                    parameter.data.normal_(std=0.3, generator=generator)
        self.bank.activate("task_0")
        self.module.eval()
        self.routed = RoutedForward(self.module, self.layer, self.bank).attach()
        expansion = Expansion(32, 128)
        solver = RecursiveLeastSquares(128, ridge=1e-2)
        rows = prompts(rows=60, seed=1)
        features = expansion(self.routed.features(rows["attention_mask"].bool(), **rows))
        labels = torch.arange(60) % TASKS
        solver.update(features, labels)
        classes = [RouteClass(f"t{k}", f"task_{k}") for k in range(TASKS)]
        if general:
            classes[1] = RouteClass("general", BASE)
        self.routed.router = AnalyticRouter(self.layer, expansion, classes, solver.weight, min_margin=min_margin)


@pytest.fixture
def ready() -> Setup:
    return Setup()


# ---------------------------------------------------------------------- features


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


# ---------------------------------------------------------------------- routing inside the pass


def reference(ready: Setup, batch: dict[str, Tensor]) -> tuple[list[str], Tensor]:
    """One by one: features, route, and a run with that adapter active, without any of our hooks."""
    ready.routed.detach()
    names, outputs = [], []
    for row in range(len(batch["input_ids"])):
        keep = batch["attention_mask"][row].bool()
        ids = batch["input_ids"][row][keep][None]
        hidden: list[Tensor] = []
        blocks = ready.model.base_model.model.model.layers
        handle = blocks[0].register_forward_hook(
            lambda m, a, o, h=hidden: h.append(o[0] if isinstance(o, tuple) else o)
        )
        ready.model(input_ids=ids)
        handle.remove()
        router = ready.routed.router
        features = torch.relu(hidden[0][0].mean(0) @ router.expansion.matrix())
        names.append(f"task_{int((features.double() @ router.weight).argmax())}")
        ready.model.set_adapter(names[-1])
        outputs.append(ready.model(input_ids=ids).logits[0])
    ready.routed.attach()
    return names, torch.nn.utils.rnn.pad_sequence(outputs, batch_first=True)


def test_mixed_batch_equals_one_by_one(ready):
    batch = prompts()
    with torch.no_grad():
        names, expected = reference(ready, batch)
        found = ready.model(**batch).logits
    assert names == [f"task_{row % TASKS}" for row in range(8)]
    assert ready.routed.last.adapters == names
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(found[real], expected[real], atol=1e-5, rtol=1e-4)


def test_routed_equals_the_routes_given_from_the_start_and_pefts_own(ready):
    batch = prompts()
    with torch.no_grad():
        found = ready.model(**batch).logits
        names = ready.routed.last.adapters
        with ready.routed.given(names):
            assert torch.equal(ready.model(**batch).logits, found)
        ready.routed.detach()
        pefts_own = ready.model(**batch, adapter_names=names).logits
    torch.testing.assert_close(found, pefts_own, atol=1e-5, rtol=1e-4)


def test_answers_are_not_seen_by_the_router(ready):
    batch = prompts()
    answer = PROMPTS[2][:3].repeat(8, 1)  # tokens of another task
    rows = [torch.cat([batch["input_ids"][i][batch["attention_mask"][i].bool()], answer[i]]) for i in range(8)]
    labels = [torch.cat([torch.full((len(row) - 3,), -100), row[-3:]]) for row in rows]
    whole = models.collate(
        [{"input_ids": r, "attention_mask": torch.ones_like(r), "labels": y} for r, y in zip(rows, labels, strict=True)]
    )
    with torch.no_grad():
        ready.model(**batch)
        scores = ready.routed.last.scores
        ready.model(**whole)  # the network sees the labels
        torch.testing.assert_close(ready.routed.last.scores, scores, atol=1e-5, rtol=1e-4)
        labels = whole.pop("labels")
        ready.routed.prompt = prompt_mask(whole["attention_mask"], labels)  # the module computes its loss itself
        ready.model(**whole)
        torch.testing.assert_close(ready.routed.last.scores, scores, atol=1e-5, rtol=1e-4)
        ready.routed.prompt = None
        ready.model(**whole)
        assert not torch.allclose(ready.routed.last.scores, scores, atol=1e-3)


@pytest.mark.parametrize(
    "options", [{}, {"use_cache": False}, {"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}]
)
def test_generate_keeps_the_routes_of_the_prompt(ready, options):
    batch = prompts(left=True)
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, **options}
    copies = settings.get("num_return_sequences", 1)
    calls: list[list[str]] = []
    ready.routed.on_routes = lambda routes: calls.append(routes.adapters)
    torch.manual_seed(3)
    found = ready.model.generate(**batch, **settings)
    assert len(calls) == 1  # the prompt, and no decode step
    ready.routed.detach()
    expected = [f"task_{row % TASKS}" for row in range(8)]
    torch.manual_seed(3)
    given = ready.model.generate(**batch, adapter_names=[n for n in expected for _ in range(copies)], **settings)
    assert torch.equal(found, given)
    assert "generate" not in vars(ready.model)


def test_a_call_with_adapters_named_by_the_user_wins(ready):
    batch = prompts()
    with torch.no_grad():
        found = ready.model(**batch, adapter_names=["task_2"] * 8).logits
        with ready.routed.given("task_2"):
            assert torch.equal(ready.model(**batch).logits, found)
        with (
            pytest.raises(ValueError, match="3 adapters were given for a batch of 8 samples"),
            ready.routed.given(["a"] * 3),
        ):
            ready.model(**batch)


@pytest.mark.parametrize("share_prompt", [True, False])
def test_options_scored_on_a_cached_prompt_take_the_prompts_routes(ready, share_prompt, monkeypatch):
    # Chunks of rows that are continued from a copy of the cache, in another number than the prompts were.
    monkeypatch.setattr("lightning_cl.modules.option_scores._rows_at_once", lambda *args: 4)
    batch = prompts(left=True)
    options = torch.randint(4, 128, (8, 2, 3))
    batch |= {"option_ids": options, "option_mask": torch.ones_like(options, dtype=torch.bool)}
    with torch.no_grad():
        ready.routed.prompt = prompt_mask(batch["attention_mask"], None)
        found = option_scores(ready.model, batch, share_prompt=share_prompt)
        expected = []
        for row in range(8):  # the routes given by hand, one row at a time
            with ready.routed.given(f"task_{row % TASKS}"):
                one = {k: v[row : row + 1] for k, v in batch.items()}
                expected.append(option_scores(ready.model, one, share_prompt=False))
    torch.testing.assert_close(found, torch.cat(expected), atol=1e-4, rtol=1e-4)


def test_rows_that_continue_from_an_unknown_cache_are_refused(ready):
    batch = prompts()
    with torch.no_grad():
        first = ready.model(**batch, use_cache=True).past_key_values
        ready.model(**prompts(rows=6, seed=5))
        with pytest.raises(ValueError, match="8 rows continue from a cache, but the 6 prompts that were routed last"):
            ready.model(input_ids=batch["input_ids"][:, :1], past_key_values=first)


def test_base_answers_below_the_margin_and_for_the_general_class():
    batch = prompts()
    sure, general = Setup(min_margin=10.0), Setup(general=True)
    with torch.no_grad():
        found = sure.model(**batch).logits
        assert sure.routed.last.adapters == [BASE] * 8
        assert sure.routed.last.names == [f"t{row % TASKS}" for row in range(8)]
        with sure.model.disable_adapter():
            assert torch.equal(sure.model(**batch).logits, found)
        general.model(**batch)
    assert general.routed.last.adapters[:3] == ["task_0", BASE, "task_2"]
    assert general.routed.last.names[1] == "general"
    assert bool((general.routed.last.margin > 0).all())


def test_training_paused_and_detached_leave_the_active_adapter(ready):
    batch = prompts()
    ready.bank.activate("task_1")
    with torch.no_grad(), ready.routed.given("task_1"):
        expected = ready.model(**batch).logits
    ready.routed.last = None
    with torch.no_grad():
        with ready.routed.paused():
            assert torch.equal(ready.model(**batch).logits, expected)
        ready.module.train()
        assert torch.equal(ready.model(**batch).logits, expected)
        ready.module.eval()
        ready.routed.detach()
        assert torch.equal(ready.model(**batch).logits, expected)
    assert ready.routed.last is None
    assert not ready.routed.attached
    assert all(not part._forward_hooks and not part._forward_pre_hooks for part in ready.module.modules())


def test_an_exception_in_a_call_does_not_spoil_the_next_one(ready):
    batch = prompts()
    with pytest.raises(Exception, match=r"[Ss]hape|size|dimension|target"):
        ready.model(**batch, labels=torch.zeros(3, 3, dtype=torch.long))
    with torch.no_grad():
        ready.model(**batch)
    assert ready.routed.last.adapters == [f"task_{row % TASKS}" for row in range(8)]


def test_packed_batch_is_refused(ready):
    ids = torch.randint(4, 30, (1, 10))
    positions = torch.cat([torch.arange(6), torch.arange(4)])[None]
    with pytest.raises(ValueError, match="packs several samples into one row"):
        ready.model(input_ids=ids, position_ids=positions)


def test_compiled_networks_are_routed_too():
    plain, compiled = Setup(), Setup()
    batch = prompts()
    with torch.no_grad():
        expected = plain.model(**batch).logits
        compiled.routed.detach()
        for block in compiled.model.base_model.model.model.layers:
            block.compile(backend="eager")
        compiled.model(**batch)  # compiled without hooks
        compiled.routed.attach()
        torch.testing.assert_close(compiled.model(**batch).logits, expected)
    assert compiled.routed.last.adapters == plain.routed.last.adapters


# ---------------------------------------------------------------------- adapters


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


# ---------------------------------------------------------------------- router and files


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
        load_routed(models.tiny_llama(num_hidden_layers=4), tmp_path)
    monkeypatch.setattr(Expansion, "fingerprint", lambda self: [0.0])
    with pytest.raises(MisconfigurationException, match=r"`seed=0` gives other random numbers here"):
        load_routed(models.tiny_llama(num_hidden_layers=4), tmp_path)


# ---------------------------------------------------------------------- statistics and confusion


def test_statistics_are_the_joint_solution_and_resume_to_the_bit():
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(30, 8, generator=generator) + k for k in range(3)]

    def fit(resume_at: int | None) -> Tensor:
        statistics, number = RouterStatistics(16, 0.5, seed=0), 0
        for task in range(3):
            statistics.restart_task()
            label = statistics.label(f"t{task}", f"task_{task}")
            for block in rows[task].split(7):
                statistics.observe(block, label)
                number += 1
                if number == resume_at:
                    state, statistics = statistics.state_dict(), RouterStatistics(16, 0.5, seed=0)
                    statistics.load_state_dict(state)
            statistics.end_task()
        return statistics.weight()[0]

    whole = fit(None)
    features = torch.relu(torch.cat(rows) @ Expansion(8, 16).matrix()).double()
    targets = torch.eye(3, dtype=torch.float64).repeat_interleave(30, 0)
    expected = torch.linalg.solve(features.T @ features + 0.5 * torch.eye(16), features.T @ targets)
    torch.testing.assert_close(whole, expected, atol=1e-9, rtol=1e-7)
    for at in (2, 5, 8, 13):
        assert torch.equal(fit(at), whole)


def test_statistics_show_the_running_task_without_touching_it():
    statistics = RouterStatistics(16, "auto", seed=0)
    label = statistics.label("a", "task_0")
    statistics.observe(torch.randn(20, 4), label)
    weight, seen = statistics.weight(running=True)
    assert weight.shape == (16, 1)
    assert seen == [True]
    assert statistics.rows_in_task == 20
    assert statistics.total.num_classes == 0
    statistics.restart_task()
    assert statistics.rows_in_task == 0
    with pytest.raises(ValueError, match="gives 5 numbers a sample, but the router was fitted on 4"):
        statistics.observe(torch.randn(2, 5), label)
    with pytest.raises(ValueError, match="has `expansion_dim=16`, this one `expansion_dim=8`"):
        RouterStatistics(8, "auto", seed=0).load_state_dict(statistics.state_dict())


def test_confusion_counts_tasks_bases_and_probes(tmp_path):
    confusion = RoutingConfusion()
    assert confusion.accuracy() is None
    confusion.start()
    routes = SimpleNamespace(names=["a", "b", "a", "a"], adapters=["task_0", "task_1", BASE, "task_0"])
    confusion.add("a", routes)
    confusion.add("b", Routes(["general"], [BASE], torch.zeros(1), torch.zeros(1, 2)))
    confusion.add("probe", Routes(["b"], ["task_1"], torch.zeros(1), torch.zeros(1, 2)))
    assert confusion.finish(["a", "b"]) == pytest.approx(2 / 5)
    assert confusion.accuracy(1) == pytest.approx(2 / 5)
    assert confusion.table().splitlines() == [
        "| task | a | b | general | base | accuracy |",
        "| --- | --- | --- | --- | --- | --- |",
        "| a | 2 | 1 | 0 | 1 | 50.0 % |",
        "| b | 0 | 0 | 1 | 0 | 0.0 % |",
        "| probe | 0 | 1 | 0 | 0 | - |",
    ]
    confusion.plot(tmp_path / "confusion.png")
    assert (tmp_path / "confusion.png").stat().st_size > 1000
    again = RoutingConfusion()
    again.load_state_dict(confusion.state_dict())
    assert again.table() == confusion.table()


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
@pytest.mark.parametrize("method", ["cholesky", "woodbury"])
def test_the_fit_on_the_device_is_that_of_the_cpu(method):
    features, labels = torch.randn(300, 40), torch.arange(300) % 3
    here, there = RecursiveLeastSquares(40, method=method), RecursiveLeastSquares(40, method=method)
    for rows, wanted in zip(features.split(70), labels.split(70), strict=True):
        here.update(rows, wanted)
        there.update(rows.cuda(), wanted.cuda())
    assert there.weight.is_cuda
    torch.testing.assert_close(there.weight.cpu(), here.weight, atol=1e-10, rtol=1e-8)
    if method == "cholesky":
        assert there.choose_ridge() == pytest.approx(here.choose_ridge(), rel=1e-9)
