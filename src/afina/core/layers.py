"""What a method may know of a layer.

Every layer that computes `weight @ x` is shown in one canonical form: a weight `[out, in]`, whatever the layer keeps.

    linear      nn.Linear and its quantised forms      weight as it is
    transposed  transformers' Conv1D (GPT-2)           weight.T
    conv        nn.Conv1d/2d/3d, grouped or dilated    weight flattened to [out, in / groups * kernel]
    embedding   nn.Embedding                           weight.T: a linear layer over one-hot rows
    norm        LayerNorm, RMSNorm, BatchNorm, ...     weight [n]
    parameter   a bare tensor of a module, for example the fused experts of a mixture, [experts, ...]
    module      anything else; it has no weight to show and can only be replaced or added to

The only isinstance checks on layer types in the library are in this file and in `codecs`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from afina.core.codecs import codec_of, restore, snapshot
from afina.errors import TargetError

__all__ = ["LayerView", "is_norm", "view_of"]

_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class LayerView:
    """A layer in canonical form. `in_features` and `out_features` are sizes of activations (channels for a
    convolution, vocabulary and width for an embedding)."""

    kind = "linear"

    def __init__(self, layer: nn.Module, in_features: int, out_features: int):
        self.layer = layer
        self.in_features, self.out_features = in_features, out_features
        self.before_merge: dict[str, Any] | None = None  # the stored form while adapters are merged into it

    def becomes(self, layer: nn.Module) -> None:
        """Be the view of a layer that stands in for this one, for all who hold it."""
        other = view_of(layer)
        self.__class__ = type(other)
        self.__dict__.update(other.__dict__)

    # --- reading and writing

    def weight(self) -> torch.Tensor:
        """The weight `[out, in]` as floating point, dequantised where it is stored otherwise."""
        return codec_of(self.layer).read(self.layer)

    def bias(self) -> torch.Tensor | None:
        """The bias `[out]`, or None."""
        return getattr(self.layer, "bias", None)

    def own_bias(self) -> torch.Tensor | None:
        """The bias of the layer without anything that is merged into it."""
        return self.bias() if self.before_merge is None else self.before_merge["bias"]

    def write(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        """Store a canonical weight and bias, as new Parameters and in the layer's own storage."""
        codec_of(self.layer).write(self.layer, weight)
        self._write_bias(bias)

    def _write_bias(self, bias: torch.Tensor | None) -> None:
        old = self.layer._parameters.get("bias")
        if bias is not None:
            like = old if old is not None else self.weight()
            bias = nn.Parameter(bias.to(like.device, like.dtype), requires_grad=False)
        self.layer._parameters["bias"] = bias

    def keep(self) -> dict[str, Any]:
        """The stored form, for an exact way back."""
        self.before_merge = snapshot(self.layer)
        return self.before_merge

    def restore(self, kept: dict[str, Any]) -> None:
        """Undo `write`: the stored form comes back bit for bit."""
        restore(self.layer, kept)
        self.before_merge = None

    # --- using a weight the way this layer does

    def product(self) -> tuple[torch.Tensor, torch.Tensor | None] | None:
        """Canonical weight and bias where calling the layer is no more than `F.linear` with them: plain, frozen and whole
        parameters, no hooks, no forward put in the place of its own. None where it may be more."""
        if not self._is_plain or not self.bare:
            return None
        held = self.layer._parameters
        weight, bias = held["weight"], held["bias"]
        if type(weight) is not nn.Parameter or weight.requires_grad or (bias is not None and bias.requires_grad):
            return None
        return weight, bias

    @property
    def _is_plain(self) -> bool:
        """Whether the layer's class computes a product and nothing else."""
        return type(self.layer) is nn.Linear

    @property
    def bare(self) -> bool:
        """Whether calling the layer is no more than its class's forward: no hooks, no forward put in place of its own."""
        own = self.layer.__dict__
        hooked = own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]
        return not (hooked or "forward" in own or _has_any_global_hook())

    @property
    def holds_floats(self) -> bool:
        """Whether the weight is stored as a plain and whole tensor of floating-point numbers."""
        weight = self.layer._parameters.get("weight")
        return type(weight) is nn.Parameter and weight.dtype.is_floating_point

    def holding(self, **parameters: torch.Tensor) -> Callable[..., Any]:
        """The layer as a function, with these tensors in the place of its own parameters."""
        layer = self.layer
        if torch.compiler.is_compiling() or not self.bare:
            return functools.partial(_call_holding, layer, parameters)
        twin = object.__new__(type(layer))  # a tenth of what functional_call takes; buffers and mode are the layer's
        own = twin.__dict__
        own.update(layer.__dict__)
        own["_parameters"] = layer._parameters | parameters
        return twin.forward

    def prepare(self) -> None:
        """Make the layer ready to be adapted."""
        codec_of(self.layer).prepare(self.layer)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the canonical weight."""
        return (self.out_features, self.in_features)

    def apply(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """What the layer would return for `x` if it held this canonical weight and bias."""
        return F.linear(x, weight, bias)

    def project(self, x: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        """First half of a low-rank product: `down` is `[r, in]`, for a convolution also with its kernel laid out."""
        return self.apply(x, down)

    def expand(self, z: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """Second half of a low-rank product: `z` comes from `project`, `up` is `[out, r]`, or a pointwise kernel of that."""
        return F.linear(z, up)

    def per_feature(self, vector: torch.Tensor, activation: torch.Tensor) -> torch.Tensor:
        """`[in]` or `[out]` shaped to broadcast over this layer's input or output."""
        return vector

    def scale_inputs(self, weight: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
        """The canonical weight that sees its input multiplied by `vector` `[in]`."""
        return weight * vector

    # --- where new parameters go

    @property
    def stored(self) -> torch.Tensor | None:
        """The tensor that tells device and dtype; None for a module without parameters."""
        weight = self.layer._parameters.get("weight")
        return weight if weight is not None else next(self.layer.parameters(), None)

    @property
    def device(self) -> torch.device:
        """Device of the layer's weight."""
        stored = self.stored
        return stored.device if stored is not None else torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point dtype of the layer's weight; float32 for integer storage."""
        stored = self.stored
        return stored.dtype if stored is not None and stored.dtype.is_floating_point else torch.float32


class TransposedView(LayerView):
    kind = "linear"

    @property
    def _is_plain(self) -> bool:
        return type(self.layer).__name__ == "Conv1D"

    def product(self) -> tuple[torch.Tensor, torch.Tensor | None] | None:
        found = super().product()
        return None if found is None else (found[0].T, found[1])

    def weight(self) -> torch.Tensor:
        return super().weight().T

    def write(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().write(weight.T, bias)


class ConvView(LayerView):
    kind = "conv"
    layer: Any

    @property
    def dims(self) -> int:
        """1, 2 or 3."""
        return len(self.layer.kernel_size)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return (self.out_features, self.in_features // self.layer.groups * math.prod(self.layer.kernel_size))

    def weight(self) -> torch.Tensor:
        return super().weight().flatten(1)

    def write(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().write(self.unflatten(weight), bias)

    def unflatten(self, weight: torch.Tensor) -> torch.Tensor:
        """`[rows, in / groups * kernel]` to `[rows, in / groups, *kernel]`; what has that form stays as it is."""
        if weight.dim() > 2:
            return weight
        return weight.reshape(weight.shape[0], self.in_features // self.layer.groups, *self.layer.kernel_size)

    def apply(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        conv, padding = self.layer, self.layer.padding
        if conv.padding_mode != "zeros":
            x, padding = F.pad(x, conv._reversed_padding_repeated_twice, mode=conv.padding_mode), 0
        convolve = _CONVOLUTIONS[self.dims]
        return convolve(x, self.unflatten(weight), bias, conv.stride, padding, conv.dilation, conv.groups)

    def project(self, x: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        if (groups := self.layer.groups) > 1:
            down = self.unflatten(down).repeat(groups, 1, *[1] * self.dims)  # each group of channels gets its own r outputs
        return self.apply(x, down)

    def expand(self, z: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        kernel = up if up.dim() > 2 else up.reshape(*up.shape, *[1] * self.dims)
        return _CONVOLUTIONS[self.dims](z, kernel, groups=self.layer.groups)

    def per_feature(self, vector: torch.Tensor, activation: torch.Tensor) -> torch.Tensor:
        return vector.reshape(-1, *[1] * self.dims)

    def scale_inputs(self, weight: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
        groups, kernel = self.layer.groups, math.prod(self.layer.kernel_size)
        scale = vector.reshape(groups, 1, -1, 1).expand(groups, self.out_features // groups, -1, kernel)
        return weight * scale.reshape(weight.shape)


class EmbeddingView(LayerView):
    kind = "embedding"
    layer: Any

    def weight(self) -> torch.Tensor:
        return super().weight().T

    def write(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().write(weight.T, bias)

    def apply(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return self.scaled(F.embedding(x, weight.T))

    def scaled(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows of the table as the layer returns them: some models scale them."""
        scale = getattr(self.layer, "embed_scale", None)
        return rows if scale is None else rows * (scale.to(rows.dtype) if isinstance(scale, torch.Tensor) else scale)

    def _write_bias(self, bias: torch.Tensor | None) -> None:
        if bias is not None:
            raise TargetError("an embedding has no bias to write")


class NormView(LayerView):
    kind = "norm"

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return (self.out_features,)

    def apply(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        layer: Any = self.layer
        if type(layer) is nn.LayerNorm and self.bare:
            return torch.layer_norm(x, layer.normalized_shape, weight, bias, layer.eps)
        if type(layer) is nn.RMSNorm and self.bare:
            return torch.rms_norm(x, layer.normalized_shape, weight, layer.eps)
        return self.holding(weight=weight)(x) if bias is None else self.holding(weight=weight, bias=bias)(x)

    def per_feature(self, vector: torch.Tensor, activation: torch.Tensor) -> torch.Tensor:
        if isinstance(self.layer, nn.GroupNorm | nn.modules.batchnorm._NormBase):  # channels come second
            return vector.reshape(-1, *[1] * (activation.dim() - 2))
        return vector


class ParameterView(LayerView):
    """A bare parameter of a module, `[in, out]`-like matrices possibly stacked along leading dimensions.

    The tensor is shown as it is; `apply` runs the module with another tensor in its place."""

    kind = "parameter"

    def __init__(self, owner: nn.Module, name: str):
        tensor = owner.get_parameter(name)
        super().__init__(owner, tensor.shape[-1], tensor.shape[-2] if tensor.dim() > 1 else tensor.shape[-1])
        self.owner, self.name, self.path = owner, name, name

    def enter(self, layer: nn.Module) -> None:
        """Be the view of `layer`, which is the owner itself or a wrapper around it."""
        path = next(p for p, m in layer.named_modules() if m is self.owner)
        self.layer, self.path = layer, f"{path}.{self.name}" if path else self.name

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return tuple(self.owner.get_parameter(self.name).shape)

    def weight(self) -> torch.Tensor:
        return self.owner._parameters[self.name]  # type: ignore[return-value]

    def bias(self) -> None:
        return None

    def write(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        old = self.weight()
        self.owner._parameters[self.name] = nn.Parameter(weight.to(old.device, old.dtype), requires_grad=False)

    def prepare(self) -> None:
        pass

    def keep(self) -> dict[str, Any]:
        return {self.name: self.weight()}

    def restore(self, kept: dict[str, Any]) -> None:
        self.owner._parameters.update(kept)

    def call(self, weight: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The module's output with `weight` in place of the parameter."""
        return torch.func.functional_call(self.layer, {self.path: weight.to(self.weight().dtype)}, args, kwargs)

    @property
    def stored(self) -> torch.Tensor | None:
        return self.weight()


def _call_holding(layer: nn.Module, parameters: dict[str, torch.Tensor], *args: Any, **kwargs: Any) -> Any:
    return torch.func.functional_call(layer, parameters, args, kwargs)


class ModuleView(LayerView):
    kind = "module"

    def __init__(self, layer: nn.Module):
        super().__init__(layer, 0, 0)

    def weight(self) -> torch.Tensor:
        raise TargetError(f"a {type(self.layer).__name__} has no single weight")

    def prepare(self) -> None:
        pass

    def keep(self) -> dict[str, Any]:
        return {}

    def restore(self, kept: dict[str, Any]) -> None:
        pass


def is_norm(module: nn.Module) -> bool:
    """A normalisation layer: torch's own, or a class named so that holds a weight of one dimension."""
    if isinstance(module, nn.LayerNorm | nn.GroupNorm | nn.RMSNorm | nn.modules.batchnorm._NormBase):
        return module._parameters.get("weight") is not None
    weight = module._parameters.get("weight")
    return "norm" in type(module).__name__.lower() and weight is not None and weight.dim() == 1


def view_of(layer: nn.Module, parameter: str | None = None) -> LayerView:
    """The view of a layer, or of one bare parameter of a module.

    Raises TargetError for an embedding that computes something else than a (scaled) look-up, such as learned positions
    with an offset: an adapter on it would look up other rows than the layer does.
    """
    if parameter is not None:
        return ParameterView(layer, parameter)
    if isinstance(layer, nn.Linear):
        return LayerView(layer, layer.in_features, layer.out_features)
    if isinstance(layer, nn.Embedding):
        own = type(layer).forward
        if own is not nn.Embedding.forward and not hasattr(layer, "embed_scale"):
            raise TargetError(
                f"{type(layer).__name__} is an embedding with a forward of its own; adapting it is not supported"
            )
        return EmbeddingView(layer, layer.num_embeddings, layer.embedding_dim)
    if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return ConvView(layer, layer.in_channels, layer.out_channels)
    if type(layer).__name__ == "Conv1D" and hasattr(layer, "nf"):
        n_in, n_out = layer.weight.shape  # type: ignore[misc]
        return TransposedView(layer, n_in, n_out)
    if is_norm(layer):
        n = int(layer._parameters["weight"].shape[0])  # type: ignore[union-attr]
        return NormView(layer, n, n)
    return ModuleView(layer)
