# SPDX-License-Identifier: Apache-2.0
"""States of the weights that are put back for a while, and what finding them may cost."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch

from lightning_cl.replay import WeightAnchor
from tests.helpers.models import PlainLM, lora, tiny_llama

IDS = torch.arange(4, 12)[None]


def change(module: Any) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("kind", ["initial", "previous_task"])
@pytest.mark.parametrize("how", ["full", "lora", "lora and a saved head"])
def test_inside_the_model_is_what_it_was(how: str, kind: Literal["initial", "previous_task"], offload: bool) -> None:
    base = tiny_llama()
    with torch.no_grad():
        expected = base(input_ids=IDS).logits
    extra = {"modules_to_save": ["lm_head"]} if how.endswith("head") else {}
    module = PlainLM(base if how == "full" else lora(base, **extra))
    if kind == "previous_task":
        with torch.no_grad():
            expected = module.model(input_ids=IDS).logits
    anchor = WeightAnchor(kind, offload)
    anchor.take(module)
    change(module)
    with torch.no_grad():
        after = module.model(input_ids=IDS).logits
        with anchor.inside(module):
            torch.testing.assert_close(module.model(input_ids=IDS).logits, expected, rtol=0, atol=0)
        torch.testing.assert_close(module.model(input_ids=IDS).logits, after, rtol=0, atol=0)
    assert not torch.equal(after, expected)


@pytest.mark.parametrize("kind", ["initial", "previous_task"])
def test_the_model_is_looked_through_a_few_times_whatever_its_size(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []
    for layers in (1, 4):
        module = PlainLM(lora(tiny_llama(num_hidden_layers=layers)))
        walks: list[str] = []
        for name in ("modules", "named_modules"):
            walk = getattr(type(module), name)

            def counted(self: Any, *args: Any, _walk: Any = walk, _name: str = name, **kwargs: Any) -> Any:
                if self is module:  # noqa: B023
                    walks.append(_name)  # noqa: B023
                return _walk(self, *args, **kwargs)

            monkeypatch.setattr(type(module), name, counted)
        anchor = WeightAnchor(kind)
        anchor.take(module)
        taken = len(walks)
        for _ in range(3):
            with anchor.inside(module):
                pass
        counts.append((taken, len(walks)))
        monkeypatch.undo()
    assert counts[0] == counts[1]
    assert counts[0][0] <= 20


def test_new_adapters_are_found_after_a_new_fit_began() -> None:
    module = PlainLM(lora(tiny_llama()))
    anchor = WeightAnchor("initial")
    anchor.take(module)
    with anchor.inside(module):
        pass
    wrapped = PlainLM(lora(tiny_llama(), seed=3))
    module.model = wrapped.model
    anchor.rebind()
    with torch.no_grad(), anchor.inside(module):
        logits = module.model(input_ids=IDS).logits
    torch.testing.assert_close(logits, tiny_llama()(input_ids=IDS).logits, rtol=0, atol=0)
