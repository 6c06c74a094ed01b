# SPDX-License-Identifier: Apache-2.0
"""One LoRA adapter a task, in the layers above the feature layer; the ones that are not needed wait in host memory."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_cl import anatomy, weights
from lightning_cl.routing.features import shallow_modules

__all__ = ["AdapterBank"]

# These initialisations change the base weights to fit one adapter, and the base is shared by all tasks.
_NEUTRAL_INITS = (True, False, "gaussian", "orthogonal")


class AdapterBank:
    """Adds, switches, stores and restores the tasks' adapters of one PEFT model.

    The user's own adapter is the template: its configuration is copied for each task, without the layers up to the
    feature layer, and it stays in the model, inactive.

    Memory: the active adapter and the adapters in use (plus one that was used last) are on the model's device, all
    others in host memory. Sharded adapters (FSDP) stay where they are, since every rank holds only a part.

    Args:
        module: The module that holds one PEFT model.
        feature_layer: Name of the feature layer inside ``module``.
        seed: Adapters start from the same weights on every rank and in every run.
        template: Whether the model's first adapter is a template. False: it is a task's adapter like the others (a
            loaded model), and none can be added.

    Raises:
        MisconfigurationException: If adapters cannot be kept apart for this configuration.
    """

    def __init__(self, module: nn.Module, feature_layer: str, seed: int = 0, template: bool = True) -> None:
        self.module = module
        self.feature_layer = feature_layer
        self.seed = seed
        self.model: Any = anatomy.peft_model(module)
        if self.model is None:
            raise MisconfigurationException(
                f"`{type(module).__name__}` has adapter layers but no `peft.PeftModel`, so no adapter can be added to it."
                " Wrap the network with `peft.get_peft_model`."
            )
        self.template: str | None = next(iter(self.model.peft_config)) if template else None
        self.config: Any = self.model.peft_config[self.template] if template else None
        self.active: str | None = None
        self._host: dict[str, dict[str, Tensor]] = {}
        self._resident: list[str] = self.names
        self._waiting: set[str] = set()  # adapters in host memory
        self._known: dict[str, dict[str, nn.Parameter]] = {}
        if template:
            self._check_config()
        self.layers = self._layers_above()

    @property
    def names(self) -> list[str]:
        """All adapters of the model but the template."""
        return [name for name in self.model.peft_config if name != self.template]

    @property
    def device(self) -> torch.device:
        """Where the base model is."""
        return next(p.device for n, p in self.model.named_parameters() if "lora_" not in n)

    # ------------------------------------------------------------------ adding and switching

    def add(self, name: str) -> None:
        """Add an adapter like the template, in the layers above the feature layer only. Known names are left alone.

        Raises:
            MisconfigurationException: If the model is sharded already: gradients of what is added now would not be
                reduced over the ranks.
        """
        if name in self.model.peft_config:
            return
        if weights.is_sharded(self.module):
            raise MisconfigurationException(
                f"The model is sharded already and has {len(self.names)} adapters, so {name!r} cannot be added: its"
                " gradients would silently not be reduced over the ranks. Set `max_tasks` of `RLSRouterFitter` to the"
                " number of tasks, which allocates all adapters before sharding."
            )
        before = {n: p.requires_grad for n, p in self.model.named_parameters()}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed + len(self.names))
            self.model.add_adapter(name, self._config_above(), autocast_adapter_dtype=False)
        like = next(p for n, p in self.model.named_parameters() if f".{self.template}." in n and "lora_" in n)
        for full, parameter in self.model.named_parameters():
            if full in before:
                parameter.requires_grad_(before[full])
            else:
                # One type in all adapters: FSDP groups refuse a mixture, and a task must not train in another precision.
                parameter.data = parameter.data.to(like.dtype)
                parameter.requires_grad_(False)
        self._resident.append(name)

    def activate(self, name: str) -> None:
        """Make ``name`` the only adapter that is active and that trains; it comes to the model's device."""
        self.fetch([name])
        self._host.pop(name, None)  # it changes from now on
        # A gathered FSDP group shows temporary parameters: flags must be set on the shards that the optimizer sees.
        weights.reshard(self.module)
        self.model.set_adapter(name)
        self.active = name

    def parameters(self, name: str) -> dict[str, nn.Parameter]:
        """The adapter's parameters by their names inside the PEFT model."""
        if name in self._known:
            return self._known[name]
        marks = (f".lora_A.{name}.", f".lora_B.{name}.", f".lora_embedding_A.{name}", f".lora_embedding_B.{name}")
        found = {n: p for n, p in self.model.named_parameters() if any(mark in n for mark in marks)}
        # Looking at every name of a large model takes longer than a small batch. Sharding replaces parameters.
        if found and not weights.is_sharded(self.module):
            self._known[name] = found
        return found

    def untrained(self, name: str) -> bool:
        """Whether the adapter still changes nothing (its B is zero); True for a sharded model, which cannot tell."""
        if weights.is_sharded(self.module):
            return True
        return not any(bool(p.detach().any()) for n, p in self.parameters(name).items() if "lora_B" in n)

    # ------------------------------------------------------------------ storing and restoring

    def snapshot(self, name: str) -> dict[str, Tensor]:
        """The adapter's whole weights on the CPU, on every rank. Collective for a sharded model."""
        parameters = self.parameters(name)
        weights.reshard(self.module)
        parameters = self.parameters(name)
        shards = {n: weights.local(p) for n, p in parameters.items()}
        return weights.gather(self.model, shards, parameters, everywhere=True)

    def restore(self, name: str, whole: Mapping[str, Tensor]) -> None:
        """Write whole weights into the adapter (this rank's shards of them)."""
        weights.reshard(self.module)
        parameters = self.parameters(name)
        if set(parameters) != set(whole):
            missing = sorted(set(parameters) ^ set(whole))
            raise MisconfigurationException(
                f"The stored adapter {name!r} and the model's do not have the same weights ({len(missing)} differ, first:"
                f" {missing[0]!r}). Build the model with the `LoraConfig` and `feature_layer` that it was trained with."
            )
        for full, shard in weights.scatter(self.model, whole, parameters).items():
            with torch.no_grad():
                weights.local(parameters[full]).copy_(shard)
        self._host.pop(name, None)

    # ------------------------------------------------------------------ host and device

    @property
    def can_offload(self) -> bool:
        """Whether adapters can wait in host memory: the model is whole, and on another device than the CPU."""
        return self.device.type != "cpu" and not weights.is_sharded(self.module)

    def offload(self, keep: Iterable[str] = ()) -> None:
        """Send every adapter but ``keep`` (the template included) to host memory."""
        if not self.can_offload:
            return
        keep = set(keep)
        self._resident = [name for name in self._resident if name in keep]
        for name in self.model.peft_config:
            if name not in keep:
                self._to_host(name)

    def fetch(self, names: Iterable[str]) -> None:
        """Bring adapters to the model's device; of those not asked for, only the last one used stays.

        The active one stays, too: its optimizer expects it where it is.
        """
        wanted = [n for n in dict.fromkeys(names) if n in self.model.peft_config]
        spare = [n for n in self._resident if n not in wanted and n != self.active]
        staying = [n for n in self._resident if n == self.active and n not in wanted]
        self._resident = [*staying, *spare[-1:], *wanted]
        leaving, coming = spare[:-1], self._waiting.intersection(wanted)
        if not (leaving or coming) or not self.can_offload:
            return
        # Evaluations run in inference mode, where copies would be tensors that can never train again.
        with torch.inference_mode(False):
            for name in leaving:
                self._to_host(name)
            device = self.device
            for name in coming:
                for parameter in self.parameters(name).values():
                    parameter.data = parameter.data.to(device, non_blocking=True)
        self._waiting -= coming

    def forget_copies(self) -> None:
        """Take no copy in host memory for the adapter's weights: a checkpoint may have changed those on the device."""
        self._host.clear()

    def _to_host(self, name: str) -> None:
        # A frozen adapter is the same in both places, so that after the first time nothing is copied back.
        self._waiting.add(name)
        host = self._host.setdefault(name, {})
        for full, parameter in self.parameters(name).items():
            if parameter.device.type == "cpu":
                continue
            if full not in host or parameter.requires_grad:
                host[full] = parameter.data.to("cpu").pin_memory()
            parameter.data = host[full]

    # ------------------------------------------------------------------ files

    def export(self, name: str, folder: str | Path, whole: Mapping[str, Tensor] | None = None) -> None:
        """Write the adapter as a PEFT folder (``adapter_config.json``, ``adapter_model.safetensors``).

        Args:
            name: The adapter.
            folder: Where; made if missing.
            whole: Its weights, from `snapshot`; None takes a snapshot now (collective for a sharded model).
        """
        from safetensors.torch import save_file

        whole = self.snapshot(name) if whole is None else whole
        Path(folder).mkdir(parents=True, exist_ok=True)
        save_file(peft_tensors(name, whole), Path(folder) / "adapter_model.safetensors", metadata={"format": "pt"})
        config = copy.deepcopy(self.model.peft_config[name])
        config.inference_mode = True
        config.save_pretrained(str(folder))

    def description(self) -> dict[str, str]:
        """What a checkpoint must say besides the weights: the adapters' configuration, and the feature layer's name."""
        config = (
            self._config_above() if self.config is not None else copy.deepcopy(self.model.peft_config[self.names[0]])
        )
        config.inference_mode = True
        values = {k: sorted(v) if isinstance(v, set) else v for k, v in config.to_dict().items()}
        stem = anatomy.name_of(self.module, self.model.base_model.model)
        inside = self.feature_layer.removeprefix(f"{stem}.") if stem else self.feature_layer
        return {"adapter_config": json.dumps(values, default=str), "feature_layer": inside}

    # ------------------------------------------------------------------ inside

    def _check_config(self) -> None:
        config, problem = self.config, ""
        if str(getattr(config.peft_type, "value", config.peft_type)) != "LORA":
            problem = f"`peft_type={config.peft_type}`: routing inside a pass needs LoRA layers. Use `peft.LoraConfig`."
        elif config.use_dora:
            problem = "`use_dora=True`: PEFT cannot mix DoRA adapters in one batch. Use `use_dora=False`."
        elif config.bias != "none":
            problem = (
                f"`bias={config.bias!r}` trains the base model's biases, which all tasks share. Use `bias='none'`."
            )
        elif config.modules_to_save or getattr(config, "trainable_token_indices", None):
            problem = (
                f"`modules_to_save={config.modules_to_save}` trains whole modules, which adapters do not hold. Leave it out,"
                " or give those modules LoRA layers by `target_modules`."
            )
        elif config.init_lora_weights not in _NEUTRAL_INITS:
            problem = (
                f"`init_lora_weights={config.init_lora_weights!r}` changes the base model for one adapter. Use True,"
                " 'gaussian' or 'orthogonal'."
            )
        if problem:
            raise MisconfigurationException(f"The adapter {self.template!r} cannot be copied for each task. {problem}")

    def _layers_above(self) -> list[str]:
        """LoRA layers above the feature layer, by their names inside the base model (what PEFT's configs match)."""
        below = shallow_modules(self.module, self.feature_layer)
        stem = anatomy.name_of(self.module, self.model.base_model.model)
        found: list[str] = []
        too_low: list[str] = []
        layers = {id(layer) for layer in anatomy.adapter_layers(self.module)}
        for full, part in self.module.named_modules():
            if id(part) in layers:
                (too_low if full in below else found).append(full.removeprefix(f"{stem}.") if stem else full)
        if too_low and (self.config is None or self.config.layers_to_transform is not None):
            asked = "" if self.config is None else f" (`layers_to_transform={self.config.layers_to_transform}`)"
            raise MisconfigurationException(
                f"There are adapters at or below the feature layer {self.feature_layer!r}{asked}, first: {too_low[0]!r}."
                " They would change the features by which the router chooses them. Leave those layers out, or choose a"
                " lower `feature_layer`."
            )
        if not found:
            raise MisconfigurationException(
                f"All {len(too_low)} LoRA layers are at or below the feature layer {self.feature_layer!r}, so no adapter is"
                " left to route to. Choose a lower `feature_layer`, or LoRA layers in deeper blocks."
            )
        return found

    def _config_above(self) -> Any:
        """The template's configuration, reduced to the layers above the feature layer."""
        config = copy.deepcopy(self.config)
        config.inference_mode = False
        blocks = [name for name in self._block_names() if any(layer.startswith(f"{name}.") for layer in self.layers)]
        inside = all(any(layer.startswith(f"{name}.") for name in blocks) for layer in self.layers)
        whole = self.feature_layer in anatomy.find_blocks(self.module) if blocks else False
        if inside and whole and not isinstance(config.target_modules, str):
            # The short form that other tools read: projection names and block numbers.
            config.layers_to_transform = [int(name.rpartition(".")[2]) for name in blocks]
            config.layers_pattern = blocks[0].rpartition(".")[0].rpartition(".")[2]
        else:
            config.target_modules = list(self.layers)
            config.layers_to_transform = config.layers_pattern = None
        config.exclude_modules = None if not inside else config.exclude_modules
        return config

    def _block_names(self) -> list[str]:
        stem = anatomy.name_of(self.module, self.model.base_model.model)
        try:
            blocks = anatomy.find_blocks(self.module)
        except MisconfigurationException:
            return []
        return [name.removeprefix(f"{stem}.") if stem else name for name in blocks]


def peft_tensors(name: str, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights under the names of PEFT's files, which leave the adapter's name out."""
    return {n.replace(f".{name}.", ".").removesuffix(f".{name}"): t.contiguous() for n, t in whole.items()}
