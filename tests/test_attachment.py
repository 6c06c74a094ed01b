# SPDX-License-Identifier: Apache-2.0
"""The attachment: one loss for the optimizer, reference passes that leave no trace, and a module left as it was."""

from __future__ import annotations

import dataclasses
from collections import namedtuple
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_cl import replay_rows
from lightning_cl.anatomy import find_final_norm
from lightning_cl.attachment import Attachment
from lightning_cl.callbacks import ContinualCallback, ReplayMixer
from lightning_cl.replay import GeneralSamples
from lightning_cl.strategies import CLSingleDeviceStrategy
from lightning_cl.strategies.blocks import find_shard_blocks, is_compiled, prepare_blocks
from lightning_cl.weights import adapters_disabled
from tests.helpers import models, waits


class Probe(ContinualCallback):
    """Asks the attachment for everything it offers, and keeps what each step gave."""

    def __init__(
        self, reference: bool = False, term: Any = None, watch: str | None = None, name: str = "probe"
    ) -> None:
        super().__init__()
        self.name = name
        self.reference = reference
        self.term = term or (lambda step: None)
        self.watch = watch
        self.steps: list[dict[str, Any]] = []

    @property
    def state_key(self) -> str:
        return self._generate_state_key(name=self.name)

    def on_task_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        name = self.watch or find_final_norm(pl_module)
        self.attachment.watch(self, name)
        if self.reference:
            self.attachment.add_reference(self, "initial", lambda: adapters_disabled(pl_module))
        self.attachment.add_loss(self, self.name, self._keep)

    def _keep(self, step: Any) -> Tensor | None:
        name = next(iter(step.activations), None)
        self.steps.append(
            {
                "ids": step.replay.ids,
                "layout": step.replay.layout,
                "mask": step.replay.token_mask,
                "hidden": step.activations[name].detach().clone() if name else None,
                "reference": {k: v[name].clone() for k, v in step.reference.items()} if name else {},
                "task_loss": step.task_loss,
            }
        )
        return self.term(step)


def _general(rows: int = 6, **kwargs: Any) -> GeneralSamples:
    return GeneralSamples(models.TokenRows(rows, seed=9, **kwargs), num_samples=rows)


def _gradients(module: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


class KeepGradients(pl.Callback):
    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.steps.append(_gradients(pl_module))


def _fit(
    tmp_path: Any, module: pl.LightningModule, callbacks: list[pl.Callback], loader: Any = None, **kwargs: Any
) -> Any:
    keep = KeepGradients()
    trainer = models.trainer(tmp_path, callbacks=[*callbacks, keep], **{"max_steps": 1, **kwargs})
    trainer.fit(module, loader or models.loader())
    return trainer, keep.steps


@pytest.mark.parametrize("layout", ["joined", "separate"])
@pytest.mark.parametrize("ragged", [False, True])
def test_gradient_equals_one_batch_written_by_hand(tmp_path: Any, layout: str, ragged: bool) -> None:
    """Both layouts give the gradient of the module's own mean over task and replay tokens."""
    module = models.PlainLM(models.tiny_llama())
    source = _general(ragged=ragged)
    probe = Probe(term=lambda step: 0.0 * step.activations[find_final_norm(module)].sum())
    _, steps = _fit(
        tmp_path, module, [ReplayMixer(source, rows_per_batch=2, layout=layout), probe], models.loader(ragged=ragged)
    )
    drawn = [int(name.split(":")[1]) for name in probe.steps[0]["ids"]]
    assert probe.steps[0]["layout"] == layout
    reference = models.PlainLM(models.tiny_llama())
    task = [models.TokenRows(16, ragged=ragged)[i] for i in range(4)]
    replay = [models.TokenRows(6, seed=9, ragged=ragged)[i] for i in drawn]
    reference.model(**models.collate(task + replay)).loss.backward()
    for name, gradient in _gradients(reference).items():
        torch.testing.assert_close(steps[0][name], gradient, atol=1e-6, rtol=1e-5, msg=name)


def test_terms_add_up_in_order_and_are_logged(tmp_path: Any) -> None:
    module = models.PlainLM(models.tiny_llama())
    name = find_final_norm(module)
    first = Probe(term=lambda step: step.activations[name].square().mean())
    second = Probe(term=lambda step: torch.tensor(2.0), name="second")
    trainer, steps = _fit(tmp_path, module, [ReplayMixer(_general(), rows_per_batch=2), first, second])
    reference = models.PlainLM(models.tiny_llama())
    drawn = [int(i.split(":")[1]) for i in first.steps[0]["ids"]]
    batch = models.collate(
        [models.TokenRows(16)[i] for i in range(4)] + [models.TokenRows(6, seed=9)[i] for i in drawn]
    )
    hidden: list[Tensor] = []
    handle = reference.model.model.norm.register_forward_hook(lambda m, a, o: hidden.append(o))
    loss = reference.model(**batch).loss
    handle.remove()
    (loss + hidden[0][4:].square().mean()).backward()
    for key, gradient in _gradients(reference).items():
        torch.testing.assert_close(steps[0][key], gradient, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(trainer.callback_metrics["train_loss"], loss.detach())
    assert trainer.callback_metrics["cl/second"] == 2.0
    torch.testing.assert_close(trainer.callback_metrics["cl/second_ratio"], 2.0 / loss.detach())


@pytest.mark.parametrize("layout", ["joined", "separate"])
def test_reference_pass_is_the_model_without_adapters(tmp_path: Any, layout: str) -> None:
    """The reference equals the base model's own run on the replay rows, and the step's gradients do not change."""
    base = models.tiny_llama(attention_dropout=0.5)
    module = models.PlainLM(models.lora(models.tiny_llama(attention_dropout=0.0)))
    probe = Probe(reference=True)
    _, with_reference = _fit(
        tmp_path, module, [ReplayMixer(_general(ragged=True), rows_per_batch=2, layout=layout), probe]
    )
    plain = models.PlainLM(models.lora(models.tiny_llama()))
    _, without = _fit(tmp_path, plain, [ReplayMixer(_general(ragged=True), rows_per_batch=2, layout=layout), Probe()])
    assert with_reference[0].keys() == without[0].keys()
    for key, gradient in without[0].items():
        assert torch.equal(with_reference[0][key], gradient)
    rows = models.TokenRows(6, seed=9, ragged=True)
    batch = models.collate([rows[int(i.split(":")[1])] for i in probe.steps[0]["ids"]])
    base.eval()
    expected = base.model(batch["input_ids"], batch["attention_mask"]).last_hidden_state
    mask = probe.steps[0]["mask"]
    assert mask.sum() == batch["attention_mask"].sum()
    reference = probe.steps[0]["reference"]["initial"]
    torch.testing.assert_close(reference[mask], expected[batch["attention_mask"].bool()], atol=1e-6, rtol=1e-5)
    assert not torch.allclose(reference[mask], probe.steps[0]["hidden"][mask])
    assert all(part.training for part in module.modules())


class _Reads(TorchDispatchMode):
    """Counts values that the host reads, for which it would wait on an accelerator."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("layout", ["joined", "separate", "compiled blocks"])
def test_reference_pass_without_padding_reads_nothing_on_the_host(
    tmp_path: Any, layout: str, ragged: bool, monkeypatch: pytest.MonkeyPatch, traces: Any
) -> None:
    """Of rows with padding, transformers asks whether their mask masks anything."""
    reads: list[int] = []
    original = Attachment._run_references

    def counted(self: Any, *args: Any) -> None:
        if self._in_reference:
            return original(self, *args)
        with _Reads() as mode:
            original(self, *args)
        reads.append(mode.count)
        return None

    monkeypatch.setattr(Attachment, "_run_references", counted)
    module = models.PlainLM(models.lora(models.tiny_llama()))
    probe = Probe(reference=True)
    settings = {"strategy": CLSingleDeviceStrategy(compile_blocks=True)} if layout == "compiled blocks" else {}
    layout = "joined" if settings else layout
    mixer = ReplayMixer(_general(ragged=ragged), rows_per_batch=6, layout=layout)
    _fit(tmp_path, module, [mixer, probe], models.loader(ragged=ragged), **settings)
    assert len(probe.steps[0]["reference"]["initial"]) == 6
    assert (sum(reads) == 0) != ragged


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_reference_pass_without_padding_never_waits_for_the_gpu(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, compiled: bool, traces: Any
) -> None:
    """The host launches it while the device is still at work on the step before."""
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # Lightning sets it
    # A pass's own call of the network does not count.
    passes = waits.forbid(monkeypatch, Attachment, "_run_references", counts=lambda self: not self._in_reference)
    module = models.PlainLM(models.lora(models.tiny_llama()))
    mixer = ReplayMixer(_general(), rows_per_batch=2, layout="joined")
    settings = {"strategy": CLSingleDeviceStrategy(compile_blocks=True)} if compiled else {}
    _fit(tmp_path, module, [mixer, Probe(reference=True)], accelerator="gpu", max_steps=3, **settings)
    assert len(passes) == 3


def test_detaching_restores_the_module_exactly(tmp_path: Any) -> None:
    module = models.PlainLM(models.lora(models.tiny_llama()))
    trainer = models.trainer(tmp_path, max_steps=1)
    trainer.fit(module, models.loader())
    before = dict(vars(module))
    hooks = [(len(p._forward_hooks), len(p._forward_pre_hooks)) for p in module.modules()]
    _fit(tmp_path, module, [ReplayMixer(_general(), rows_per_batch=2), Probe(reference=True)])
    assert vars(module).keys() == before.keys()
    assert hooks == [(len(p._forward_hooks), len(p._forward_pre_hooks)) for p in module.modules()]
    assert "training_step" not in vars(module)


def test_detaches_after_an_exception(tmp_path: Any) -> None:
    module = models.PlainLM(models.tiny_llama())

    def fail(step: Any) -> Tensor:
        raise ZeroDivisionError("on purpose")

    with pytest.raises(ZeroDivisionError, match="on purpose"):
        _fit(tmp_path, module, [ReplayMixer(_general(), rows_per_batch=2), Probe(term=fail)])
    assert "training_step" not in vars(module)
    assert "on_after_batch_transfer" not in vars(module)
    assert all(not p._forward_hooks for p in module.modules())


def test_nothing_is_wrapped_when_nobody_asks(tmp_path: Any) -> None:
    module = models.PlainLM(models.tiny_llama())

    class Idle(ContinualCallback):
        wrapped: Any = None

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            self.wrapped = "training_step" in vars(pl_module)

    idle = Idle()
    _fit(tmp_path, module, [idle])
    assert idle.wrapped is False


Pair = namedtuple("Pair", ["x", "y"])


@dataclasses.dataclass
class Sample:
    x: Tensor
    y: Tensor


def _rows(count: int, shift: float = 0.0) -> list[tuple[Tensor, int]]:
    generator = torch.Generator().manual_seed(3)
    return [(torch.randn(3, 8, 8, generator=generator) + shift, i % 4) for i in range(count)]


class CNN(pl.LightningModule):
    """Images and integer labels in any container; returns a tensor or a dict."""

    def __init__(self, container: str = "tuple", as_dict: bool = False) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 4))
        self.container, self.as_dict = container, as_dict
        self.seen: list[tuple[int, list[bool]]] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def collate(self, rows: list[Any]) -> Any:
        x, y = torch.stack([r[0] for r in rows]), torch.tensor([r[1] for r in rows])
        return {
            "tuple": (x, y),
            "list": [x, y],
            "dict": {"x": x, "y": y},
            "nested": {"in": {"x": x, "name": [str(int(v)) for v in y]}, "out": (y,)},
            "namedtuple": Pair(x, y),
            "dataclass": Sample(x, y),
        }[self.container]

    def unpack(self, batch: Any) -> tuple[Tensor, Tensor]:
        if self.container in ("tuple", "list"):
            return batch[0], batch[1]
        if self.container == "dict":
            return batch["x"], batch["y"]
        if self.container == "nested":
            assert len(batch["in"]["name"]) == len(batch["out"][0])
            return batch["in"]["x"], batch["out"][0]
        return batch.x, batch.y

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = self.unpack(batch)
        self.seen.append((len(x), replay_rows(batch).tolist()))
        loss = nn.functional.cross_entropy(self(x), y)
        return {"loss": loss, "extra": 1} if self.as_dict else loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("as_dict", [False, True])
@pytest.mark.parametrize("container", ["tuple", "list", "dict", "nested", "namedtuple", "dataclass"])
def test_any_batch_structure(tmp_path: Any, container: str, as_dict: bool) -> None:
    module = CNN(container, as_dict)
    data = torch.utils.data.DataLoader(_rows(8), batch_size=4, collate_fn=module.collate)
    batches = list(torch.utils.data.DataLoader(_rows(3, 1.0), batch_size=1, collate_fn=module.collate))

    class AsRows(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 3

        def __getitem__(self, i: int) -> Any:
            from lightning_cl.replay.rows import layout_of, split_rows

            return split_rows(layout_of(batches[i]))[0].content

    class Source(GeneralSamples):
        def _content(self, sample: Any) -> dict[str, Any]:
            return sample

    mixer = ReplayMixer(Source(AsRows(), num_samples=3), rows_per_batch=2)
    trainer, _ = _fit(
        tmp_path, module, [mixer, Probe(watch="net.2", term=lambda s: s.activations["net.2"].mean())], data
    )
    assert module.seen == [(6, [False] * 4 + [True] * 2)]
    assert trainer.callback_metrics["cl/replay_rows"] == 2


def test_data_module_that_overrides_the_hook(tmp_path: Any) -> None:
    class Data(pl.LightningDataModule):
        calls = 0

        def train_dataloader(self) -> Any:
            return models.loader()

        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            self.calls += 1
            return batch

    module, data = models.PlainLM(models.tiny_llama()), Data()
    probe = Probe()
    trainer = models.trainer(tmp_path, max_steps=2, callbacks=[ReplayMixer(_general(), rows_per_batch=2), probe])
    trainer.fit(module, datamodule=data)
    assert data.calls == 2
    assert [len(s["ids"]) for s in probe.steps] == [2, 2]
    assert "on_after_batch_transfer" not in vars(data)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_gradient_accumulation(tmp_path: Any, accumulate: int) -> None:
    module = models.PlainLM(models.tiny_llama())
    probe = Probe(term=lambda step: step.activations[find_final_norm(module)].mean())
    _, steps = _fit(
        tmp_path,
        module,
        [ReplayMixer(_general(), rows_per_batch=2), probe],
        max_steps=2,
        accumulate_grad_batches=accumulate,
    )
    assert len(steps) == 2
    assert len(probe.steps) == 2 * accumulate


class Manual(pl.LightningModule):
    """Two optimizers, stepped by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.net = nn.Linear(4, 4)
        self.other = nn.Linear(4, 1)

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        first, second = self.optimizers()
        hidden = self.net(batch)
        first.zero_grad()
        self.manual_backward(hidden.square().mean())
        self.first_gradient = self.net.weight.grad.clone()
        first.step()
        second.zero_grad()
        self.manual_backward(self.other(hidden.detach()).mean())
        second.step()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.net.parameters(), lr=0.1), torch.optim.SGD(self.other.parameters(), lr=0.1)


def _vectors(n: int, seed: int = 0) -> list[Tensor]:
    return list(torch.randn(n, 4, generator=torch.Generator().manual_seed(seed)))


def test_manual_optimization_gets_the_term_once(tmp_path: Any) -> None:
    module = Manual()
    start = {k: v.clone() for k, v in module.state_dict().items()}
    probe = Probe(watch="net", term=lambda step: step.activations["net"].sum())
    source = GeneralSamples(_vectors(2, 5), num_samples=2)
    data = torch.utils.data.DataLoader(_vectors(4), batch_size=4)
    _fit(tmp_path, module, [ReplayMixer(source, rows_per_batch=2), probe], data, max_steps=2)
    reference = Manual()
    reference.load_state_dict(start)
    batch = torch.cat([torch.stack(_vectors(4)), torch.stack(_vectors(2, 5))])
    hidden = reference.net(batch)
    (hidden.square().mean() + hidden[4:].sum()).backward()
    torch.testing.assert_close(module.first_gradient, reference.net.weight.grad)
    assert len(probe.steps) == 1


def test_manual_loss_index_that_never_comes(tmp_path: Any) -> None:
    probe = Probe(watch="net", term=lambda step: step.activations["net"].sum())
    probe.loss_index = 7
    data = torch.utils.data.DataLoader(_vectors(4), batch_size=4)
    with pytest.raises(MisconfigurationException, match=r"called `self\.manual_backward` 2 times.*`loss_index=7`"):
        _fit(tmp_path, Manual(), [ReplayMixer(GeneralSamples(_vectors(2), 2), rows_per_batch=1), probe], data)


def test_none_under_automatic_optimization(tmp_path: Any) -> None:
    class Returns(CNN):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            return None

    data = torch.utils.data.DataLoader(_rows(4), batch_size=4)
    with pytest.raises(MisconfigurationException, match="returned None at batch 0 under automatic optimization"):
        _fit(tmp_path, Returns(), [ReplayMixer(GeneralSamples(_rows(2), 2), rows_per_batch=1)], data)


def test_dataloader_iter_is_refused(tmp_path: Any) -> None:
    class Iterates(CNN):
        def training_step(self, dataloader_iter: Any) -> Any:  # type: ignore[override]
            return None

    data = torch.utils.data.DataLoader(_rows(4), batch_size=4)
    with pytest.raises(MisconfigurationException, match="takes `dataloader_iter`, which bypasses the batch hooks"):
        _fit(tmp_path, Iterates(), [ReplayMixer(GeneralSamples(_rows(2), 2), rows_per_batch=1)], data)


def test_a_term_that_is_not_finite_stops_the_run(tmp_path: Any) -> None:
    module = models.PlainLM(models.tiny_llama())
    probe = Probe(term=lambda step: torch.tensor(float("nan")))
    with pytest.raises(RuntimeError, match=r"cl/probe is not finite at batch 0, replay samples \[GeneralSamples:\d"):
        _fit(tmp_path, module, [ReplayMixer(_general(), rows_per_batch=2), probe])


def test_a_watched_module_that_never_runs(tmp_path: Any) -> None:
    module = CNN()
    module.unused = nn.Linear(2, 2)
    data = torch.utils.data.DataLoader(_rows(4), batch_size=4)
    with pytest.raises(MisconfigurationException, match=r"watched submodule\(s\) \['unused'\] gave no tensor"):
        _fit(
            tmp_path, module, [ReplayMixer(GeneralSamples(_rows(2), 2), rows_per_batch=1), Probe(watch="unused")], data
        )


def test_a_submodule_that_does_not_exist(tmp_path: Any) -> None:
    data = torch.utils.data.DataLoader(_rows(4), batch_size=4)
    with pytest.raises(MisconfigurationException, match=r"No submodule is called 'net.9' in `CNN`. Closest names: net"):
        _fit(tmp_path, CNN(), [ReplayMixer(GeneralSamples(_rows(2), 2), rows_per_batch=1), Probe(watch="net.9")], data)


def test_a_second_fit_with_nothing_left_is_refused(tmp_path: Any) -> None:
    module = models.PlainLM(models.tiny_llama())
    trainer = models.trainer(tmp_path, max_steps=1, callbacks=[ReplayMixer(_general(), rows_per_batch=1)])
    trainer.fit(module, models.loader())
    with pytest.raises(
        MisconfigurationException, match=r"`max_steps=1`: a second `trainer\.fit` would train 0.*fit_stream"
    ):
        trainer.fit(module, models.loader())


@pytest.mark.parametrize("how", ["wrapper", "method"])
def test_compiled_networks_run_the_hooks(tmp_path: Any, how: str) -> None:
    """A network that was compiled and called before the callbacks came still feeds them, at every step."""
    model = models.lora(models.tiny_llama())
    module = models.PlainLM(model)
    if how == "wrapper":
        module.model = torch.compile(model, backend="eager")
    else:
        module.model.compile(backend="eager")
    module.model(**models.collate([models.TokenRows(4)[i] for i in range(4)]))
    eager = models.PlainLM(models.lora(models.tiny_llama()))
    probes = [Probe(reference=True), Probe(reference=True)]
    results = []
    for each, probe in zip([module, eager], probes, strict=True):
        probe.term = lambda step: next(iter(step.activations.values())).square().mean()
        results.append(_fit(tmp_path, each, [ReplayMixer(_general(), rows_per_batch=2), probe], max_steps=2)[1])
    assert len(probes[0].steps) == 2
    for mine, theirs in zip(probes[0].steps, probes[1].steps, strict=True):
        torch.testing.assert_close(mine["reference"]["initial"], theirs["reference"]["initial"])
        torch.testing.assert_close(mine["hidden"], theirs["hidden"])
    for mine, theirs in zip(*results, strict=True):
        for gradient, other in zip(mine.values(), theirs.values(), strict=True):
            torch.testing.assert_close(gradient, other)


def test_blocks_that_the_user_compiled_count_as_compiled_also_where_a_strategy_prepared_them() -> None:
    module = models.PlainLM(models.tiny_llama())
    blocks = find_shard_blocks(module)
    prepare_blocks(module, blocks, recompute=True, compile=True)
    assert not is_compiled(module, but_prepared=True)
    module.get_submodule(blocks[0]).compile(backend="eager")
    assert is_compiled(module, but_prepared=True)


@pytest.mark.parametrize("part", ["", ".mlp"])
def test_hooks_at_compiled_blocks_run_and_the_code_stays_for_the_next_task(
    tmp_path: Any, traces: Any, part: str
) -> None:
    """Also inside one block, whose compiled code is another block's."""
    modules = [models.PlainLM(models.lora(models.tiny_llama())) for _ in range(2)]
    blocks = find_shard_blocks(modules[0])
    compiled = []
    for _ in range(2):
        probes = [Probe(watch=blocks[-1] + part, reference=True) for _ in modules]
        gradients = []
        for module, probe, strategy in zip(
            modules, probes, [CLSingleDeviceStrategy(compile_blocks=True), "auto"], strict=True
        ):
            callbacks = [ReplayMixer(_general(), rows_per_batch=2, layout="joined"), probe]
            gradients.append(_fit(tmp_path, module, callbacks, max_steps=2, strategy=strategy)[1])
        for mine, theirs in zip(*(probe.steps for probe in probes), strict=True):
            torch.testing.assert_close(mine["hidden"], theirs["hidden"])
            torch.testing.assert_close(mine["reference"], theirs["reference"])
        torch.testing.assert_close(*gradients)
        compiled.append(traces.frame_count)
    assert compiled[0] == compiled[1] > 0
