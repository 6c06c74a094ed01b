# SPDX-License-Identifier: Apache-2.0
"""Adapters and merged models for use elsewhere: PEFT folders, transformers folders, model cards."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_cl import weights
from lightning_cl.distributed import raise_together, rank
from lightning_cl.strategies.adapters import config_of, describe, split
from lightning_cl.strategies.checkpoint import METADATA, load_checkpoint
from lightning_cl.strategies.files import write_atomically
from lightning_cl.strategies.merging import merge_into, whole_tensors
from lightning_cl.strategies.record import named_parameters, saved_names

Which = Literal["evaluated", "trained", "slow"]

__all__ = ["export_adapter", "export_checkpoint", "load_for_inference", "merge"]


def export_adapter(
    model: nn.Module,
    folder: str | Path,
    adapter_name: str = "default",
    state: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write a module's adapter as a standard PEFT folder. Under sharding every rank calls it, and rank 0 writes.

    Args:
        model: the LightningModule or the PEFT model, sharded and in 4 bits or not.
        folder: where to write ``adapter_config.json``, ``adapter_model.safetensors`` and a model card.
        adapter_name: which adapter.
        state: other values for parameters of ``model``, whole tensors by name (for instance slow weights); what is not
            in it is taken from the model.

    Returns:
        The folder, which ``PeftModel.from_pretrained(base, folder)`` loads.

    Raises:
        MisconfigurationException: if there is no such adapter, or weights outside of it were trained, which such a
            folder cannot hold.

    >>> from peft import LoraConfig, get_peft_model
    >>> net = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(r=2, target_modules=["0"]))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     sorted(path.name for path in export_adapter(net, folder).iterdir())
    ['README.md', 'adapter_config.json', 'adapter_model.safetensors']
    """
    trained = _trained(model, state)
    error: Exception | None = None
    if rank() == 0:
        try:
            _write_adapter(Path(folder), describe(model), trained, adapter_name, note="")
        except Exception as caught:
            error = caught
    raise_together(error)
    return Path(folder)


def export_checkpoint(
    checkpoint: str | Path,
    folder: str | Path,
    adapter_name: str = "default",
    weights: Which = "evaluated",
) -> Path:
    """Write the adapter of a checkpoint of ours as a standard PEFT folder, without building the model.

    Args:
        checkpoint: a checkpoint of ``cl_single_device`` or ``cl_fsdp``, file or folder.
        folder: where to write.
        adapter_name: which adapter.
        weights: ``"evaluated"``: those that the run evaluates, the slow ones if a ``LoRAInterpolator`` said so;
            ``"trained"`` or ``"slow"`` name the set.

    Raises:
        MisconfigurationException: as :func:`export_adapter`, or if the checkpoint is not one of ours.
    """
    contents = _read(checkpoint)
    _write_adapter(
        Path(folder),
        contents["adapters"],
        _chosen(contents, weights, checkpoint),
        adapter_name,
        note=f"Exported from step {contents['step']} of the run that wrote `{Path(checkpoint).name}`"
        f" ({_set(contents, weights)} weights).",
    )
    return Path(folder)


def merge(
    source: str | Path,
    base: str | Path | None,
    folder: str | Path,
    adapter_name: str = "default",
    weights: Which = "evaluated",
) -> Path:
    """Write a whole model: the full-precision base from disk with the adapter merged into it, file by file.

    The adapter never meets the quantized base, whose rounding would swallow a part of it.

    Args:
        source: a PEFT adapter folder, or a checkpoint of ours (whose fingerprint of the base is then checked, and whose
            weights trained outside of the adapter go into the result too).
        base: folder of the full-precision base with safetensors files; None takes the one the checkpoint names.
        folder: where to write.
        adapter_name: which adapter of a checkpoint.
        weights: which weights of a checkpoint, as in :func:`export_checkpoint`.

    Returns:
        The folder, which ``AutoModelForCausalLM.from_pretrained`` loads.
    """
    source = Path(source)
    if (source / "adapter_config.json").is_file():
        from safetensors.torch import load_file

        config = json.loads((source / "adapter_config.json").read_text())
        base = _base(base, config.get("base_model_name_or_path"), source)
        result = merge_into(base, folder, load_file(source / "adapter_model.safetensors"), config)
        note = f"The adapter `{source.name}` merged into its base."
    else:
        contents = _read(source)
        adapters = contents["adapters"]
        base = _base(base, adapters["base"], source)
        config = config_of(adapters, adapter_name) if adapters["configs"] else None
        mine, rest = split(_chosen(contents, weights, source), adapters["prefix"], adapter_name, adapters["configs"])
        _, digests = split(contents["fingerprint"], adapters["prefix"], adapter_name, adapters["configs"])
        result = merge_into(base, folder, mine, config, weights=rest, fingerprint=digests)  # type: ignore[arg-type]
        note = (
            f"Step {contents['step']} of the run that wrote `{source.name}` ({_set(contents, weights)} weights), merged"
            " into its base."
        )
    _write_card(result, base, config, note, merged=True)
    return result


def load_for_inference(
    checkpoint: str | Path,
    base: str | Path | None = None,
    adapter_name: str = "default",
    weights: Which = "evaluated",
    **model_kwargs: Any,
) -> Any:
    """A checkpoint of ours as a Hugging Face model in evaluation mode.

    Args:
        checkpoint: a checkpoint of ``cl_single_device`` or ``cl_fsdp``, file or folder.
        base: folder or name of the base; None takes the one that the run used.
        adapter_name: which adapter.
        weights: ``"evaluated"``: those that the run evaluates, the slow ones if a ``LoRAInterpolator`` said so;
            ``"trained"`` or ``"slow"`` name the set.
        **model_kwargs: of ``from_pretrained``, such as ``dtype`` or ``device_map``.

    Returns:
        The PEFT model, or the plain one if the run had no adapter, with all trained weights in it.

    Raises:
        MisconfigurationException: if no base is known, or it is another one than the run's.
    """
    from transformers import AutoModelForCausalLM

    from lightning_cl.strategies.fingerprint import check_base

    contents = _read(checkpoint)
    adapters = contents["adapters"]
    model: Any = AutoModelForCausalLM.from_pretrained(_base(base, adapters["base"], Path(checkpoint)), **model_kwargs)
    mine, rest = split(_chosen(contents, weights, checkpoint), adapters["prefix"], adapter_name, adapters["configs"])
    _, digests = split(contents["fingerprint"], adapters["prefix"], adapter_name, adapters["configs"])
    # Frozen, all of it is the base, whose digests can be compared.
    check_base(model.requires_grad_(False), digests, str(checkpoint))  # type: ignore[arg-type]
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, tensor in rest.items():
        parameters[name].data.copy_(tensor)
    if adapters["configs"]:
        from peft import PeftModel

        with tempfile.TemporaryDirectory() as folder:
            _write_files(Path(folder), config_of(adapters, adapter_name), mine)
            model = PeftModel.from_pretrained(model, folder)
    return model.eval()


def _trained(model: nn.Module, state: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    weights.reshard(model)
    parameters = named_parameters(model)
    names = saved_names(model)
    shards = {name: weights.local(parameters[name]) for name in names}
    trained = weights.gather(model, shards, parameters)
    for name, tensor in (state or {}).items():
        if name not in parameters:
            raise ValueError(
                f"`state` has a tensor for {name!r}, which is no parameter of `{type(model).__name__}`. Use names of"
                " `model.named_parameters()`."
            )
        trained[name] = tensor.detach().to("cpu", parameters[name].dtype)
    return trained


def _write_adapter(
    folder: Path, description: Mapping[str, Any], trained: Mapping[str, Tensor], adapter: str, note: str
) -> None:
    config = config_of(description, adapter)
    mine, rest = split(trained, description["prefix"], adapter, description["configs"])
    if rest:
        raise MisconfigurationException(
            f"{len(rest)} weights outside of the adapter {adapter!r} were trained (first: {next(iter(rest))}), and an"
            " adapter folder cannot hold them. Name their layers in `modules_to_save` of the `LoraConfig` before training,"
            " or merge (`lightning-cl export --merge`), which keeps them."
        )
    _write_files(folder, config, mine)
    _write_card(folder, description["base"], config, note, merged=False)


def _write_files(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    from safetensors.torch import save

    folder.mkdir(parents=True, exist_ok=True)
    data = save({n: t.contiguous() for n, t in tensors.items()}, metadata={"format": "pt"})
    write_atomically(folder / "adapter_model.safetensors", lambda file: file.write(data))
    text = json.dumps({**config, "inference_mode": True}, indent=2, sort_keys=True).encode()
    write_atomically(folder / "adapter_config.json", lambda file: file.write(text))


def _write_card(folder: Path, base: Any, config: Mapping[str, Any] | None, note: str, merged: bool) -> None:
    base = str(base or (config or {}).get("base_model_name_or_path") or "the base model")
    header = ["library_name: transformers" if merged else "library_name: peft", f"base_model: {json.dumps(base)}"]
    header += ["tags:", "- lightning-cl", "- continual-learning"] + ([] if merged else ["- lora"])
    if merged:
        use = (
            "from transformers import AutoModelForCausalLM\n\n"
            f'model = AutoModelForCausalLM.from_pretrained("{folder.name}")'
        )
    else:
        use = (
            "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
            f'base = AutoModelForCausalLM.from_pretrained("{base}")\n'
            f'model = PeftModel.from_pretrained(base, "{folder.name}")'
        )
    facts = ""
    if config is not None:
        targets = config.get("target_modules")
        shown = ", ".join(sorted(targets)) if isinstance(targets, list) else targets
        row = f"| {config.get('r')} | {config.get('lora_alpha')} | {shown} |"
        facts = f"\n| rank | alpha | layers |\n| --- | --- | --- |\n{row}\n"
    text = (
        "---\n"
        + "\n".join(header)
        + f"\n---\n# {folder.name}\n\nFine-tuned from `{base}` with lightning-cl. {note}\n{facts}\n"
        + f"```python\n{use}\n```\n\nFill in before publishing: the training tasks, the scores of the task matrix, intended"
        + " use and limits, and the licence, which must agree with the base's.\n"
    ).encode()
    write_atomically(folder / "README.md", lambda file: file.write(text))


def _read(checkpoint: str | Path) -> dict[str, Any]:
    loaded = load_checkpoint(checkpoint)
    metadata = loaded.get(METADATA)
    if metadata is None:
        raise MisconfigurationException(
            f"{checkpoint} is no checkpoint of `cl_single_device` or `cl_fsdp`: it does not say which adapters it holds."
            " Resume from it under one of these strategies and save it anew."
        )
    average = next(
        (s for s in loaded.get("callbacks", {}).values() if isinstance(s, dict) and isinstance(s.get("slow"), dict)), {}
    )
    # Between two tasks the trained weights are the evaluated ones, whichever set that is.
    in_task = average.get("clock", {}).get("in_task", False)
    return {
        "adapters": metadata["adapters"],
        "fingerprint": metadata["base_fingerprint"],
        "trained": {n: t for n, t in loaded["state_dict"].items() if n in set(metadata["saved"])},
        "slow": average.get("slow"),
        "evaluated": "slow" if in_task and average.get("evaluate_with") == "slow" else "trained",
        "step": loaded.get("global_step"),
    }


def _set(contents: Mapping[str, Any], which: Which) -> str:
    """The set of weights that is meant, by its own name."""
    return str(contents["evaluated"]) if which == "evaluated" else which


def _chosen(contents: Mapping[str, Any], which: Which, checkpoint: str | Path) -> dict[str, Tensor]:
    trained = whole_tensors(contents["trained"])
    if _set(contents, which) == "trained":
        return trained
    if contents["slow"] is None:
        raise MisconfigurationException(
            f"{checkpoint} holds no slow weights: the run had no `LoRAInterpolator`. Export the trained weights"
            " (`--weights trained`)."
        )
    slow = whole_tensors(contents["slow"])
    return {name: slow[name].to(tensor.dtype) if name in slow else tensor for name, tensor in trained.items()}


def _base(given: str | Path | None, known: str | None, source: Path) -> str:
    base = given if given is not None else known
    if base is None:
        raise MisconfigurationException(
            f"{source} does not say which base model it belongs to (the model was given as an object). Name the folder of"
            " the full-precision base (`--base`)."
        )
    return str(base)
