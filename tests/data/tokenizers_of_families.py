# SPDX-License-Identifier: Apache-2.0
"""Tiny tokenizers (a token a character) with the chat templates of three model families, written for these tests."""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% if tools %}{{ '<|im_start|>system\nTools: ' + (tools | tojson) + '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['tool_calls'] is defined %}{{ '<tool_call>' + (m['tool_calls'] | tojson) + '</tool_call>' }}"
    "{% else %}{{ m['content'] }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% if tools %}{{ '<|start_header_id|>system<|end_header_id|>\n\nTools: ' + (tools | tojson)"
    " + '<|eot_id|>' }}{% endif %}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + (m['content'] | trim) + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
# Gemma has no system role: the system's words open the first user's turn.
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] + '\n\n' %}"
    "{% set turns = messages[1:] %}{% else %}{% set first = '' %}{% set turns = messages %}{% endif %}"
    "{% if tools %}{% set first = 'Tools: ' + (tools | tojson) + '\n' + first %}{% endif %}"
    "{% for m in turns %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + (first if loop.first else '') + (m['content'] | trim)"
    " + '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
# Reasoning is kept in the last turn alone, and an empty block is written where there is none (as Qwen 3 does).
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NO_END = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)

_FAMILIES: dict[str, tuple[str, str | None, str, list[str], bool]] = {
    # name: template, bos, eos, further special tokens, whether the tokenizer itself puts BOS in front
    "chatml": (CHATML, None, "<|im_end|>", ["<|im_start|>"], False),
    "chatml_bos": (CHATML, "<s>", "<|im_end|>", ["<|im_start|>"], True),
    "llama3": (LLAMA3, "<|begin_of_text|>", "<|eot_id|>", ["<|start_header_id|>", "<|end_header_id|>"], True),
    "gemma": (GEMMA, "<bos>", "<eos>", ["<start_of_turn>", "<end_of_turn>"], True),
    "thinking": (THINKING, None, "<|im_end|>", ["<|im_start|>"], False),
    "no_end": (NO_END, None, "</s>", [], False),
}


def family(name: str, cls: type = PreTrainedTokenizerFast) -> Any:
    template, bos, eos, more, adds_bos = _FAMILIES[name]
    special = ["<pad>", "<unk>", eos, *more, *([bos] if bos else [])]
    vocab = {t: i for i, t in enumerate([*special, *(chr(c) for c in range(32, 127)), "\n"])}
    raw = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    raw.decoder = decoders.Fuse()
    if adds_bos and bos:
        raw.post_processor = TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, vocab[bos])])
    tokenizer = cls(
        tokenizer_object=raw,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token=bos,
        eos_token=eos,
    )
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in more], special_tokens=True)
    tokenizer.chat_template = template
    return tokenizer
