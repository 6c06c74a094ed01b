# SPDX-License-Identifier: Apache-2.0
"""LoRA merged into a full-precision base on disk, one tensor at a time."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_cl.strategies.files import write_atomically
from lightning_cl.strategies.fingerprint import summary, tensor_digest

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
# What else belongs to a model folder; weights are written anew.
_COPIED = ("*.json", "*.jinja", "*.model", "*.txt", "*.py", "LICENSE*")
_DELTAS = (
    "lora_A.weight",
    "lora_B.weight",
    "lora_magnitude_vector",
    "lora_embedding_A",
    "lora_embedding_B",
    "lora_B.bias",
)
_SUPPORTED = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")


def merge_into(
    base: str | Path,
    folder: str | Path,
    adapter: Mapping[str, Tensor],
    config: Mapping[str, Any] | None,
    weights: Mapping[str, Tensor] | None = None,
    fingerprint: Mapping[str, str] | None = None,
) -> Path:
    """Write ``base + LoRA`` as a model folder that transformers loads, never holding more than one file of weights.

    A tensor becomes ``W + s * B @ A`` in float32 and is rounded to the base's dtype once; ``s = alpha / r``, or
    ``alpha / sqrt(r)`` with rank-stabilised LoRA; with DoRA each row is scaled to the trained magnitude.

    Args:
        base: folder of the full-precision base model, with safetensors files.
        folder: where to write.
        adapter: the adapter's tensors, as PEFT names them in a file.
        config: its PEFT configuration; None without an adapter.
        weights: further trained weights, by their name in the base model, which replace the base's.
        fingerprint: digests of the base's tensors by name, which are checked on the way.

    Returns:
        The folder.

    Raises:
        FileNotFoundError: if ``base`` is no folder with safetensors files.
        MisconfigurationException: if the base is another one, a tensor is missing, or the adapter is of a kind that
            this arithmetic does not know.
    """
    base, folder = Path(base), Path(folder)
    files = weight_files(base)
    layers, whole = _sort(adapter, config)
    whole.update(weights or {})
    model_config = json.loads((base / "config.json").read_text())
    if "quantization_config" in model_config:
        raise MisconfigurationException(
            f"The base {base} is quantized ({model_config['quantization_config'].get('quant_method', '?')}), and merging"
            " would round the adapter away. Give the folder of the full-precision model (`--base`)."
        )
    from safetensors import safe_open
    from safetensors.torch import save_file

    names: dict[str, str] = {}
    for file in files:
        with safe_open(base / file, "pt") as handle:
            names.update(dict.fromkeys(handle.keys(), file))
    places = locate({*layers, *whole}, names, base, model_config)
    digests = locate(set(fingerprint or ()), names, base, model_config, strict=False)
    _check_finished(folder, base)
    folder.mkdir(parents=True, exist_ok=True)
    different: list[str] = []
    found: dict[str, str] = {}
    written: dict[str, str] = {}
    size = 0
    for number, file in enumerate(files):
        tensors: dict[str, Tensor] = {}
        with safe_open(base / file, "pt") as handle:
            for key in handle.keys():  # noqa: SIM118 - not a dict
                tensor = handle.get_tensor(key)
                for name in digests.get(key, ()):
                    found[name] = tensor_digest(tensor)
                    if found[name] != (fingerprint or {})[name]:
                        different.append(name)
                for name in places.get(key, ()):
                    tensor = _merged(tensor, name, layers, whole, config)
                tensors[key] = tensor.contiguous()
        if number == len(files) - 1:
            # A trained copy of a weight that the base's file does not have (a head that was tied to the embedding).
            for name in places.get("", ()):
                tensors[name] = whole[name].contiguous()
                model_config["tie_word_embeddings"] = False
        size += sum(t.numel() * t.element_size() for t in tensors.values())
        written.update(dict.fromkeys(tensors, file))
        save_file(tensors, folder / f".{file}.tmp", metadata={"format": "pt"})
    if different:
        for file in files:
            (folder / f".{file}.tmp").unlink()
        raise MisconfigurationException(
            f"The base {base} is not the one that the adapter was trained on: fingerprint"
            f" {summary(dict(fingerprint or {}))} there, {summary(found)} here ({len(different)} tensors differ, first:"
            f" {different[0]}). Give the folder of the right base (`--base`)."
        )
    for file in files:
        (folder / f".{file}.tmp").replace(folder / file)
    for pattern in _COPIED:
        for path in base.glob(pattern):
            if path.name not in (_INDEX, "config.json"):
                shutil.copy(path, folder / path.name)
    if len(files) > 1 or files[0] != _SINGLE:
        _write_json(folder / _INDEX, {"metadata": {"total_size": size}, "weight_map": written})
    _write_json(folder / "config.json", model_config)
    return folder


def weight_files(base: Path) -> list[str]:
    """Names of the safetensors files of a model folder.

    Raises:
        FileNotFoundError: if it has none.
    """
    if (base / _INDEX).is_file():
        return sorted(set(json.loads((base / _INDEX).read_text())["weight_map"].values()))
    if (base / _SINGLE).is_file():
        return [_SINGLE]
    raise FileNotFoundError(
        f"{base} holds neither {_SINGLE} nor {_INDEX}. Give the folder of the full-precision base model (`--base`); one in"
        " another format can be written anew with `model.save_pretrained(folder)`."
    )


def _sort(
    adapter: Mapping[str, Tensor], config: Mapping[str, Any] | None
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """LoRA matrices by the name of the weight they change, and whole weights (``modules_to_save``)."""
    if config is not None:
        _check_config(config)
    layers: dict[str, dict[str, Tensor]] = {}
    whole: dict[str, Tensor] = {}
    for name, tensor in adapter.items():
        short = name.removeprefix("base_model.model.")
        kind = next((k for k in _DELTAS if short.endswith(f".{k}")), None)
        if kind is None:
            whole[short] = tensor
        elif kind in _SUPPORTED:
            layers.setdefault(f"{short.removesuffix(f'.{kind}')}.weight", {})[kind] = tensor
        else:
            raise MisconfigurationException(_unknown(f"a tensor of the kind `{kind}` ({name})"))
    return layers, whole


def _check_config(config: Mapping[str, Any]) -> None:
    if str(config.get("peft_type", "")).rpartition(".")[2] != "LORA":
        raise MisconfigurationException(_unknown(f"an adapter of the type `{config.get('peft_type')}`"))
    for option in ("alora_invocation_tokens", "target_parameters", "trainable_token_indices", "megatron_config"):
        if config.get(option):
            raise MisconfigurationException(_unknown(f"`{option}`"))


def _unknown(what: str) -> str:
    return (
        f"Merging tensor by tensor does not know {what}. Export the adapter without `--merge`, and merge it with PEFT's"
        " `merge_and_unload()` into the base loaded in full precision."
    )


def _merged(
    tensor: Tensor,
    name: str,
    layers: Mapping[str, Mapping[str, Tensor]],
    whole: Mapping[str, Tensor],
    config: Mapping[str, Any] | None,
) -> Tensor:
    if name in whole:
        if whole[name].shape != tensor.shape:
            raise MisconfigurationException(
                f"The trained {name} has shape {tuple(whole[name].shape)}, the base's {tuple(tensor.shape)}. Merge into the"
                " base that the run started from."
            )
        return whole[name].to(tensor.dtype)
    assert config is not None
    parts = layers[name]
    down, up = parts["lora_A.weight"].float(), parts["lora_B.weight"].float()
    delta = (up @ down) * _scale(name, down.shape[0], config)
    # GPT-2's layers keep the transposed weight.
    delta = delta.T if config.get("fan_in_fan_out") else delta
    if delta.shape != tensor.shape:
        raise MisconfigurationException(
            f"The adapter's change of {name} has shape {tuple(delta.shape)}, the base's weight {tuple(tensor.shape)}. Merge"
            " into the base that the run started from."
        )
    result = tensor.float() + delta
    if "lora_magnitude_vector" in parts:
        rows = 0 if config.get("fan_in_fan_out") else 1
        norm = result.norm(dim=rows, keepdim=True)
        result = result * (parts["lora_magnitude_vector"].float().reshape(norm.shape) / norm)
    return result.to(tensor.dtype)


def _scale(name: str, rank: int, config: Mapping[str, Any]) -> float:
    layer = name.removesuffix(".weight")
    alpha = config["lora_alpha"]
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", layer):
            alpha = value
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def locate(
    wanted: set[str], names: Mapping[str, str], base: Path, config: Mapping[str, Any], strict: bool = True
) -> dict[str, list[str]]:
    """Which tensor of the files each wanted weight is; ``""`` collects those that the files do not have, being tied.

    Raises:
        MisconfigurationException: if a weight is not found and ``strict``.
    """
    ends: dict[str, list[str]] = {}
    for key in names:
        ends.setdefault(key.partition(".")[2], []).append(key)
    places: dict[str, list[str]] = {}
    missing = []
    for name in sorted(wanted):
        shorter = name.partition(".")[2]
        if name in names:
            places.setdefault(name, []).append(name)
        elif shorter in names:  # the files hold the backbone alone
            places.setdefault(shorter, []).append(name)
        elif len(ends.get(name, ())) == 1:  # the model is the backbone alone
            places.setdefault(ends[name][0], []).append(name)
        elif config.get("tie_word_embeddings") and name.endswith(("lm_head.weight", "embed_out.weight")):
            places.setdefault("", []).append(name)
        else:
            missing.append(name)
    if missing and strict:
        raise MisconfigurationException(
            f"The base {base} has no tensor {missing[0]!r} ({len(missing)} of {len(wanted)} are missing). Merge into the"
            " base that the run started from; a model whose files name or fuse tensors in another way than its classes do"
            " can be written anew with `model.save_pretrained(folder)`."
        )
    return places


def _check_finished(folder: Path, base: Path) -> None:
    if folder.resolve() == base.resolve():
        raise MisconfigurationException(
            f"The base {base} is also the folder to write to, and would be overwritten. Give another folder (`--out`)."
        )


def _write_json(path: Path, value: Any) -> None:
    text = json.dumps(value, indent=2, sort_keys=True).encode()
    write_atomically(path, lambda file: file.write(text))


def whole_tensors(tensors: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tensors on the CPU, read from the checkpoint where they are still on disk."""
    return {
        n: (t.read() if hasattr(t, "read") else t).detach().to("cpu") for n, t in tensors.items() if hasattr(t, "shape")
    }
