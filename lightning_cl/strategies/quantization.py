# SPDX-License-Identifier: Apache-2.0
"""Frozen linear layers in 4 bits, inside any module, one layer at a time."""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_cl.anatomy import adapter_layers, pretrained_model
from lightning_cl.strategies.blocks import RECOMPUTED
from lightning_cl.strategies.config import QuantizationConfig
from lightning_cl.strategies.packed_linear import packed_linear
from lightning_cl.strategies.packed_weight import PackedWeight, ordinary
from lightning_cl.strategies.record import record_of
from lightning_cl.weights import clean_name

# Names that heads have in modules which are no Hugging Face models.
_HEADS = ("lm_head", "head", "classifier", "score", "output_layer")


def quantize(
    module: nn.Module,
    config: QuantizationConfig | None,
    device: torch.device,
    dtype: torch.dtype,
    part: str = "",
    shardable: bool = False,
) -> list[str]:
    """Hold the frozen linear layers of ``module`` in 4 bits, each quantized by itself on ``device``.

    Layers that are in 4 bits already stay as they are, so calling it again is harmless; layers of bitsandbytes that
    transformers made are adopted. PEFT's LoRA layers become PEFT's 4-bit LoRA layers.

    Args:
        module: the whole module.
        config: what and how; None only adopts.
        device: where the packed weights go.
        dtype: compute dtype, in which the packed bytes are stored too.
        part: look inside this submodule only.
        shardable: store packed weights as plain parameters, which FSDP can shard.

    Returns:
        Names of the layers that were quantized or adopted by this call.

    Raises:
        MisconfigurationException: if nothing can be quantized, or ``config.only`` names a trainable layer.
    """
    record = record_of(module)
    prefix = f"{part}." if part else ""
    done = []
    for name, theirs in adopted(module, prefix):
        _adopt(theirs, dtype, shardable)
        done.append(name)
    if config is not None:
        for name in candidates(module, config):
            if name.startswith(prefix):
                layer: Any = module.get_submodule(name)
                _replace(module, name, _pack(layer, config, device, dtype, shardable))
                done.append(name)
    _use_peft_4bit(module, done)
    record.quantized.extend(n for n in done if n not in record.quantized)
    if config is not None and not part and not record.quantized:
        raise MisconfigurationException(
            f"4-bit layers were asked for, but `{type(module).__name__}` has no frozen `nn.Linear` layer to hold in 4 bits."
            " Freeze the base (for instance with a `peft.LoraConfig`), or use a strategy without `_4bit`."
        )
    return done


def candidates(module: nn.Module, config: QuantizationConfig) -> list[str]:
    """Names of the linear layers that the config quantizes.

    Raises:
        MisconfigurationException: if ``config.only`` names a trainable layer, or nothing.
    """
    out = _left_out(module)
    uses: dict[int, int] = {}
    for _, parameter in module.named_parameters(remove_duplicate=False):
        uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    found, trainable = [], []
    for name, layer in module.named_modules():
        if not isinstance(layer, nn.Linear) or type(layer).forward is not nn.Linear.forward:
            continue
        asked = config.only is None or any(pattern in name for pattern in config.only)
        if not asked or id(layer) in out or any(pattern in name for pattern in config.skip):
            continue
        if any(p.requires_grad for p in layer.parameters()):
            trainable.append(name)
        elif uses[id(layer.weight)] == 1:
            found.append(name)
    if config.only is not None and trainable:
        raise MisconfigurationException(
            f"`only={config.only}` asks for 4 bits in {len(trainable)} trainable layers (first: {trainable[0]}), and 4-bit"
            " weights cannot be trained. Freeze them, or take them out of `only`."
        )
    if config.only is not None and not found and not record_of(module).quantized:
        raise MisconfigurationException(
            f"`only={config.only}` fits no frozen linear layer of `{type(module).__name__}`. Use parts of names that"
            " `dict(module.named_modules())` lists, or leave `only` out."
        )
    return found


def linear_4bit() -> type[Any]:
    """The 4-bit linear layer used here: bitsandbytes' class with a forward that keeps the packed weight as it is."""
    return _linear_4bit()


def quantization_states(module: nn.Module) -> dict[str, Any]:
    """What a checkpoint with the base needs besides the packed weights: scales and codes, by name."""
    states = {}
    for name in record_of(module).quantized:
        state = getattr(module.get_submodule(name), "quant_state", None)
        if state is not None:
            for key, value in state.as_dict(packed=True).items():
                states[clean_name(f"{name}.weight.{key}")] = value
    return states


def restore_quantization_states(module: nn.Module, state: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Put scales and codes of a checkpoint back.

    Returns:
        What is left of ``state`` for parameters and buffers.

    Raises:
        MisconfigurationException: if the checkpoint has full-precision weights for layers held in 4 bits, or the reverse.
    """
    left = dict(state)
    for name in record_of(module).quantized:
        layer: Any = module.get_submodule(name)
        key = clean_name(f"{name}.weight")
        parts = {k.removeprefix(f"{key}."): left.pop(k) for k in list(left) if k.startswith(f"{key}.")}
        if key in left and not parts:
            raise MisconfigurationException(
                f"The checkpoint {path} holds full-precision weights for {name}, which is held in 4 bits here. Load it with"
                " a strategy without `_4bit`, or build the model from that base and load the adapters alone."
            )
        if parts:
            from bitsandbytes.functional import QuantState

            layer.quant_state = QuantState.from_dict(
                {f"weight.{k}": _whole(v) for k, v in parts.items()}, device=_device(layer)
            )
            if hasattr(layer.weight, "quant_state"):
                layer.weight.quant_state = layer.quant_state
    packed = [k for k in left if ".quant_state.bitsandbytes__" in k]
    if packed:
        raise MisconfigurationException(
            f"The checkpoint {path} holds {len(packed)} layers in 4 bits (first: {packed[0].split('.weight.')[0]}), which"
            " are not in 4 bits here. Use the `_4bit` strategy it was saved with."
        )
    return left


class Probe:
    """Remembers one quantized layer's output, to see whether it is the same after sharding.

    Args:
        module: the module.
        name: the layer's name.
    """

    def __init__(self, module: nn.Module, name: str) -> None:
        self.name = name
        self._module = module
        self._packed = _bytes(self._layer.weight).clone()
        self._output = self._run()

    def compare(self) -> list[str]:
        """Run the layer again, gathered; a difference is a problem to raise, with its cause."""
        output = self._run()
        packed = _bytes(self._layer.weight)
        same_bytes = packed.shape == self._packed.shape and torch.equal(packed, self._packed)
        # GPU kernels may sum in another order each time; another scale moves the output by far more.
        if same_bytes and torch.allclose(output, self._output, rtol=0.02, atol=0.02 * float(self._output.abs().max())):
            return []
        if packed.shape != self._packed.shape:
            cause = f"its packed weight has {packed.numel()} bytes instead of {self._packed.numel()}"
        elif changed := int((packed != self._packed).sum()):
            cause = (
                f"{changed} of {packed.numel()} packed bytes changed, as they do when the storage dtype"
                f" ({self._layer.weight.dtype}) is converted or NaN patterns are normalised"
            )
        else:
            cause = "its packed weight is intact, so its scales were changed or moved"
        worst = (output.float() - self._output.float()).abs().max().item()
        return [
            f"The 4-bit layer {self.name} gives another output after sharding than before (largest difference"
            f" {worst:.3g}): {cause}. Training would run on wrong weights. Use `precision='bf16-true'`, or report this with"
            " the versions of torch and bitsandbytes; `QuantizationConfig(check=False)` skips the comparison."
        ]

    @property
    def _layer(self) -> Any:
        return self._module.get_submodule(self.name)

    def _run(self) -> Tensor:
        layer = self._layer
        generator = torch.Generator().manual_seed(0)
        rows = torch.randn(4, layer.in_features, generator=generator)
        with torch.no_grad():
            return layer(rows.to(_device(layer), layer.compute_dtype)).detach().clone()


@functools.cache
def _linear_4bit() -> type[Any]:
    bnb = _bitsandbytes()
    base: Any = bnb.nn.Linear4bit

    class Linear4bit(base):
        """bitsandbytes' layer, with its state in the module instead of in a tensor subclass.

        bitsandbytes' own forward replaces the parameter of a layer that FSDP holds, and repacks it in place in evaluation
        on CPUs with AVX512-BF16, after which it cannot be trained on. Its kernel for CPUs misreads weights whose rows are no
        whole blocks.
        """

        def forward(self, x: Tensor) -> Tensor:
            compute = x.dtype if self.compute_dtype is None else self.compute_dtype
            bias = None if self.bias is None else self.bias.to(compute)
            misread = x.device.type == "cpu" and self.in_features % self.quant_state.blocksize
            if torch.compiler.is_compiling() or misread:
                out = packed_linear(x.to(compute), self.weight, self.quant_state, getattr(self, RECOMPUTED, False))
                return (out if bias is None else out + bias).to(x.dtype)
            out = bnb.matmul_4bit(x.to(compute), self.weight, bias=bias, quant_state=self.quant_state)
            return out.to(x.dtype)

        def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
            nn.Linear._save_to_state_dict(self, destination, prefix, keep_vars)
            for key, value in self.quant_state.as_dict(packed=True).items():
                destination[f"{prefix}weight.{key}"] = value if keep_vars else value.detach()

        def _apply(self, fn: Any, recurse: bool = True) -> Any:
            super()._apply(fn, recurse)
            self.quant_state.to(self.weight.device)
            return self

    return Linear4bit


def adopted(module: nn.Module, prefix: str = "") -> list[tuple[str, Any]]:
    """Layers that bitsandbytes' own class holds in 4 bits (a model that transformers quantized)."""
    if "bitsandbytes" not in sys.modules:
        return []
    import bitsandbytes as bnb

    return [
        (name, layer)
        for name, layer in module.named_modules()
        if type(layer) is bnb.nn.Linear4bit and name.startswith(prefix)
    ]


def _adopt(layer: Any, dtype: torch.dtype, shardable: bool) -> None:
    if getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
        from bitsandbytes.nn.modules import _convert_weight_packed_for_cpu_inverse

        layer.weight.data, layer.weight.quant_state = _convert_weight_packed_for_cpu_inverse(
            layer.weight.data, layer.weight.quant_state
        )
    layer.quant_state = layer.weight.quant_state
    if layer.compute_dtype is None:
        layer.compute_dtype = dtype
    layer.__class__ = _linear_4bit()
    if shardable:
        layer.weight = nn.Parameter(_shardable(layer.weight.data), requires_grad=False)


def _pack(
    layer: nn.Linear, config: QuantizationConfig, device: torch.device, dtype: torch.dtype, shardable: bool
) -> Any:
    bnb = _bitsandbytes()
    with torch.device("meta"):
        new = _linear_4bit()(
            layer.in_features,
            layer.out_features,
            bias=False,
            compute_dtype=dtype,
            compress_statistics=config.double,
            quant_type=config.quant_type,
            quant_storage=dtype,
        )
    if layer.weight.is_meta:
        raise MisconfigurationException(
            "4-bit layers were asked for, but the module's weights are on the meta device, without values. Load the"
            " model with `lightning_cl.strategies.loading.load_mapped`, which leaves the weights in their file until they"
            " are used, or with `from_pretrained`."
        )
    with torch.no_grad():
        weight = layer.weight.detach().to(device=device, dtype=dtype).contiguous()
        packed, state = bnb.functional.quantize_4bit(
            weight,
            blocksize=64,
            compress_statistics=config.double,
            quant_type=config.quant_type,
            quant_storage=dtype,
        )
    if shardable:
        new.weight = nn.Parameter(_shardable(packed), requires_grad=False)
    else:
        new.weight = bnb.nn.Params4bit(
            packed,
            requires_grad=False,
            quant_state=state,
            blocksize=64,
            compress_statistics=config.double,
            quant_type=config.quant_type,
            quant_storage=dtype,
            module=new,
            bnb_quantized=True,
        )
    new.quant_state = state
    new.bias = layer.bias
    new.train(layer.training)
    setattr(new, RECOMPUTED, getattr(layer, RECOMPUTED, False))
    return new


def _replace(module: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(module.get_submodule(parent) if parent else module, child, new)


def _use_peft_4bit(module: nn.Module, names: list[str]) -> None:
    wrapped = {name.removesuffix(".base_layer") for name in names if name.endswith(".base_layer")}
    if not wrapped:
        return
    classes = _peft_classes()
    for name in wrapped:
        layer: Any = module.get_submodule(name)
        four_bit = classes.get(type(layer))
        if four_bit is not None:
            # In place, so that hooks and references to the layer stay good; both classes have the same attributes.
            layer.__class__ = four_bit


def _peft_classes() -> dict[type, type]:
    from peft.tuners import adalora, ia3, lora
    from peft.tuners.lora import bnb as lora_bnb

    classes: dict[type, type] = {lora.Linear: lora_bnb.Linear4bit}
    for plain, package in ((ia3.Linear, ia3), (adalora.SVDLinear, adalora)):
        name = "SVDLinear4bit" if plain is adalora.SVDLinear else "Linear4bit"
        if hasattr(package, name):
            classes[plain] = getattr(package, name)
    return classes


def _left_out(module: nn.Module) -> set[int]:
    """Modules that are never quantized: heads, and the adapters themselves."""
    out: set[int] = set()
    model = pretrained_model(module)
    head = model.get_output_embeddings() if model is not None else None
    if head is not None:
        out.update(id(part) for part in head.modules())
    for name, part in module.named_modules():
        if name.rpartition(".")[2] in _HEADS:
            out.update(id(p) for p in part.modules())
    for layer in adapter_layers(module):
        base = {id(part) for part in layer.get_base_layer().modules()}
        out.update(id(part) for part in layer.modules() if id(part) not in base)
    return out


def _shardable(packed: Tensor) -> Tensor:
    return ordinary(packed).as_subclass(PackedWeight)


def _bytes(weight: Tensor) -> Tensor:
    return ordinary(weight).contiguous().reshape(-1).view(torch.uint8)


def _device(layer: Any) -> torch.device:
    return layer.quant_state.absmax.device


def _whole(value: Any) -> Tensor:
    return value.read() if hasattr(value, "read") else value


def _bitsandbytes() -> Any:
    try:
        import bitsandbytes
    except ImportError as error:
        raise ModuleNotFoundError(
            f"4-bit layers need bitsandbytes, which cannot be imported ({error}). Install it (`pip install bitsandbytes`),"
            " or use a strategy without `_4bit`."
        ) from error
    return bitsandbytes
