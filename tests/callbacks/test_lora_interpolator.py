# SPDX-License-Identifier: Apache-2.0
"""I-LoRA in a real Trainer: the average moves, the slow forward is exact, and both sets of weights are kept apart."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_cl import weights
from lightning_cl.callbacks import LoRAInterpolator
from lightning_cl.functional.interpolation import half_life_to_decay, warmup_decay
from lightning_cl.replay import EpisodicMemory
from tests.callbacks.interpolator_tools import (
    Recorder,
    Watch,
    assert_same,
    average_of,
    copy_of,
    fit,
    loss_of,
    make_mixer,
    make_module,
)
from tests.helpers import models

# ------------------------------------------------------------------- the average moves


def test_one_step_is_the_formula(tmp_path: Path) -> None:
    module, callback = make_module(), Recorder(decay=0.25, warmup=False, evaluate_with="fast", consistency_weight=0)
    initial = copy_of(weights.trainable(module))
    fit(tmp_path, module, [callback], max_steps=1)
    assert_same(callback.slow_weights(), average_of(initial, callback.fast, [0.25]), rtol=0, atol=1e-6)


def test_the_slow_weights_leave_the_start_and_are_not_the_fast_ones(tmp_path: Path) -> None:
    module, callback = make_module(), LoRAInterpolator(evaluate_with="fast", consistency_weight=0)
    initial = copy_of(weights.trainable(module))
    fit(tmp_path, module, [callback], max_steps=4)
    fast, slow = copy_of(weights.trainable(module)), callback.slow_weights()
    for name in initial:
        assert not torch.allclose(slow[name], initial[name], atol=1e-6), name
        assert not torch.allclose(slow[name], fast[name], atol=1e-6), name


@pytest.mark.parametrize(
    ("settings", "accumulate", "steps"),
    [
        ({"half_life": 0.2}, 1, 8),
        ({"half_life": 0.2, "warmup": False}, 1, 8),
        ({"decay": 0.9}, 2, 4),
        ({"half_life": 0.5, "warmup": False, "update_every_n_steps": 2}, 1, 8),
    ],
)
def test_whole_run_is_the_naive_average(tmp_path: Path, settings: dict[str, Any], accumulate: int, steps: int) -> None:
    module, callback = make_module(), Recorder(evaluate_with="fast", consistency_weight=0, **settings)
    initial = copy_of(weights.trainable(module))
    fit(tmp_path, module, [callback], max_steps=-1, max_epochs=2, accumulate_grad_batches=accumulate)
    assert len(callback.fast) == steps  # one a step of the optimizer, not one a batch
    every = settings.get("update_every_n_steps", 1)
    points = callback.fast[every - 1 :: every]
    decay = settings.get("decay") or half_life_to_decay(settings["half_life"], steps // every)
    decays = [warmup_decay(decay, k + 1) if settings.get("warmup", True) else decay for k in range(len(points))]
    assert_same(callback.slow_weights(), average_of(initial, points, decays), rtol=0, atol=1e-6)


def test_should_update_can_be_overridden(tmp_path: Path) -> None:
    class Never(LoRAInterpolator):
        def should_update(self, step_idx: int) -> bool:
            return False

    module, callback = make_module(), Never(evaluate_with="fast", consistency_weight=0)
    initial = copy_of(weights.trainable(module))
    fit(tmp_path, module, [callback])
    assert_same(callback.slow_weights(), initial)


def test_warm_up_counts_over_tasks(tmp_path: Path) -> None:
    module, callback = make_module(), Recorder(decay=0.9, evaluate_with="fast", consistency_weight=0)
    initial = copy_of(weights.trainable(module))
    for seed in range(2):
        fit(tmp_path, module, [callback], models.loader(seed=seed))
    decays = [warmup_decay(0.9, k) for k in range(1, 9)]
    assert_same(callback.slow_weights(), average_of(initial, callback.fast, decays), rtol=0, atol=1e-6)


def test_low_precision_weights_have_float32_averages_that_go_on_over_tasks(tmp_path: Path) -> None:
    module = make_module().to(torch.bfloat16)
    callback = Recorder(decay=0.9, warmup=False, consistency_weight=0)
    initial = copy_of(weights.trainable(module))
    fit(tmp_path, module, [callback], precision="bf16-true")
    first = callback.slow_weights()
    assert_same(first, average_of(initial, callback.fast, [0.9] * 4), rtol=0, atol=1e-6)
    fit(tmp_path, module, [callback], precision="bf16-true")
    # The module holds the rounded average, and the average itself is not rounded.
    assert_same(callback.slow_weights(), average_of(first, callback.fast[4:], [0.9] * 4), rtol=0, atol=1e-6)


# ------------------------------------------------------------- consistency on memory rows


def test_memory_is_filled_its_rows_have_gradient_and_the_slow_forward_is_exact(tmp_path: Path) -> None:
    module, mixer = make_module(), make_mixer()
    callback = Recorder(half_life=0.5, consistency_weight=3.0, evaluate_with="fast", layers="all")
    fit(tmp_path, module, [mixer, callback], models.loader(seed=0))
    assert mixer.sources[0].available() == 16  # type: ignore[attr-defined]
    assert not callback.steps  # nothing to replay in the first task
    fit(tmp_path, module, [mixer, callback], models.loader(seed=1))
    assert len(callback.steps) == 4
    blocks = "model.base_model.model.model"
    for record in callback.steps:
        expected = []
        for name in (f"{blocks}.layers.0", f"{blocks}.norm"):
            states: dict[str, Tensor] = {}
            for side in ("slow", "fast"):
                with torch.no_grad(), weights.swapped(module, record[side]):
                    states[side] = _output_of(module, name, record["rows"])
            torch.testing.assert_close(record["step"].reference["slow"][name], states["slow"], rtol=0, atol=1e-6)
            torch.testing.assert_close(record["step"].activations[name].detach(), states["fast"], rtol=0, atol=1e-5)
            expected.append(float((states["fast"] - states["slow"]).pow(2).mean()))
        assert float(record["term"]) == pytest.approx(3.0 * sum(expected) / 2, rel=1e-3, abs=1e-9)
        gradient = record["step"].activations[f"{blocks}.norm"].grad
        assert gradient.shape[0] == 2  # the two memory rows
        assert gradient.abs().sum() > 0
    assert float(callback.steps[-1]["term"]) > 0


def _output_of(module: pl.LightningModule, name: str, rows: dict[str, Tensor]) -> Tensor:
    seen = []
    handle = module.get_submodule(name).register_forward_hook(lambda m, a, out: seen.append(out))
    module.eval()
    module.model(**rows)
    handle.remove()
    return seen[0][0] if isinstance(seen[0], tuple) else seen[0]


def test_consistency_holds_the_fast_weights_near_the_slow_ones(tmp_path: Path) -> None:
    gaps = []
    for weight in (0.0, 10.0):
        module = make_module(lr=0.01)
        callback = LoRAInterpolator(decay=0.99, consistency_weight=weight, evaluate_with="fast")
        mixer = make_mixer()
        for seed in range(2):
            fit(tmp_path, module, [mixer, callback], models.loader(seed=seed), max_steps=8, max_epochs=2)
        fast, slow = copy_of(weights.trainable(module)), callback.slow_weights()
        gaps.append(sum(float((fast[n] - slow[n]).pow(2).sum()) for n in slow))
    assert gaps[1] < gaps[0]


def test_padding_changes_nothing(tmp_path: Path) -> None:
    def wide(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        fills = {"input_ids": 0, "attention_mask": 0, "labels": -100}
        return {k: nn.functional.pad(v, (0, 7), value=fills[k]) for k, v in models.collate(rows).items()}

    results = []
    for collate in (models.collate, wide):
        module, mixer = make_module(), make_mixer()
        callback = LoRAInterpolator(half_life=0.3, consistency_weight=5.0, layers="all", evaluate_with="fast")
        for seed in range(2):
            data = torch.utils.data.DataLoader(models.TokenRows(16, ragged=True, seed=seed), 4, collate_fn=collate)
            fit(tmp_path, module, [mixer, callback], data)
        results.append((callback.slow_weights(), copy_of(weights.trainable(module))))
    assert_same(results[1][0], results[0][0], rtol=1e-5, atol=1e-6)
    assert_same(results[1][1], results[0][1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 1, 0)])
def test_tasks_in_any_order(tmp_path: Path, order: tuple[int, ...]) -> None:
    module, mixer, callback = make_module(), make_mixer(), LoRAInterpolator()
    for task in order:
        trainer = fit(tmp_path, module, [mixer, callback], models.loader(seed=task))
    assert "cl/consistency" in trainer.callback_metrics
    assert_same(copy_of(weights.trainable(module)), callback.slow_weights())
    assert callback.task_index == 3


def test_manual_optimization(tmp_path: Path) -> None:
    class Manual(models.PlainLM):
        automatic_optimization = False

        def __init__(self, model: Any) -> None:
            super().__init__(model)
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(self.model(**batch).loss)
            optimizer.step()

    module, mixer = Manual(models.lora(models.tiny_llama())), make_mixer()
    callback = Recorder(decay=0.5, warmup=False, evaluate_with="fast")
    initial = copy_of(weights.trainable(module))
    for seed in range(2):
        fit(tmp_path, module, [mixer, callback], models.loader(seed=seed))
    assert_same(callback.slow_weights(), average_of(initial, callback.fast, [0.5] * 8), rtol=0, atol=1e-6)
    assert len(callback.steps) == 4


@pytest.mark.slow
def test_compiled_network_runs_the_slow_forward(tmp_path: Path) -> None:
    results = []
    for compiled in (False, True):
        module, mixer = make_module(), make_mixer()
        callback = LoRAInterpolator(half_life=0.5, consistency_weight=5.0, evaluate_with="fast")
        if compiled:
            module.model = torch.compile(module.model, backend="eager")
        for seed in range(2):
            trainer = fit(tmp_path, module, [mixer, callback], models.loader(seed=seed))
        results.append((callback.slow_weights(), trainer.callback_metrics["cl/consistency"]))
    assert_same(results[1][0], results[0][0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(results[1][1], results[0][1], rtol=1e-3, atol=1e-8)


# --------------------------------------------------------------- evaluation and the end


@pytest.mark.parametrize("evaluate_with", ["slow", "fast"])
def test_validation_and_the_module_afterwards_have_the_set_that_was_asked_for(
    tmp_path: Path, evaluate_with: str
) -> None:
    module, watch = make_module(), Watch()
    callback = Recorder(decay=0.5, warmup=False, evaluate_with=evaluate_with, consistency_weight=0)
    initial = copy_of(weights.trainable(module))
    settings = {"max_steps": -1, "max_epochs": 2, "num_sanity_val_steps": 1}
    trainer = models.trainer(tmp_path, callbacks=[callback, watch], **settings)
    trainer.fit(module, models.loader(), models.loader(rows=4, seed=9))
    slow = [average_of(initial, callback.fast[:n], [0.5] * n) for n in (0, 4, 8)]
    fast = [initial, callback.fast[3], callback.fast[7]]
    assert len(watch.during) == 3  # the check before training is one of them
    for during, wanted in zip(watch.during, slow if evaluate_with == "slow" else fast, strict=True):
        assert_same(during, wanted, rtol=0, atol=1e-6)
    for after, wanted in zip(watch.after, fast, strict=True):
        assert_same(after, wanted)
    wanted = callback.slow_weights() if evaluate_with == "slow" else callback.fast[-1]
    assert_same(copy_of(weights.trainable(module)), wanted)
    assert float(trainer.callback_metrics["val_loss"]) == pytest.approx(loss_of(module), abs=1e-5)


def test_exception_in_validation_restores_the_fast_weights(tmp_path: Path) -> None:
    module = make_module()
    callback = Recorder(decay=0.9, consistency_weight=0)
    trainer = models.trainer(tmp_path, callbacks=[callback, Watch(fail=True)], max_steps=-1, max_epochs=2)
    with pytest.raises(RuntimeError, match="broken metric"):
        trainer.fit(module, models.loader(), models.loader(rows=4, seed=9))
    assert_same(copy_of(weights.trainable(module)), callback.fast[-1])
    # The run can go on from there.
    fit(tmp_path, module, [callback])
    assert len(callback.fast) == 8


def test_weights_changed_between_tasks_are_the_new_start(tmp_path: Path) -> None:
    module, callback = make_module(), LoRAInterpolator(decay=0.5, consistency_weight=0)
    fit(tmp_path, module, [callback])
    with torch.no_grad():
        for parameter in weights.trainable(module).values():
            parameter.fill_(0.5)
    recorder = Recorder(decay=0.5, warmup=False, consistency_weight=0)
    recorder._average, recorder._clock = callback._average, callback._clock
    changed = copy_of(weights.trainable(module))
    fit(tmp_path, module, [recorder])
    assert_same(recorder.slow_weights(), average_of(changed, recorder.fast, [0.5] * 4), rtol=0, atol=1e-6)


# ------------------------------------------------------------------- which parameters


def test_all_that_trains_beside_the_adapters_is_averaged_and_the_base_is_not(tmp_path: Path) -> None:
    network = models.lora(models.tiny_llama(), modules_to_save=["lm_head"])
    callback = LoRAInterpolator(consistency_weight=0)
    module = models.PlainLM(network)
    fit(tmp_path, module, [callback])
    slow = callback.slow_weights()
    assert set(slow) == set(weights.trainable(module))
    assert sum("modules_to_save" in n for n in slow) == 1
    lora_alone = LoRAInterpolator(consistency_weight=0, parameters="lora")
    fit(tmp_path, module, [lora_alone])
    assert set(lora_alone.slow_weights()) == {n for n in slow if "lora_" in n}


def test_patterns_and_full_training(tmp_path: Path) -> None:
    module = models.PlainLM(models.tiny_llama(tie_word_embeddings=True))
    callback = LoRAInterpolator(consistency_weight=0, parameters="*.mlp.*")
    fit(tmp_path, module, [callback])
    assert set(callback.slow_weights()) == {n for n, _ in module.named_parameters() if ".mlp." in n}
    everything = Recorder(consistency_weight=0, parameters="trainable", decay=0.5, warmup=False, evaluate_with="fast")
    initial = copy_of(weights.trainable(module))
    fit(tmp_path, module, [everything])
    assert "model.lm_head.weight" not in initial  # tied to the embedding: one average for both
    assert_same(everything.slow_weights(), average_of(initial, everything.fast, [0.5] * 4), rtol=0, atol=1e-6)


def test_parameters_that_train_later_join_with_an_average_of_their_own(tmp_path: Path) -> None:
    class Unfreeze(Callback):
        def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            if trainer.current_epoch == 1:
                norm = pl_module.model.base_model.model.model.norm
                norm.requires_grad_(True)
                trainer.optimizers[0].add_param_group({"params": [norm.weight]})

    module = make_module()
    callback = Recorder(decay=0.9, consistency_weight=0, evaluate_with="fast")
    name = "model.base_model.model.model.norm.weight"
    start = {name: module.get_parameter(name).detach().clone()}
    fit(tmp_path, module, [Unfreeze(), callback], max_steps=-1, max_epochs=2)
    assert callback._average.updates[name] == 4
    assert {count for n, count in callback._average.updates.items() if n != name} == {8}
    points = [{name: fast[name]} for fast in callback.fast[4:]]
    expected = average_of(start, points, [warmup_decay(0.9, k) for k in range(1, 5)])
    assert_same({name: callback.slow_weights()[name]}, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("evaluate_with", ["slow", "fast"])
def test_each_adapter_has_an_average_of_its_own(tmp_path: Path, evaluate_with: str) -> None:
    from peft import LoraConfig

    module, callback = make_module(), Recorder(decay=0.9, consistency_weight=0, evaluate_with=evaluate_with)
    fit(tmp_path, module, [callback])
    first = callback.slow_weights()
    module.model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
    module.model.set_adapter("second")
    initial = copy_of(weights.trainable(module))
    fit(tmp_path, module, [callback])
    slow = callback.slow_weights()
    expected = average_of(initial, callback.fast[4:], [warmup_decay(0.9, k) for k in range(1, 5)])
    assert_same({n: slow[n] for n in initial}, expected, rtol=0, atol=1e-6)
    if evaluate_with == "fast":
        assert_same({n: slow[n] for n in first}, first)  # kept for the day when that adapter trains again
    else:
        assert set(slow) == set(initial)  # the first adapter itself holds its average
        assert_same({n: module.get_parameter(n).detach() for n in first}, first)


def test_a_changed_shape_is_refused_by_name(tmp_path: Path) -> None:
    callback = LoRAInterpolator(consistency_weight=0, evaluate_with="fast")
    fit(tmp_path, make_module(), [callback])
    other = models.PlainLM(models.lora(models.tiny_llama(), r=2))
    with pytest.raises(
        MisconfigurationException, match=r"slow weights of 'model.*lora_A.*shape \(4, 32\).*\(2, 32\) now"
    ):
        fit(tmp_path, other, [callback])
    callback.reset()
    fit(tmp_path, other, [callback])


def test_four_bit_base(tmp_path: Path) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    network = models.tiny_llama(hidden_size=64)
    for block in network.model.layers:
        for name in ("q_proj", "v_proj"):
            plain = getattr(block.self_attn, name)
            layer = bitsandbytes.nn.Linear4bit(plain.in_features, plain.out_features, bias=False, quant_type="nf4")
            layer.load_state_dict(plain.state_dict())
            setattr(block.self_attn, name, layer.to("cpu"))
    network.requires_grad_(False)
    module, mixer = models.PlainLM(models.lora(network), lr=0.1), make_mixer()
    callback = Recorder(decay=0.5, warmup=False, evaluate_with="fast")
    initial = copy_of(weights.trainable(module))
    assert all("lora_" in n for n in initial)
    for seed in range(2):
        fit(tmp_path, module, [mixer, callback], models.loader(seed=seed))
    assert_same(callback.slow_weights(), average_of(initial, callback.fast, [0.5] * 8), rtol=0, atol=1e-6)
    assert len(callback.steps) == 4


# ------------------------------------------------------------------------ what it says


def test_a_decay_that_hardly_sees_the_task_warns(tmp_path: Path) -> None:
    slow = LoRAInterpolator(decay=0.999, warmup=False, consistency_weight=0)
    with pytest.warns(
        UserWarning, match=r"decay=0.999.*after the 4 updates.*keep 100% of the weights of before.*0% of"
    ):
        fit(tmp_path, make_module(), [slow])
    with pytest.warns(UserWarning, match=r"half_life=3.*keep 79% of the weights of before"):
        fit(tmp_path, make_module(), [LoRAInterpolator(half_life=3, warmup=False, consistency_weight=0)])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*of the weights of before")
        fit(tmp_path, make_module(), [LoRAInterpolator(consistency_weight=0)], max_steps=12, max_epochs=3)


def test_without_replay_rows_it_averages_alone_and_says_so_once(tmp_path: Path) -> None:
    callback, module = LoRAInterpolator(), make_module()
    with pytest.warns(UserWarning, match="has no replay rows.*only averages.*ReplayMixer"):
        fit(tmp_path, module, [callback])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*has no replay rows")
        fit(tmp_path, module, [callback])
    assert set(callback._average.updates.values()) == {8}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"half_life": 0}, r"half_life=0\)` must be above 0.*fraction of a task's steps"),
        ({"half_life": None}, r"half_life=None, decay=None.*Set one of them"),
        ({"decay": 1.0}, r"decay=1.0\)` must be in \[0, 1\): at 1 the slow weights would never move"),
        ({"decay": -0.1}, r"decay=-0.1\)` must be in"),
        ({"consistency_weight": -1}, r"consistency_weight=-1\)` must be 0 or above"),
        ({"consistency_weight": float("nan")}, r"consistency_weight=nan\)` must be 0 or above"),
        ({"evaluate_with": "both"}, r"evaluate_with='both'\)` is not one of 'slow', 'fast'"),
        ({"consistency": "kl"}, r"consistency='kl'\)` is not one of 'mse', 'one_sided'"),
        ({"export": "all"}, r"export='all'\)` is not one of 'slow', 'fast', None"),
        ({"layers": "first"}, r"layers='first'\)` must be \"last\", \"all\", or a list"),
        ({"layers": []}, r"layers=\[\]\)` must be"),
        ({"parameters": ""}, r"parameters=\"\"\)` names nothing"),
        ({"update_every_n_steps": 0}, r"update_every_n_steps=0\)` must be at least 1"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        LoRAInterpolator(**arguments)


def test_bad_models_are_named(tmp_path: Path) -> None:
    plain = models.PlainLM(models.tiny_llama())
    with pytest.raises(
        MisconfigurationException, match=r"found no PEFT adapter layer in `PlainLM`.*parameters=\"trainable\""
    ):
        fit(tmp_path, plain, [LoRAInterpolator()])
    with pytest.raises(
        MisconfigurationException, match=r"parameters='\*.nope'\)` fits none of the 8 trained parameters"
    ):
        fit(tmp_path, make_module(), [LoRAInterpolator(parameters="*.nope")])
    with pytest.raises(MisconfigurationException, match=r"names block 7, and the model has 2"):
        fit(tmp_path, make_module(), [make_mixer(), LoRAInterpolator(layers=[0, 7])])
    with pytest.raises(MisconfigurationException, match=r"No submodule is called 'norms'"):
        fit(tmp_path, make_module(), [make_mixer(), LoRAInterpolator(layers=["norms"])])
    with pytest.raises(
        MisconfigurationException, match=r"export='slow'\)` writes PEFT adapter folders.*no `PeftModel`"
    ):
        fit(tmp_path, plain, [LoRAInterpolator(parameters="trainable", consistency_weight=0, export="slow")])


def test_a_task_of_unknown_length_is_named(tmp_path: Path) -> None:
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self) -> Any:
            return iter(models.TokenRows(8).rows)

    data = torch.utils.data.DataLoader(Stream(), 4, collate_fn=models.collate)
    with pytest.raises(MisconfigurationException, match=r"half_life=0.1\)` is a fraction.*unknown.*Set `decay`"):
        fit(tmp_path, make_module(), [LoRAInterpolator(consistency_weight=0)], data, max_steps=-1, max_epochs=1)
    fit(tmp_path, make_module(), [LoRAInterpolator(consistency_weight=0, decay=0.5)], data, max_steps=-1, max_epochs=1)


@pytest.mark.parametrize("layers", ["last", "all", [0, "model.norm"], [-1]])
def test_layers_are_read_from_a_config(layers: Any) -> None:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser()
    parser.add_class_arguments(LoRAInterpolator, "callback")
    config = parser.parse_object({"callback": {"layers": layers, "decay": 0.99, "export": "fast"}})
    again = parser.parse_string(parser.dump(config))
    callback = parser.instantiate_classes(again).callback
    assert callback.layers == layers
    assert callback.export == "fast"


# -------------------------------------------------------------------- fragment and card

CATALOGUE = Path(__file__).parents[2] / "callbacks"


def test_the_cards_snippet_runs_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = (CATALOGUE / "lora_interpolator.md").read_text()
    scope: dict[str, Any] = {"__name__": "card"}
    exec(compile(text.split("```python\n")[1].split("```")[0], "card", "exec"), scope)
    assert "cl/consistency" in scope["trainer"].callback_metrics
    assert_same(copy_of(weights.trainable(scope["model"])), scope["average"].slow_weights())


def test_the_fragment_is_read(tmp_path: Path) -> None:
    import yaml
    from jsonargparse import ArgumentParser

    entries = yaml.safe_load((CATALOGUE / "lora_interpolator.yaml").read_text())["trainer"]["callbacks+"]
    parser = ArgumentParser()
    parser.add_argument("--callbacks", type=list[Callback])
    config = parser.parse_object({"callbacks": entries})
    mixer, callback = parser.instantiate_classes(config).callbacks
    assert isinstance(mixer.sources[0], EpisodicMemory)
    module = make_module()
    for seed in range(2):
        trainer = fit(tmp_path, module, [mixer, callback], models.loader(seed=seed))
    assert "cl/consistency" in trainer.callback_metrics


def test_every_argument_is_in_the_card() -> None:
    import inspect

    text = (CATALOGUE / "lora_interpolator.md").read_text()
    for name in list(inspect.signature(LoRAInterpolator.__init__).parameters)[1:]:
        assert f"| `{name}` |" in text, name
