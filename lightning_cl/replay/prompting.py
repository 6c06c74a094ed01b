# SPDX-License-Identifier: Apache-2.0
"""Where self-generated rows begin and end: tokenizer, first and end tokens, prompts, shared beginnings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_cl import anatomy

if TYPE_CHECKING:
    import lightning.pytorch as pl


def find_tokenizer(given: Any, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Any | None:
    """The tokenizer that was given (an object or a path), else the module's, else the data module's, else None."""
    places = (pl_module, getattr(trainer, "datamodule", None))
    tokenizer = next((t for t in (given, *(getattr(p, "tokenizer", None) for p in places)) if t is not None), None)
    if isinstance(tokenizer, str):
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(tokenizer)
    return tokenizer


def find_bos(model: Any, tokenizer: Any | None, required: bool) -> int | None:
    """The token that texts begin with: the tokenizer's, or without one the model config's.

    Raises:
        MisconfigurationException: if there is none and it is required.
    """
    config = getattr(anatomy.pretrained_model(model).config.get_text_config(), "bos_token_id", None)  # type: ignore[union-attr]
    bos = tokenizer.bos_token_id if tokenizer is not None else config
    if bos is None and required:
        whose = f"The tokenizer `{type(tokenizer).__name__}`" if tokenizer is not None else "The model's config"
        hint = (
            f" (the model's config names the token id {config}: `prompts=[[{config}]]`)" if config is not None else ""
        )
        raise MisconfigurationException(
            f"{whose} has no BOS token, which self-generated rows begin with. Pass `prompts=[...]` with texts or"
            f" token ids that stand at the beginning of the model's training texts{hint}, or set the tokenizer's"
            " `bos_token`."
        )
    return bos


def find_eos(model: Any, tokenizer: Any | None) -> list[int]:
    """The end tokens of tokenizer, generation config and model config together.

    Raises:
        MisconfigurationException: if there is none.
    """
    network: Any = anatomy.pretrained_model(model)
    ids: set[int] = set()
    for owner in (tokenizer, getattr(network, "generation_config", None), network.config.get_text_config()):
        value = getattr(owner, "eos_token_id", None)
        ids |= {value} if isinstance(value, int) else set(value or ())
    if not ids:
        raise MisconfigurationException(
            '`on_eos="stop"`, and neither tokenizer nor model has an end token, so no row could end. Set the'
            ' tokenizer\'s `eos_token`, or use `on_eos="continue"`.'
        )
    return sorted(ids)


def encode_prompt(prompt: str | Sequence[int], tokenizer: Any | None) -> list[int]:
    """A prompt's tokens: ids as they are, a text as the tokenizer encodes it (its BOS included, its EOS not).

    Raises:
        MisconfigurationException: for a text without a tokenizer.
    """
    if not isinstance(prompt, str):
        return list(prompt)
    if tokenizer is None:
        raise MisconfigurationException(
            f"`prompts=[{prompt!r}, ...]` has texts but no tokenizer: neither the LightningModule nor the data module has"
            " an attribute `tokenizer`. Pass `tokenizer=PATH`, or prompts as lists of token ids."
        )
    tokens = list(tokenizer(prompt)["input_ids"])
    # Some tokenizers close what they encode; a prompt is not at its end.
    return tokens[:-1] if len(tokens) > 1 and tokens[-1] == tokenizer.eos_token_id else tokens


def shared_beginning(sequences: Sequence[Sequence[int]]) -> list[int]:
    """The longest beginning that all sequences have.

    Example:
        >>> shared_beginning([[1, 5, 7, 2], [1, 5, 9]])
        [1, 5]
    """
    shared = []
    for tokens in zip(*sequences, strict=False):
        if len(set(tokens)) > 1:
            break
        shared.append(tokens[0])
    return shared
