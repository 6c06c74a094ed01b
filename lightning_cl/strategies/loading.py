# SPDX-License-Identifier: Apache-2.0
"""Models whose weights stay in their file until they are used, so that the processes of a node share one copy."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_cl.strategies.merging import locate, weight_files


def load_mapped(folder: str | Path, dtype: str | torch.dtype = "auto", **kwargs: Any) -> Any:
    """A causal language model whose parameters are views of its mapped safetensors files.

    ``from_pretrained`` copies a checkpoint into each process. Here a page of the file is read when a layer is used, and
    all processes of a node share it. Together with a 4-bit strategy, which takes layer after layer to the device, a node
    needs host memory for one checkpoint, however many processes it has. Weights that are trained are copied page by page
    as they are written; the file never changes.

    Args:
        folder: a model folder with safetensors files.
        dtype: ``"auto"`` keeps the files' dtypes; another dtype converts, which copies.
        **kwargs: of ``AutoModelForCausalLM.from_config``, such as ``attn_implementation``.

    Returns:
        The model, in training mode as any new module.

    Raises:
        FileNotFoundError: if the folder has no safetensors files.
        MisconfigurationException: if a parameter is not in the files under its own name, or the model is quantized.
    """
    from safetensors import safe_open
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    folder = Path(folder)
    files = weight_files(folder)
    raw = json.loads((folder / "config.json").read_text())
    if "quantization_config" in raw:
        raise MisconfigurationException(
            f"{folder} is quantized already, and its tensors are no plain weights. Load it with `from_pretrained`."
        )
    with _parameters_on_meta():
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), **kwargs)
    model.tie_weights()
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    names = dict.fromkeys(n for n, _ in model.named_parameters())
    handles = {file: safe_open(folder / file, "pt") for file in files}
    stored = {key: file for file, handle in handles.items() for key in handle.keys()}  # noqa: SIM118 - not a dict
    places = locate(set(names), stored, folder, {})
    known = {name: key for key, found in places.items() for name in found}
    by_parameter: dict[int, nn.Parameter] = {}
    for name in tied:
        parent, _, child = name.rpartition(".")
        owner = model.get_submodule(parent)
        old = owner._parameters[child]
        if id(old) not in by_parameter:
            if name not in known:
                continue
            tensor = handles[stored[known[name]]].get_tensor(known[name])
            if tensor.shape != old.shape:
                raise MisconfigurationException(
                    f"{folder} has {known[name]} with shape {tuple(tensor.shape)}, where its config.json says"
                    f" {tuple(old.shape)}. Load it with `from_pretrained`, which says what differs."
                )
            wanted = tensor.dtype if dtype == "auto" else _dtype(dtype)
            by_parameter[id(old)] = nn.Parameter(tensor.to(wanted))
    for name in tied:
        parent, _, child = name.rpartition(".")
        owner = model.get_submodule(parent)
        owner._parameters[child] = by_parameter[id(owner._parameters[child])]
    buffers = next(iter(by_parameter.values())).dtype
    for part in model.modules():
        for key, buffer in part._buffers.items():
            # Persistent buffers follow the weights; the others (rotary frequencies) need their precision.
            if buffer is not None and key not in part._non_persistent_buffers_set and buffer.is_floating_point():
                part._buffers[key] = buffer.to(buffers)
    model.config._name_or_path = str(folder)
    model.config.dtype = buffers
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def can_be_mapped(name: str | Path, kwargs: Mapping[str, Any]) -> bool:
    """Whether :func:`load_mapped` could take the place of ``from_pretrained(name, **kwargs)``.

    >>> can_be_mapped("owner/model", {})
    False
    """
    return (
        any(Path(name).glob("*.safetensors"))
        and (Path(name) / "config.json").is_file()
        and kwargs.keys() <= {"attn_implementation"}
    )


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Parameters lose their values as they are registered; buffers keep theirs."""
    register = nn.Module.register_parameter

    def empty(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(self, name, param)
        if param is not None and not param.is_meta:
            self._parameters[name] = nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)

    nn.Module.register_parameter = empty  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _dtype(dtype: str | torch.dtype) -> torch.dtype:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype):
        raise ValueError(f"`dtype={dtype!r}` is no dtype of torch. Use 'auto', 'bfloat16', 'float32' or 'float16'.")
    return found
