# SPDX-License-Identifier: Apache-2.0
"""A ready LightningModule for Hugging Face causal language models."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from lightning_cl.data.encoding import Encoder, load_tokenizer
from lightning_cl.modules.evaluation import Evaluation, Stage
from lightning_cl.modules.option_scores import is_sharded, option_scores
from lightning_cl.modules.schedules import Schedule, make_schedule
from lightning_cl.modules.token_losses import Positions, TokenTargets, row_weights, token_losses, token_targets

if TYPE_CHECKING:
    from peft import LoraConfig

OptimizerCallable = Callable[[Iterable], Optimizer]
LRSchedulerCallable = Callable[[Optimizer], LRScheduler | ReduceLROnPlateau]


class CausalLMModule(pl.LightningModule):
    """Trains and evaluates a Hugging Face causal language model on text tasks, with or without LoRA.

    The loss is the mean cross-entropy over the tokens that carry labels (the answers), weighted by the batch's
    ``loss_weight`` where it is there; logits are computed at these tokens alone. Evaluation follows the batch: one
    with option tokens is scored by likelihood, one with a metric of texts by generation, any other by its loss. Each
    loader logs one metric, ``val_<metric>`` or ``test_<metric>`` (``val_accuracy``, ``val_loss``, ...), which Lightning
    tags with ``/dataloader_idx_k`` when there are several loaders.

    **Length rule of option scoring**: an option's score is the log-probability of all of its tokens and of the end of
    the turn, without normalisation (``option_length="sum"``), which is what training maximises. With
    ``option_length="mean"`` it is divided by their number.

    Logging and memory: the scores of single rows are kept in :attr:`row_scores` (one float a row).

    Args:
        model: the path or name of a model, or a ``transformers`` or PEFT model. It is put in training mode.
        lora: a ``peft.LoraConfig``, or its arguments as a dict; without ``target_modules`` all linear layers but the
            head. None trains what requires grad.
        tokenizer: a tokenizer, or the path or name of one; by default the model's, if ``model`` is a path.
        lr: learning rate of the default optimizer, AdamW.
        weight_decay: its weight decay.
        optimizer: a callable from parameters to an optimizer (in YAML a class path), in place of the default.
        schedule: the learning rate over each task's steps: ``"constant"``, ``"linear"`` or ``"cosine"`` to 0.
        warmup: fraction of a task's steps over which the rate rises from 0.
        lr_scheduler: a callable from optimizer to scheduler, stepped every epoch, in place of ``schedule``.
        prompt_loss_weight: weight of the prompt's tokens in the training loss, 0 to 1; ``TaskStream`` reads it.
        option_length: ``"sum"`` or ``"mean"``, see above.
        max_new_tokens: the longest generated answer, in tokens.
        dtype: dtype in which a model given by path is loaded, such as ``"bfloat16"``; ``"auto"`` is the file's.
        model_kwargs: further arguments of ``from_pretrained``, such as ``attn_implementation``.

    Attributes:
        model: the network.
        tokenizer: the tokenizer, or None.
        row_scores: the scores of the rows of the last evaluation, by ``dataloader_idx``: on all ranks, in the data
            set's order where the batches tell it, each row once. A loss is the row's mean over its tokens.

    Note:
        A metric named by a class path is built without arguments and fed with generated texts and references; one of
        ``torchmetrics.classification`` with chosen and right option's numbers. It has no row scores.

    Example:
        >>> from tests.helpers.models import tiny_llama, tiny_tokenizer
        >>> module = CausalLMModule(tiny_llama(), lora={"r": 4}, tokenizer=tiny_tokenizer(), lr=1e-3)
        >>> encoder = Encoder(module.tokenizer, max_length=64)
        >>> row = encoder.encode_train({"prompt": "2+2=", "answer": "4"})
        >>> module.per_row_loss({key: value[None] for key, value in row.items()}).shape
        torch.Size([1])

    YAML::

        model:
          class_path: lightning_cl.CausalLMModule
          init_args:
            model: HuggingFaceTB/SmolLM2-135M-Instruct
            lora: {r: 16, lora_alpha: 32, target_modules: all-linear}
            optimizer:
              class_path: torch.optim.AdamW
              init_args: {lr: 1.0e-3, weight_decay: 0.0}

    Raises:
        MisconfigurationException: for values out of range, a model or tokenizer that cannot be loaded, LoRA on a model
            that has adapters already, or nothing to train.
    """

    def __init__(
        self,
        model: str | nn.Module,
        lora: dict[str, Any] | LoraConfig | None = None,
        tokenizer: Any = None,
        lr: float = 2e-4,
        weight_decay: float = 0.0,
        optimizer: OptimizerCallable | None = None,
        schedule: Schedule = "constant",
        warmup: float = 0.0,
        lr_scheduler: LRSchedulerCallable | None = None,
        prompt_loss_weight: float = 0.0,
        option_length: Literal["sum", "mean"] = "sum",
        max_new_tokens: int = 64,
        dtype: str = "auto",
        model_kwargs: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        _check(lr, schedule, warmup, lr_scheduler, prompt_loss_weight, option_length, max_new_tokens)
        # Objects stay out of checkpoints: those are read without running code.
        plain = {"model": model, "lora": lora, "tokenizer": tokenizer}
        self.save_hyperparameters(
            ignore=[name for name, value in plain.items() if not isinstance(value, (str, dict, type(None)))]
            + ["optimizer", "lr_scheduler"]
        )
        self.lr, self.weight_decay = lr, weight_decay
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler
        self.schedule: Schedule = schedule
        self.warmup = warmup
        self.prompt_loss_weight = float(prompt_loss_weight)
        self.option_length: Literal["sum", "mean"] = option_length
        self.max_new_tokens = max_new_tokens
        if tokenizer is None and isinstance(model, (str, os.PathLike)):
            tokenizer = model
        self.tokenizer = None if tokenizer is None else load_tokenizer(tokenizer)
        self.model = _build(model, lora, dtype, model_kwargs or {})
        self.evaluation = Evaluation()
        self._stop_token_ids: list[int] | None = None

    @property
    def row_scores(self) -> dict[int, list[float]]:
        """The scores of the rows of the last evaluation, by ``dataloader_idx``."""
        return self.evaluation.row_scores

    def forward(self, **inputs: Any) -> Any:
        """The network's own output."""
        return self.model(**inputs)

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """The mean loss over the batch's labelled tokens."""
        rows = self.per_row_loss(batch)
        weights = self.row_weights(batch)
        loss = (rows * weights).sum() / weights.sum().clamp_min(1e-8)
        self.log("train_loss", loss.detach(), prog_bar=True, batch_size=len(rows))
        return loss

    def per_row_loss(self, batch: Mapping[str, Any]) -> Tensor:
        """The loss of each row of a training batch, with gradient: what ``ReplayMixer`` asks for to weigh rows.

        Args:
            batch: ``input_ids``, ``attention_mask`` and ``labels`` ``[B, T]``, and maybe ``loss_weight`` ``[B, T]``; or
                a packed batch ``[1, T]`` with ``position_ids``, whose segments are the rows.

        Returns:
            float32 ``[B]``: the (weighted) mean over the row's labelled tokens, 0 for a row without any.
        """
        return self._row_losses(batch)[0]

    def row_weights(self, batch: Mapping[str, Any]) -> Tensor:
        """The summed weights of each row's labelled tokens, float32 ``[B]``: what a row counts in the batch's mean."""
        return row_weights(batch)

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Scores a batch by its metric."""
        self._evaluate("val", batch, dataloader_idx)

    def test_step(self, batch: Mapping[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Scores a batch by its metric."""
        self._evaluate("test", batch, dataloader_idx)

    def predict_step(self, batch: Mapping[str, Any], batch_idx: int, dataloader_idx: int = 0) -> list[dict[str, Any]]:
        """One dict a row: ``prediction`` (the chosen option, or the generated text) and ``reference``.

        Rows with options also have ``scores``, one log-likelihood an option; rows without an answer have ``loss``.
        """
        if "option_ids" in batch:
            scores = self.option_scores(batch)
            return [
                {
                    "prediction": options[int(row.argmax())],
                    "reference": reference,
                    "scores": row[: len(options)].tolist(),
                }
                for options, reference, row in zip(batch["options"], batch["reference"], scores, strict=True)
            ]
        if "metric" in batch:
            texts = self.generate_text(batch)
            pairs = zip(texts, batch["reference"], strict=True)
            return [{"prediction": text, "reference": reference} for text, reference in pairs]
        return [{"loss": loss} for loss in self._row_losses(batch)[0].tolist()]

    def option_scores(self, batch: Mapping[str, Any]) -> Tensor:
        """The log-likelihood of each option, ``[B, O]``, by the module's length rule."""
        return option_scores(self.model, batch, self.option_length)

    @torch.no_grad()
    def generate_text(self, batch: Mapping[str, Any]) -> list[str]:
        """The greedy answer to each prompt, special tokens and white space at the ends left out.

        Args:
            batch: ``input_ids`` and ``attention_mask`` ``[B, P]``, padded on the left.
        """
        if self.tokenizer is None:
            raise MisconfigurationException(
                "generating text needs a tokenizer, and `CausalLMModule` was given a model object without one. "
                "Give `tokenizer=` (a path or an object), or evaluate by 'loss' or 'accuracy'."
            )
        if self._stop_token_ids is None:
            self._stop_token_ids = Encoder(self.tokenizer).stop_token_ids
        from transformers import GenerationConfig

        width = batch["input_ids"].shape[1]
        context = getattr(self.model.config, "max_position_embeddings", None) or width + self.max_new_tokens
        tokenizer = self.tokenizer
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (tokenizer.eos_token_id or 0)
        config = GenerationConfig(
            max_new_tokens=max(1, min(self.max_new_tokens, context - width)),
            do_sample=False,
            pad_token_id=pad,
            eos_token_id=self._stop_token_ids or None,
            use_cache=True,
        )
        output = self.model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            generation_config=config,
            synced_gpus=is_sharded(self.model),
        )
        return [text.strip() for text in tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)]

    def configure_optimizers(self) -> Any:
        """The optimizer over what requires grad, and the schedule over the task's steps."""
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        if not parameters:
            raise MisconfigurationException(
                "`CausalLMModule` has no parameter that requires grad: the model is frozen. "
                "Give `lora=`, or set `requires_grad` on what is to be trained."
            )
        if self.optimizer is not None:
            optimizer = self.optimizer(parameters)
        else:
            optimizer = torch.optim.AdamW(parameters, lr=self.lr, weight_decay=self.weight_decay)
        if self.lr_scheduler is not None:
            scheduler = self.lr_scheduler(optimizer)
            monitor = getattr(scheduler, "monitor", None)  # of Lightning's own ReduceLROnPlateau
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": monitor}}
        if self.schedule == "constant" and self.warmup == 0:
            return optimizer
        total = self.trainer.estimated_stepping_batches
        made = make_schedule(optimizer, total, self.schedule, self.warmup)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": made, "interval": "step"}}

    def on_validation_epoch_start(self) -> None:
        """Begins the row scores anew."""
        self.evaluation.start()

    def on_test_epoch_start(self) -> None:
        """Begins the row scores anew."""
        self.evaluation.start()

    def on_validation_epoch_end(self) -> None:
        """Brings the ranks' row scores together."""
        self.evaluation.gather()

    def on_test_epoch_end(self) -> None:
        """Brings the ranks' row scores together."""
        self.evaluation.gather()

    def _row_losses(self, batch: Mapping[str, Any]) -> tuple[Tensor, TokenTargets]:
        if not isinstance(batch, Mapping) or "labels" not in batch or "input_ids" not in batch:
            found = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
            raise MisconfigurationException(
                f"`CausalLMModule` needs batches with `input_ids` and `labels`, found {found}. "
                "Take them from a `TaskStream`, or from `lightning_cl.data.Encoder` and `Collator`."
            )
        targets = token_targets(batch)
        scored = targets
        if len(targets.targets) == 0:
            # One position all the same, with weight 0: every rank must run forward and backward.
            zero = targets.targets.new_zeros(1)
            first = Positions(targets.positions.shape, zero)
            scored = TokenTargets(first, zero, zero.float(), zero, targets.num_rows)
        losses = token_losses(self.model, batch, scored)
        total = scored.sum_by_row(losses * scored.weights)
        return total / targets.sum_by_row(targets.weights).clamp_min(1e-8), targets

    @torch.no_grad()
    def _evaluate(self, stage: Stage, batch: Mapping[str, Any], dataloader_idx: int) -> None:
        name = batch.get("metric", "loss") if isinstance(batch, Mapping) else "loss"
        if name == "loss":
            losses, targets = self._row_losses(batch)
            counted = targets.sum_by_row(targets.weights) > 0
            update = self.evaluation.update_rows(stage, name, dataloader_idx, losses, counted, None)
        elif "option_ids" in batch:
            chosen = self.option_scores(batch).argmax(-1)
            counted = batch["row"] >= 0
            if name == "accuracy":
                right = (chosen == batch["answer_index"]).float()
                update = self.evaluation.update_rows(stage, name, dataloader_idx, right, counted, batch["row"])
            else:
                width = batch["option_ids"].shape[1]
                pair = (chosen[counted], batch["answer_index"][counted])
                update = self.evaluation.update_metric(stage, name, dataloader_idx, pair, width, self.device)
        else:
            texts = self.generate_text(batch)
            update = self.evaluation.update_texts(stage, name, dataloader_idx, texts, batch, self.device)
        self.log(
            f"{stage}_{update.label}",
            update.metric,
            on_step=False,
            on_epoch=True,
            batch_size=max(1, update.rows),
            metric_attribute=f"evaluation.{update.key}",
        )


def _check(
    lr: float,
    schedule: str,
    warmup: float,
    lr_scheduler: Any,
    prompt_loss_weight: float,
    option_length: str,
    max_new_tokens: int,
) -> None:
    problems = []
    if not lr > 0:
        problems.append(f"`lr={lr}`: must be above 0.")
    if schedule not in ("constant", "linear", "cosine"):
        problems.append(f"`schedule={schedule!r}`: unknown. Use 'constant', 'linear' or 'cosine'.")
    if not 0 <= warmup < 1:
        problems.append(f"`warmup={warmup}`: must be a fraction of the task's steps, 0 or more and below 1.")
    if lr_scheduler is not None and (schedule != "constant" or warmup):
        problems.append("`lr_scheduler` and `schedule` (or `warmup`) both set the learning rate: give one of them.")
    if not 0 <= prompt_loss_weight <= 1:
        problems.append(f"`prompt_loss_weight={prompt_loss_weight}`: must lie between 0 (the answer alone) and 1.")
    if option_length not in ("sum", "mean"):
        problems.append(f"`option_length={option_length!r}`: unknown. Use 'sum' or 'mean'.")
    if max_new_tokens < 1:
        problems.append(f"`max_new_tokens={max_new_tokens}`: must be 1 or more.")
    if problems:
        raise MisconfigurationException("\n".join(problems))


def _build(model: Any, lora: Any, dtype: str, model_kwargs: dict[str, Any]) -> Any:
    if isinstance(model, (str, os.PathLike)):
        model = _load(os.fspath(model), dtype, model_kwargs)
    elif not (isinstance(model, nn.Module) and hasattr(model, "get_output_embeddings")):
        raise MisconfigurationException(
            f"`model` is {type(model).__name__}, but must be a path, a name, or a Hugging Face causal language model. "
            "Any other network needs a LightningModule of its own."
        )
    # `from_pretrained` gives evaluation mode, which Lightning respects: dropout would be off in training.
    model.train()
    return model if lora is None else _with_lora(model, lora)


def _load(name: str, dtype: str, model_kwargs: dict[str, Any]) -> Any:
    from transformers import AutoModelForCausalLM

    from lightning_cl.strategies.loading import can_be_mapped, load_mapped

    # A folder's weights stay in their files until a strategy takes them to its device, so that the processes of a node
    # share them.
    if can_be_mapped(name, model_kwargs):
        with contextlib.suppress(MisconfigurationException):
            return load_mapped(name, dtype, **model_kwargs)
    try:
        return AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **model_kwargs)
    except (OSError, ValueError) as error:
        raise MisconfigurationException(
            f"no causal language model at {name!r} ({type(error).__name__}: {str(error).splitlines()[0]}). "
            "Give a folder saved by `save_pretrained`, a hub name, or a model object."
        ) from error


def _with_lora(model: Any, lora: Any) -> Any:
    import peft

    if isinstance(model, peft.PeftModel):
        raise MisconfigurationException(
            f"`lora` is given, but the model has adapters already ({list(model.peft_config)}). "
            "Give the base model, or leave `lora` out."
        )
    if isinstance(lora, Mapping):
        arguments = dict(lora.get("init_args") or {}) if "class_path" in lora else dict(lora)
        try:
            config = peft.LoraConfig(**arguments)
        except (TypeError, ValueError) as error:
            raise MisconfigurationException(
                f"`lora={arguments}`: {error}. See `peft.LoraConfig` for its arguments."
            ) from error
    else:
        config = copy.copy(lora)
    config.task_type = config.task_type or "CAUSAL_LM"
    if config.target_modules is None and config.target_parameters is None:
        config.target_modules = "all-linear"
    return peft.get_peft_model(model, config)
