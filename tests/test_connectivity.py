# SPDX-License-Identifier: Apache-2.0
"""The line between two adapters against merged weights, and its barrier against arithmetic."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_cl.connectivity import Adapter, Connectivity, interpolate_adapters, mode_connectivity, text_evaluation
from tests.helpers import models


def _adapter(folder: Path, seed: int, **config: Any) -> Path:
    model = models.lora(models.tiny_llama(), seed=seed, **config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    path = folder / f"adapter{seed}"
    model.save_pretrained(str(path))
    return path


def _logits(model: nn.Module) -> Tensor:
    ids = torch.arange(4, 20).view(2, 8)
    with torch.no_grad():
        return model(input_ids=ids).logits


def _merged(folder: Path) -> dict[str, Tensor]:
    """All weights of the model with the adapter merged into them."""
    from peft import PeftModel

    return PeftModel.from_pretrained(models.tiny_llama(), folder).merge_and_unload().state_dict()


@pytest.mark.parametrize("config", [{"r": 4}, {"r": 3, "use_rslora": True, "alpha_pattern": {"q_proj": 3}}])
def test_product_points_are_points_between_the_merged_weights(tmp_path: Path, config: dict[str, Any]) -> None:
    a = _adapter(tmp_path, 1, modules_to_save=["lm_head"])
    b = _adapter(tmp_path, 2, modules_to_save=["lm_head"], **config)
    ends = _merged(a), _merged(b)
    base = models.tiny_llama().eval()
    before = copy.deepcopy(base.state_dict())
    seen: list[Tensor] = []

    def evaluate(model: nn.Module) -> dict[str, dict[str, float]]:
        assert not model.training
        seen.append(_logits(model))
        return {"t": {"loss": 0.0}}

    line = mode_connectivity(base, a, b, evaluate, points=5, mode="product")
    assert line.alphas == [0.0, 0.25, 0.5, 0.75, 1.0]
    reference = models.tiny_llama().eval()
    for alpha, logits in zip(line.alphas, seen, strict=True):
        reference.load_state_dict({n: (1 - alpha) * t + alpha * ends[1][n] for n, t in ends[0].items()})
        torch.testing.assert_close(logits, _logits(reference), rtol=1e-4, atol=1e-4)
    # The base is what it was, and no adapter is left in it.
    assert base.state_dict().keys() == before.keys()
    assert all(torch.equal(base.state_dict()[n], t) for n, t in before.items())
    assert all(p.requires_grad for p in base.parameters())


def test_factor_points_are_interpolated_factors_and_load_in_peft(tmp_path: Path) -> None:
    from peft import PeftModel
    from safetensors.torch import load_file

    a, b = _adapter(tmp_path, 1), _adapter(tmp_path, 2)
    seen: list[Tensor] = []

    def evaluate(model: nn.Module) -> dict[str, dict[str, float]]:
        seen.append(_logits(model))
        return {"t": {"loss": 0.0}}

    mode_connectivity(models.tiny_llama(), a, b, evaluate, points=3)
    interpolate_adapters(a, b, 0.5, output=tmp_path / "between")
    files = [load_file(folder / "adapter_model.safetensors") for folder in (a, b, tmp_path / "between")]
    for name, tensor in files[2].items():
        torch.testing.assert_close(tensor, (files[0][name] + files[1][name]) / 2)
    for folder, logits in zip((a, tmp_path / "between", b), seen, strict=True):
        loaded = PeftModel.from_pretrained(models.tiny_llama(), folder).eval()
        torch.testing.assert_close(_logits(loaded), logits, rtol=1e-5, atol=1e-5)


def test_a_product_point_loads_in_peft(tmp_path: Path) -> None:
    from peft import PeftModel

    a, b = _adapter(tmp_path, 1), _adapter(tmp_path, 2, r=2, rank_pattern={"v_proj": 3})
    interpolate_adapters(a, b, 0.3, "product", output=tmp_path / "between")
    loaded = PeftModel.from_pretrained(models.tiny_llama(), tmp_path / "between").eval()
    ends = _merged(a), _merged(b)
    reference = models.tiny_llama().eval()
    reference.load_state_dict({n: 0.7 * t + 0.3 * ends[1][n] for n, t in ends[0].items()})
    torch.testing.assert_close(_logits(loaded), _logits(reference), rtol=1e-4, atol=1e-4)


def test_barrier_and_means_are_arithmetic(tmp_path: Path) -> None:
    line = Connectivity(
        "factors",
        [0.0, 0.5, 1.0],
        {
            "first": {"loss": [1.0, 1.1, 2.0], "accuracy": [0.9, 0.8, 0.5]},
            "second": {"loss": [3.0, 1.5, 4.0], "accuracy": [0.5, 0.9, 0.5]},
            "third": {"loss": [2.0, 2.5, 1.0]},
        },
        ("old", "new"),
    )
    assert line.barrier("first") == pytest.approx(0.0)  # a valley: the ends themselves are the worst
    assert line.barrier("third") == pytest.approx(1.0)
    assert line.barrier("first", "accuracy") == pytest.approx(0.0)
    assert line.earlier() == {"loss": [2.0, pytest.approx(1.3), 3.0], "accuracy": [0.7, pytest.approx(0.85), 0.5]}
    assert line.best() == 0.5
    line.save(tmp_path / "deep" / "line.json")
    read = json.loads((tmp_path / "deep" / "line.json").read_text())
    assert read["current"] == "third"
    assert read["barriers"]["third"]["loss"] == pytest.approx(1.0)
    assert (read["a"], read["b"], read["alphas"]) == ("old", "new", [0.0, 0.5, 1.0])
    line.plot(tmp_path / "plots" / "line.png")
    assert (tmp_path / "plots" / "line.png").read_bytes()[:4] == b"\x89PNG"


def _rows(texts: list[str]) -> list[dict[str, Any]]:
    return [
        {"prompt": text, "answer": "yes" if i % 2 else "no", "options": ["yes", "no"]} for i, text in enumerate(texts)
    ]


def test_text_evaluation_is_the_mean_over_answer_tokens() -> None:
    from lightning_cl import CausalLMModule
    from lightning_cl.data import Encoder

    module = CausalLMModule(models.tiny_llama(), tokenizer=models.tiny_tokenizer(chat=False)).eval()
    tasks = {"long": _rows(["is it so?", "or", "not", "what"]), "texts": [{"text": "hello there"}, {"text": "bye"}]}
    with torch.no_grad():
        found = text_evaluation(module, tasks, batch_size=3)(module.model)
        encoder = Encoder(module.tokenizer)
        losses: list[float] = []
        for row in tasks["long"]:
            item = encoder.encode_train(row)
            logits = module.model(input_ids=item["input_ids"][None]).logits[0, :-1].log_softmax(-1)
            for position, label in enumerate(item["labels"][1:].tolist()):
                if label >= 0:
                    losses.append(-float(logits[position, label]))
    assert found["long"]["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    assert 0.0 <= found["long"]["accuracy"] <= 1.0
    assert set(found["texts"]) == {"loss"}  # no options, no metric
    with torch.no_grad():
        generated = text_evaluation(module, {"long": tasks["long"]}, metric="exact_match")(module.model)
    assert set(generated["long"]) == {"loss", "exact_match"}


def test_bad_input_is_named(tmp_path: Path) -> None:
    from peft import IA3Config, get_peft_model

    a, other = _adapter(tmp_path, 1), _adapter(tmp_path, 2, r=2)
    with pytest.raises(FileNotFoundError, match=r"holds no adapter_config.json, so it is no PEFT adapter folder"):
        Adapter.load(tmp_path)
    get_peft_model(models.tiny_llama(), IA3Config(target_modules=["q_proj"], feedforward_modules=[])).save_pretrained(
        str(tmp_path / "ia3")
    )
    with pytest.raises(ValueError, match=r"only the factors of LoRA"):
        Adapter.load(tmp_path / "ia3")
    with pytest.raises(ValueError, match=r"Use `mode='product'`, which joins the ranks"):
        interpolate_adapters(a, other, 0.5)
    scaled = _adapter(tmp_path, 3, lora_alpha=16)
    with pytest.raises(ValueError, match=r"scale their updates differently \(.*q_proj: 2 and 4\).*mode='product'"):
        interpolate_adapters(a, scaled, 0.5)
    with pytest.raises(ValueError, match=r"`points` must be at least 2"):
        mode_connectivity(models.tiny_llama(), a, a, lambda m: {}, points=1)
    with pytest.raises(ValueError, match=r"gave no 'loss' for task 't'"):
        mode_connectivity(models.tiny_llama(), a, a, lambda m: {"t": {"accuracy": 1.0}})
    shallow = models.tiny_llama(num_hidden_layers=1)
    with pytest.raises(ValueError, match=r"has weights for .*layers.1.*which LlamaForCausalLM does not have"):
        mode_connectivity(shallow, a, a, lambda m: {"t": {"loss": 1.0}})
