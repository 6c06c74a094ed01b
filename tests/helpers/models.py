# SPDX-License-Identifier: Apache-2.0
"""Tiny models, a tiny tokenizer and ordinary LightningModules that know nothing of this package."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tiny_llama(seed: int = 0, **config: Any) -> Any:
    """A random two-layer Llama: hidden size 32, vocabulary 128, context 128."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings: dict[str, Any] = {
        "vocab_size": 128,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        **config,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**settings)).float()


def tiny_tokenizer(chat: bool = True) -> Any:
    """A byte-pair tokenizer without merges over printable ASCII: one token a character, vocabulary at most 128."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<|im_start|>", "<|im_end|>", "<unk>"]
    characters = [chr(c) for c in range(32, 127)] + ["\n"]
    vocab = {token: i for i, token in enumerate([*special, *characters])}
    raw = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    raw.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<pad>",
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        unk_token="<unk>",
        model_max_length=128,
    )
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def lora(model: Any, seed: int = 0, **config: Any) -> Any:
    """The model with LoRA layers (rank 4 on the attention projections) whose update is not zero."""
    from peft import LoraConfig, get_peft_model

    settings: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], **config}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        wrapped = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
        with torch.no_grad():
            for name, parameter in wrapped.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.05)
    return wrapped


class PlainLM(pl.LightningModule):
    """An ordinary LightningModule around a Hugging Face causal LM."""

    def __init__(self, model: Any, lr: float = 1e-2, optimizer: str = "sgd") -> None:
        super().__init__()
        self.model = model
        self.lr = lr
        self.optimizer = optimizer

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = self.model(**batch).loss
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("val_loss", self.model(**batch).loss, batch_size=len(batch["input_ids"]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        parameters = [p for p in self.parameters() if p.requires_grad]
        if self.optimizer == "adamw":
            return torch.optim.AdamW(parameters, lr=self.lr)
        return torch.optim.SGD(parameters, lr=self.lr)


class TokenRows(torch.utils.data.Dataset):
    """Random rows of tokens: dicts of ``input_ids``, ``attention_mask`` and ``labels``, of one or of mixed lengths."""

    def __init__(self, rows: int = 16, length: int = 12, vocab: int = 128, seed: int = 0, ragged: bool = False) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.rows = []
        for _ in range(rows):
            n = int(torch.randint(4, length + 1, (1,), generator=generator)) if ragged else length
            ids = torch.randint(4, vocab, (n,), generator=generator)
            self.rows.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()})

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.rows[index]


def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Pad token rows on the right."""
    pads = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    return {
        key: torch.nn.utils.rnn.pad_sequence([row[key] for row in rows], batch_first=True, padding_value=pads[key])
        for key in rows[0]
    }


def pack(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """One row ``[1, tokens]`` of segments, told apart by their positions."""
    joined = {key: torch.cat([row[key] for row in rows])[None] for key in ("input_ids", "labels")}
    return {**joined, "position_ids": torch.cat([torch.arange(len(row["input_ids"])) for row in rows])[None]}


def loader(rows: int = 16, batch_size: int = 4, **kwargs: Any) -> torch.utils.data.DataLoader:
    """A DataLoader over :class:`TokenRows`, in order."""
    return torch.utils.data.DataLoader(TokenRows(rows, **kwargs), batch_size=batch_size, collate_fn=collate)


def trainer(tmp_path: Any, **kwargs: Any) -> pl.Trainer:
    """A quiet Trainer on one CPU."""
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_steps": 4,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "default_root_dir": str(tmp_path),
        **kwargs,
    }
    return pl.Trainer(**settings)
