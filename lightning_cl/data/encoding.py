# SPDX-License-Identifier: Apache-2.0
"""Rows of text as token ids and labels, the same way in training, scoring and generation."""

from __future__ import annotations

import os
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_cl.data.chat import ChatRenderer, Message, Rendered
from lightning_cl.data.errors import DataError
from lightning_cl.data.examples import Example, clean_example, metric_problem

IGNORE_INDEX = -100


class Encoder:
    """Turns a row into token ids and labels.

    - ``{"text"}``: every token is learned. BOS stands in front where the tokenizer puts one; no EOS is added, since a
      text is a stretch of running text.
    - ``{"prompt", "answer"}``: the answer and the end of the turn are learned. With a chat template the prompt is the
      user's turn; without one the answer follows the prompt after a space (unless there is white space already) and is
      closed by EOS.
    - ``{"messages", "tools"?}``: the assistant's turns are learned, each with its end-of-turn token; system turns,
      tools and their results are context. Needs a chat template.

    There is one BOS at most, whoever writes it: the template's counts, the tokenizer's is added where the template has
    none. A row is tokenized as a whole and split at the answer, so that training, option scoring and generation see the
    same prompt tokens.

    **Rows that are too long** lose tokens of the prompt's own words, at ``truncation_side``; BOS, system turn, tools
    and the header before the answer stay, and the answer is cut (at its end) only where it is itself too long. A row
    with options keeps room for its longest option, so its prompt is the same in training and in evaluation.

    Args:
        tokenizer: a Hugging Face tokenizer, or the path or name of one.
        max_length: the longest row in tokens, prompt and answer together. None: 1024, or the tokenizer's
            ``model_max_length`` where that is smaller.
        template: ``"auto"`` uses the tokenizer's chat template where there is one; ``"none"`` never does.
        truncation_side: the side of the prompt (or of the text) that loses tokens.
        prompt_loss_weight: weight of the prompt's tokens in the loss, 0 to 1. Above 0 the prompt's tokens have labels
            too; between 0 and 1 rows also carry ``loss_weight``, which ``CausalLMModule`` reads.

    Raises:
        MisconfigurationException: for a value out of its range.
        DataError: for a row that cannot be encoded.

    Example:
        >>> from tests.helpers.models import tiny_tokenizer
        >>> encoder = Encoder(tiny_tokenizer(chat=False), max_length=16)
        >>> row = encoder.encode_train({"prompt": "2+2=", "answer": "4"})
        >>> row["input_ids"].tolist(), row["labels"].tolist()
        ([22, 15, 22, 33, 4, 24, 2], [-100, -100, -100, -100, 4, 24, 2])
    """

    def __init__(
        self,
        tokenizer: Any,
        max_length: int | None = None,
        template: Literal["auto", "none"] = "auto",
        truncation_side: Literal["left", "right"] = "left",
        prompt_loss_weight: float = 0.0,
    ) -> None:
        if template not in ("auto", "none"):
            raise MisconfigurationException(f"`template={template!r}`: unknown. Use 'auto' or 'none'.")
        if truncation_side not in ("left", "right"):
            raise MisconfigurationException(f"`truncation_side={truncation_side!r}`: unknown. Use 'left' or 'right'.")
        if not 0.0 <= prompt_loss_weight <= 1.0:
            raise MisconfigurationException(
                f"`prompt_loss_weight={prompt_loss_weight}`: must lie between 0 (the answer alone) and 1 "
                "(the prompt as much)."
            )
        self.tokenizer = load_tokenizer(tokenizer)
        context = _context(self.tokenizer, "model_max_length")
        self.max_length = max_length if max_length is not None else min(1024, context or 1024)
        if self.max_length < 2:
            raise MisconfigurationException(f"`max_length={max_length}`: a row needs room for two tokens at least.")
        if context and self.max_length > context:
            raise MisconfigurationException(
                f"`max_length={max_length}`: the model reads {context} tokens at most (`tokenizer.model_max_length`). "
                f"Use `max_length={context}` or less, or correct the tokenizer's `model_max_length`."
            )
        self.template = template
        self.truncation_side = truncation_side
        self.prompt_loss_weight = float(prompt_loss_weight)
        has_template = template == "auto" and getattr(self.tokenizer, "chat_template", None) is not None
        self._chat = ChatRenderer(self.tokenizer) if has_template else None
        self._bos = _bos_ids(self.tokenizer)
        self._fast = bool(getattr(self.tokenizer, "is_fast", False))

    @classmethod
    def for_module(cls, module: Any, tokenizer: Any = None, **options: Any) -> Encoder:
        """The encoder that fits a LightningModule: its ``tokenizer``, context and ``prompt_loss_weight``, if it has them.

        Args:
            module: the LightningModule, or None.
            tokenizer: a tokenizer, or the path of one, that goes before the module's.
            options: further arguments of :class:`Encoder`.

        Raises:
            MisconfigurationException: when neither has a tokenizer, or ``max_length`` is longer than the context of
                ``module.model``.
        """
        tokenizer = tokenizer if tokenizer is not None else getattr(module, "tokenizer", None)
        if tokenizer is None:
            raise MisconfigurationException(
                f"no tokenizer: `tokenizer` is None and {type(module).__name__} has no attribute `tokenizer`. "
                "Give `tokenizer=` (a path or an object), or set `self.tokenizer` in the module's `__init__`."
            )
        options.setdefault("prompt_loss_weight", getattr(module, "prompt_loss_weight", 0.0))
        encoder = cls(tokenizer, **options)
        context = _context(getattr(getattr(module, "model", None), "config", None), "max_position_embeddings")
        if context and encoder.max_length > context:
            if options.get("max_length") is not None:
                raise MisconfigurationException(
                    f"`max_length={encoder.max_length}`: the model's context is {context} tokens "
                    f"(`max_position_embeddings`). Use `max_length={context}` or less."
                )
            encoder.max_length = context
        return encoder

    @property
    def pad_token_id(self) -> int:
        """The id that fills short rows: the tokenizer's PAD, else its EOS, else 0 (padding is masked in any case)."""
        for token_id in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            if token_id is not None:
                return int(token_id)
        return 0

    @property
    def stop_token_ids(self) -> list[int]:
        """The ids that end an answer: EOS, and what the chat template writes after an assistant's turn."""
        ids = [] if self.tokenizer.eos_token_id is None else [int(self.tokenizer.eos_token_id)]
        if self._chat is not None:
            end = self._chat.end_of_turn().strip()
            ids += self.tokenizer.encode(end, add_special_tokens=False)[:1] if end else []
        return sorted(set(ids))

    def encode_train(self, example: Example) -> dict[str, Tensor]:
        """A row for training.

        Returns:
            ``input_ids``, ``attention_mask`` and ``labels``, each ``[T]`` int64, where labels are -100 on what is not
            learned (and on the first token, which nothing predicts), and ``loss_weight`` ``[T]`` float32 if
            ``prompt_loss_weight`` lies between 0 and 1.
        """
        return self._encode_labelled(example, self.prompt_loss_weight)

    def encode_eval(self, example: Example, metric: str | None = None) -> dict[str, Any]:
        """A row for evaluation by a metric.

        Args:
            example: a row of one of the three forms.
            metric: ``"loss"`` or None: the row of :meth:`encode_train`, over the answer's tokens alone, so that any
                module can evaluate it. ``"accuracy"``: the prompt and each option's tokens. Another metric: the prompt,
                to generate from, and the reference.

        Returns:
            For ``"loss"`` as :meth:`encode_train`. Else ``input_ids`` and ``attention_mask`` ``[P]`` of the prompt,
            ``metric``, ``reference`` (the answer's text), ``reference_length`` (its tokens), and, when the row has
            options and the metric does not compare texts, ``options``, ``option_ids`` (a list of ``[L]``, each with the
            end of the turn) and ``answer_index``.

        Raises:
            DataError: when the row cannot be scored by the metric.
        """
        if metric is None or metric == "loss":
            return self._encode_labelled(example, 0.0)
        example = clean_example(example, "a row of evaluation")
        problem = metric_problem(example, metric)
        if problem is not None:
            raise DataError(f"a row of evaluation: {problem}.")
        by_option = "options" in example and (metric == "accuracy" or not compares_texts(metric))
        reference = example["answer"] if "answer" in example else str(example["messages"][-1].get("content") or "")
        prompt, answers = self._prompt_and_answers(example, all_options="options" in example)
        index = list(example["options"]).index(reference) if "options" in example else 0
        row: dict[str, Any] = {"metric": metric, "reference": reference, "reference_length": len(answers[index])}
        if by_option:
            row["options"] = list(example["options"])
            row["option_ids"] = [torch.tensor(ids) for ids in answers]
            row["answer_index"] = index
        else:
            prompt = self._cut_prompt(self._prompt_alone(example), max(len(ids) for ids in answers))[0]
        row["input_ids"] = torch.tensor(prompt, dtype=torch.long)
        row["attention_mask"] = torch.ones(len(prompt), dtype=torch.long)
        return row

    def length(self, example: Example) -> int:
        """Number of tokens of the whole row, nothing cut, end of the turn included."""
        return len(self._tokenize(self._render(clean_example(example, "a row"))).ids)

    def _encode_labelled(self, example: Example, prompt_weight: float) -> dict[str, Tensor]:
        example = clean_example(example, "a row of training")
        if "prompt" in example:
            prompt, (answer,) = self._prompt_and_answers(example, all_options=False)
            ids, learned = prompt + answer, [False] * len(prompt) + [True] * len(answer)
        else:
            tokens = self._tokenize(self._render(example))
            ids, learned = tokens.ids, tokens.learned_mask()
            stop = tokens.answer_start if "messages" in example else None
            drop = self._dropped(tokens, len(ids) - self.max_length, stop)
            ids = [token for i, token in enumerate(ids) if i not in drop][: self.max_length]
            learned = [flag for i, flag in enumerate(learned) if i not in drop][: self.max_length]
        input_ids = torch.tensor(ids, dtype=torch.long)
        mask = torch.tensor(learned)
        labels = input_ids.clone() if prompt_weight > 0 else torch.where(mask, input_ids, IGNORE_INDEX)
        labels[0] = IGNORE_INDEX
        row = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "labels": labels}
        if 0 < self.prompt_loss_weight < 1 and prompt_weight > 0:
            row["loss_weight"] = torch.full((len(ids),), prompt_weight, dtype=torch.float32).masked_fill(mask, 1.0)
        return row

    def _prompt_and_answers(self, example: Example, all_options: bool) -> tuple[list[int], list[list[int]]]:
        """The prompt's tokens after cutting, and the tokens of the answer, or of every option."""
        if "messages" in example:
            answers = [self._tokenize(self._render(example))]
        else:
            # Each option is tokenized with its prompt: the two may share a token.
            answers = [] if all_options else [self._tokenize(self._render(example))]
            if all_options or ("options" in example and len(answers[0].ids) + _byte_room(example) > self.max_length):
                texts = [self._render({**example, "answer": option}) for option in example["options"]]
                answers = [self._tokenize(text) for text in texts]
        start = min(answer.answer_start for answer in answers)
        # Tokens that some option changes before its first letter belong to the options.
        while any(answer.ids[:start] != answers[0].ids[:start] for answer in answers):
            start -= 1
        endings = [answer.ids[start:] for answer in answers]
        prompt, room = self._cut_prompt(answers[0], max(map(len, endings)), start)
        endings = [ids[:room] for ids in endings]
        if "options" in example and not all_options and len(endings) > 1:
            endings = [endings[list(example["options"]).index(example["answer"])]]
        return prompt, endings

    def _prompt_alone(self, example: Example) -> _Tokens:
        if self._chat is None:
            return self._tokenize(_plain_text(example, "", ""))
        messages, tools = _conversation(example)
        return self._tokenize(self._chat.render_prompt(messages[:-1], tools))

    def _cut_prompt(self, tokens: _Tokens, reserve: int, stop: int | None = None) -> tuple[list[int], int]:
        """The prompt's tokens so that `reserve` more fit, and the room that is left for the answer."""
        stop = len(tokens.ids) if stop is None else stop
        drop = self._dropped(tokens, stop + reserve - self.max_length, stop)
        prompt = [token for i, token in enumerate(tokens.ids[:stop]) if i not in drop]
        # Nothing of the prompt's words is left: the answer gets what is over, one token at least.
        prompt = prompt[: self.max_length - 1]
        return prompt, self.max_length - len(prompt)

    def _dropped(self, tokens: _Tokens, excess: int, stop: int | None = None) -> range:
        first, last = tokens.cut
        last = last if stop is None else min(last, stop)
        count = min(max(excess, 0), max(last - first, 0))
        return range(first, first + count) if self.truncation_side == "left" else range(last - count, last)

    def _render(self, example: Example) -> Rendered:
        if "text" in example:
            whole = (0, len(example["text"]))
            return Rendered(example["text"], (whole,), whole)
        if self._chat is not None:
            messages, tools = _conversation(example)
            return self._chat.render(messages, tools)
        if "messages" in example:
            why = "`template='none'`" if self.template == "none" else "the tokenizer has no chat template"
            raise DataError(
                f"a row of `messages` cannot be encoded: {why}. Set `tokenizer.chat_template` and `template='auto'`, "
                "or give rows of `prompt` and `answer`."
            )
        return _plain_text(example, example["answer"], str(self.tokenizer.eos_token or ""))

    def _tokenize(self, rendered: Rendered) -> _Tokens:
        text = rendered.text
        if self._fast:
            encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            ids, offsets = list(encoded["input_ids"]), encoded["offset_mapping"]
            starts, ends = [start for start, _ in offsets], [end for _, end in offsets]
            before: Callable[[int], int] = lambda place: bisect_right(ends, place)  # noqa: E731
            until: Callable[[int], int] = lambda place: bisect_left(starts, place)  # noqa: E731
        else:
            ids = list(self.tokenizer.encode(text, add_special_tokens=False))

            def before(place: int) -> int:
                return _common_prefix(self.tokenizer.encode(text[:place], add_special_tokens=False), ids)

            until = before
        bos = [] if ids[: len(self._bos)] == self._bos else self._bos
        spans = [(before(start) + len(bos), until(stop) + len(bos)) for start, stop in rendered.learned]
        cut = (until(rendered.cut[0]) + len(bos), before(rendered.cut[1]) + len(bos))
        return _Tokens(bos + ids, spans, cut)


@dataclass
class _Tokens:
    ids: list[int]
    learned: list[tuple[int, int]]
    cut: tuple[int, int]

    @property
    def answer_start(self) -> int:
        return self.learned[-1][0] if self.learned else len(self.ids)

    def learned_mask(self) -> list[bool]:
        mask = [False] * len(self.ids)
        for start, stop in self.learned:
            mask[start:stop] = [True] * (stop - start)
        return mask


def load_tokenizer(tokenizer: Any) -> Any:
    """A tokenizer object as it is; a path or hub name is loaded with ``AutoTokenizer``.

    Raises:
        MisconfigurationException: when the path holds no tokenizer, with the reason.
    """
    if not isinstance(tokenizer, (str, os.PathLike)):
        return tokenizer
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(os.fspath(tokenizer))
    except Exception as error:
        raise MisconfigurationException(
            f"no tokenizer at {os.fspath(tokenizer)!r} ({type(error).__name__}: {str(error).splitlines()[0]}). "
            "Give a folder saved by `tokenizer.save_pretrained`, a hub name, or a tokenizer object."
        ) from error


def compares_texts(metric: str) -> bool:
    """Whether a metric compares a generated text with the reference, rather than the chosen option with the right one.

    Class paths of ``torchmetrics.classification`` compare classes; those of any other module compare texts.

    Example:
        >>> compares_texts("rouge_l"), compares_texts("torchmetrics.classification.MulticlassF1Score")
        (True, False)
    """
    return metric not in ("accuracy", "loss") and "classification" not in metric


def _context(holder: Any, name: str) -> int:
    """A limit in tokens that a tokenizer or config states; 0 for none (tokenizers without one say 1e30)."""
    limit = getattr(holder, name, None)
    return int(limit) if isinstance(limit, (int, float)) and 0 < limit < 10**9 else 0


def _bos_ids(tokenizer: Any) -> list[int]:
    bos = getattr(tokenizer, "bos_token_id", None)
    return [bos] if bos is not None and tokenizer.encode("a")[:1] == [bos] else []


def _plain_text(example: Example, answer: str, end: str) -> Rendered:
    """Prompt and answer without a template; blanks at the prompt's end move to the answer, as tokenizers expect."""
    prompt = example["prompt"].rstrip(" ")
    needs_space = bool(prompt) and not prompt[-1].isspace() and not answer[:1].isspace()
    text = prompt + (" " if needs_space and answer else "") + answer + end
    learned = ((len(prompt), len(text)),) if answer else ()
    return Rendered(text, learned, (0, len(prompt)))


def _conversation(example: Example) -> tuple[Sequence[Message], Sequence[Any] | None]:
    if "messages" in example:
        return example["messages"], example.get("tools")
    answer = {"role": "assistant", "content": example["answer"]}
    return [{"role": "user", "content": example["prompt"]}, answer], None


def _byte_room(example: Example) -> int:
    """At most so many tokens can the longest option have more than the answer: a token holds a byte at least."""
    return max((len(option.encode()) for option in example.get("options", ())), default=0)


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
