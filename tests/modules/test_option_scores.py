# SPDX-License-Identifier: Apache-2.0
"""Option scores against a loop over rows and options, without padding, caches or masks."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from lightning_cl.modules import option_scores as scoring
from lightning_cl.modules.option_scores import option_scores
from tests.helpers.models import lora, tiny_llama


def options_batch(seed=0, single=False):
    """Prompts of 3, 7 and 5 tokens with 3, 2 and 3 options of 1 to 4 tokens."""
    generator = torch.Generator().manual_seed(seed)

    def ids(n):
        return torch.randint(4, 128, (n,), generator=generator)

    prompts = [ids(3), ids(7), ids(5)]
    options = [[ids(1) if single else ids(n) for n in sizes] for sizes in ([2, 4, 1], [3, 2], [1, 1, 4])]
    batch = {
        "input_ids": torch.zeros(3, 7, dtype=torch.long),
        "attention_mask": torch.zeros(3, 7, dtype=torch.long),
        "option_ids": torch.zeros(3, 3, 1 if single else 4, dtype=torch.long),
        "option_mask": torch.zeros(3, 3, 1 if single else 4, dtype=torch.bool),
    }
    for i, prompt in enumerate(prompts):
        batch["input_ids"][i, -len(prompt) :] = prompt
        batch["attention_mask"][i, -len(prompt) :] = 1
        for j, option in enumerate(options[i]):
            batch["option_ids"][i, j, : len(option)] = option
            batch["option_mask"][i, j, : len(option)] = True
    return batch, prompts, options


@torch.no_grad()
def one_by_one(model, prompts, options, mean=False):
    scores = torch.full((len(prompts), 3), -torch.inf)
    for i, prompt in enumerate(prompts):
        for j, option in enumerate(options[i]):
            logits = model(input_ids=torch.cat([prompt, option])[None]).logits[0].float()
            logprobs = F.log_softmax(logits, -1)
            total = sum(logprobs[len(prompt) - 1 + t, token] for t, token in enumerate(option))
            scores[i, j] = total / len(option) if mean else total
    return scores


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=128, n_positions=64, n_embd=32, n_layer=2, n_head=4)).eval()


def gemma3():
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(
        vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, sliding_window=4, layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    return Gemma3ForCausalLM(config).eval()


def mamba():
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(vocab_size=128, hidden_size=16, state_size=4, num_hidden_layers=2, use_mambapy=False)
    return MambaForCausalLM(config).eval()


def eager():
    return tiny_llama(attn_implementation="eager")


MODELS = {
    "llama": (tiny_llama, "_side_by_side"),
    "llama_eager": (eager, "_side_by_side"),
    "llama_lora": (lambda: lora(tiny_llama()), "_side_by_side"),
    "gpt2": (gpt2, "_side_by_side"),
    "gemma3_sliding": (gemma3, "_continue"),
    "mamba": (mamba, "_each"),
}


@pytest.mark.parametrize("name", MODELS)
def test_scores_equal_one_by_one(name, monkeypatch):
    make, way = MODELS[name]
    torch.manual_seed(0)
    model = make().eval()
    batch, prompts, options = options_batch()
    calls = []
    for candidate in ("_side_by_side", "_continue", "_each"):
        original = getattr(scoring, candidate)

        def counted(*args, _original=original, _name=candidate, **kwargs):
            calls.append(_name)
            return _original(*args, **kwargs)

        monkeypatch.setattr(scoring, candidate, counted)
    ours = option_scores(model, batch)
    assert set(calls) == {way}
    torch.testing.assert_close(ours, one_by_one(model, prompts, options), atol=2e-5, rtol=1e-5)
    apart = option_scores(model, batch, share_prompt=False)
    torch.testing.assert_close(ours, apart, atol=2e-5, rtol=1e-5)


def test_copies_of_the_cache_in_parts(monkeypatch):
    model = gemma3()
    batch, prompts, options = options_batch()
    monkeypatch.setattr(scoring, "_rows_at_once", lambda *args: 2)
    torch.testing.assert_close(option_scores(model, batch), one_by_one(model, prompts, options), atol=2e-5, rtol=1e-5)


def test_mean_rule_divides_by_tokens():
    model = tiny_llama().eval()
    batch, prompts, options = options_batch()
    expected = one_by_one(model, prompts, options, mean=True)
    torch.testing.assert_close(option_scores(model, batch, "mean"), expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("sharded", [False, True])
def test_options_of_one_token(monkeypatch, sharded):
    monkeypatch.setattr(scoring, "is_sharded", lambda model: sharded)
    for model in (tiny_llama().eval(), gemma3()):
        batch, prompts, options = options_batch(single=True)
        torch.testing.assert_close(
            option_scores(model, batch), one_by_one(model, prompts, options), atol=2e-5, rtol=1e-5
        )


def test_missing_options_never_win():
    batch, _, _ = options_batch()
    scores = option_scores(tiny_llama().eval(), batch)
    assert scores[1, 2] == -torch.inf
    assert scores.isfinite().sum() == 8


def test_prompt_is_read_once():
    model = tiny_llama().eval()
    batch, _, _ = options_batch()
    tokens = []
    handle = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: tokens.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    option_scores(model, batch)
    handle.remove()
    assert tokens == [3 * 7, 3 * 3 * 3]  # the prompts, then three options of at most four tokens, the last one unread
