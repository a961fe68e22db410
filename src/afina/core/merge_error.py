"""What a merge into stored weights costs (T17): measured, shown, and refused where it is too much.

A merged weight that is stored in 8 or 4 bits is rounded to the steps of its storage. An adapter changes a weight by little,
often by less than half a step, and then most of it is rounded away while the outputs hardly move: an error of 1 % beside
the weights can be all that was learned. So two figures are given, of the whole model's outputs where there are batches:

    error   |merged - unmerged| / |unmerged|         of the outputs
    lost    |merged - unmerged| / |unmerged - base|  of what the adapter does: 0 is nothing, 1 as much as all of it

and of each layer without running anything, for random (white) inputs, for which the expected norm of `W x` is the Frobenius
norm of `W`. There, with D what the adapter adds to the weight and R what rounding adds,

    error   |R| / |W + D|
    lost    -<R, D> / <D, D>   the share of D that is gone: 1 where every value falls back to what it was

since rounding that points anywhere (int8) does little harm in the few directions that were learned, and rounding against D
(4 bits, whose steps are wider than what is learned) undoes it. `lost` is judged against `max_error`: on the outputs of the
model where they were measured, else on all layers together.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from afina.core.codecs import codec_of
from afina.core.injection import AdapterSet
from afina.core.layers import view_of
from afina.errors import ConfigError, MergeError

__all__ = [
    "MAX_ERROR",
    "LayerError",
    "MergeReport",
    "OutputError",
    "Outputs",
    "compared",
    "difference",
    "merge_error",
    "outputs_of",
    "rounding",
]

MAX_ERROR = 0.1  # of what the adapter does
_POSITIONS = 256  # outputs of a batch that are kept to be compared, evenly spaced

Outputs = Callable[[Any, Mapping[str, torch.Tensor]], torch.Tensor]


@dataclass(frozen=True)
class LayerError:
    """What rounding does to one layer, for white inputs."""

    path: str
    storage: str  # name of the codec
    rounded: float  # Frobenius norm of what rounding adds to the merged weight
    change: float  # of what the adapter adds to the weight
    weight: float  # of the merged weight
    undone: float  # minus the inner product of what rounding and what the adapter add

    @property
    def error(self) -> float:
        """Of the outputs, relative."""
        return _ratio(self.rounded, self.weight)

    @property
    def lost(self) -> float:
        """Share of what the adapter adds that is gone."""
        return abs(_ratio(self.undone, self.change**2))


@dataclass(frozen=True)
class OutputError:
    """Outputs of one model beside those of another."""

    error: float  # |one - other| / |other|
    lost: float | None  # |one - other| / |other - base|; None where there is no base to compare with
    agreement: float  # share of positions with the same largest output
    positions: int

    def __str__(self) -> str:
        lost = "" if self.lost is None else f", {_share(self.lost)} of what the adapter does"
        return f"error {self.error:.2%}{lost}; the same first choice at {self.agreement:.1%} of {self.positions} positions"


@dataclass
class MergeReport:
    """What merging the adapters `names` into the stored weights does. `print(report)` shows it."""

    names: tuple[str, ...]
    layers: list[LayerError] = field(default_factory=list)  # those stored in a form that rounds; none for plain weights
    outputs: OutputError | None = None  # of the whole model, where batches were given

    @property
    def lost(self) -> float:
        """The figure that is judged: of the model's outputs where they were measured, else of all layers together."""
        if self.outputs is not None and self.outputs.lost is not None:
            return self.outputs.lost
        return abs(_ratio(sum(layer.undone for layer in self.layers), sum(layer.change**2 for layer in self.layers)))

    @property
    def error(self) -> float:
        """Relative error of outputs: of the model where measured, else of all layers together."""
        if self.outputs is not None:
            return self.outputs.error
        return _ratio(_norm(layer.rounded for layer in self.layers), _norm(layer.weight for layer in self.layers))

    def check(self, max_error: float = MAX_ERROR) -> None:
        """Raise MergeError, with the figures and what to do instead, where more than `max_error` is lost."""
        if not self.layers or self.lost <= max_error:
            return
        raise MergeError(
            f"merging {' and '.join(map(repr, self.names))} into {self.storages} weights would round away too much: what is "
            f"lost is {self.lost:.0%} of what the adapter does, max_error allows {max_error:.0%} (T17).\n{self}\n"
            'Merge onto 16-bit weights instead: merge_and_unload(base="dequantised"), which answers as the adapter was '
            "trained, or base=FOLDER of the checkpoint in 16 bits; or keep the adapter beside the base; or accept the loss "
            f"with max_error={math.ceil(self.lost * 100) / 100 if math.isfinite(self.lost) else math.inf}"
        )

    @property
    def storages(self) -> str:
        """Names of the storages that round."""
        return " and ".join(dict.fromkeys(layer.storage for layer in self.layers))

    def to_dict(self) -> dict[str, Any]:
        """The figures as JSON; `worst` are the layers that lose most."""
        said: dict[str, Any] = {"adapters": list(self.names), "storages": self.storages, "error": self.error}
        said |= {"lost": self.lost, "layers": len(self.layers)}
        said["worst"] = {layer.path: layer.lost for layer in self._worst()}
        if self.outputs is not None:
            said["outputs"] = vars(self.outputs)
        return said

    def _worst(self) -> list[LayerError]:
        return sorted(self.layers, key=lambda layer: -layer.lost)[:3]

    def __str__(self) -> str:
        if not self.layers:
            return "no weight is stored in a form that rounds: merging loses nothing but the last bits"
        lines = []
        if self.outputs is not None:
            lines.append(f"outputs of the model: {self.outputs}")
        without = MergeReport(self.names, self.layers)
        lines.append(
            f"{len(self.layers)} layers in {self.storages}, for random inputs: error {without.error:.2%}, "
            f"{_share(without.lost)} of what the adapter does"
        )
        lines += [f"  {layer.path}: error {layer.error:.2%}, {_share(layer.lost)}" for layer in self._worst()]
        return "\n".join(lines)


def rounding(adapters: AdapterSet, names: Sequence[str] | None = None) -> MergeReport:
    """What merging would round away, layer by layer; nothing is changed, and one layer at a time is in memory as floats."""
    names = tuple(adapters.active if names is None else names)
    adapters.check_names(names)
    report = MergeReport(names)
    with adapters.unmerged(), torch.no_grad():
        for key, layer in adapters.layers.items():
            mine: list[Any] = [layer.adapters[name] for name in names if name in layer.adapters]
            codec = codec_of(layer.base_layer)
            if not mine or codec.exact or layer.view.kind in ("parameter", "module"):
                continue
            if any(not adapter.mergeable or adapter.merge_module() is not None for adapter in mine):
                continue
            before, bias = layer.view.weight().float(), layer.view.bias()
            after = before
            for adapter in mine:
                after, bias = adapter.merge_into(after, bias)
            stored = _written(layer.base_layer, after)
            rounded, change = stored - after, after - before
            lost, added, whole = (float(t.norm()) for t in (rounded, change, after))
            undone = -float((rounded * change).sum())
            report.layers.append(LayerError(key, codec.name, lost, added, whole, undone=undone))
    return report


def merge_error(
    model: Any,
    batches: Iterable[Mapping[str, torch.Tensor]] = (),
    *,
    names: Sequence[str] | None = None,
    outputs: Outputs | None = None,
) -> MergeReport:
    """What merging the adapters `names` (default: the active ones) of an adapted model would cost.

    `batches` are inputs of the model, of which the outputs without the adapter, with it and merged are compared: logits
    where there are, else hidden states, or what `outputs(model, batch)` returns (`task.logits`, for example). Positions that
    an `attention_mask` of the same shape hides do not count. Without batches the layers alone are measured. The model is
    left as it was. Raises MergeError where an adapter cannot be merged.
    """
    adapters = getattr(model, "adapters", None) or AdapterSet.of(model)
    if not isinstance(adapters, AdapterSet):
        raise ConfigError(f"this {type(model).__name__} has no adapters, so there is nothing to merge")
    report, batches = rounding(adapters, names), list(batches)
    if batches:
        with adapters.unmerged(), _acting(adapters, report.names):
            with adapters.disabled():
                base = outputs_of(model, batches, outputs)
            apart = outputs_of(model, batches, outputs)
            adapters.merge(report.names)
            try:
                report.outputs = difference(outputs_of(model, batches, outputs), apart, base)
            finally:
                adapters.unmerge()
    return report


@contextmanager
def _acting(adapters: AdapterSet, names: Sequence[str]) -> Iterator[None]:
    """These adapters act within this; which of them train stays as it is."""
    active = adapters.active
    adapters.runtime.set(active=tuple(names))
    try:
        yield
    finally:
        adapters.runtime.set(active=active)


def compared(
    one: Any, other: Any, batches: Iterable[Mapping[str, torch.Tensor]], *, outputs: Outputs | None = None
) -> OutputError:
    """Outputs of one model beside those of another, relative to the other's: a merge on the stored weights beside one on
    the pristine ones, for example (T18). Both are read in eval mode and left as they were."""
    batches = list(batches)
    return difference(outputs_of(one, batches, outputs), outputs_of(other, batches, outputs))


def _written(layer: nn.Module, weight: torch.Tensor) -> torch.Tensor:
    """The canonical weight as it would be read back if it were stored in `layer`, which is left as it is."""
    other = copy.copy(layer)
    other.__dict__["_parameters"] = dict(layer._parameters)
    view = view_of(other)
    view.write(weight, view.bias())
    return view.weight().float()


@torch.no_grad()
def outputs_of(
    model: Any,
    batches: Sequence[Mapping[str, torch.Tensor]],
    outputs: Outputs | None = None,
    *,
    names: Sequence[str] | None = None,
) -> list[torch.Tensor]:
    """A few hundred outputs of each batch, `[positions, values]`, float32, on the CPU, in eval mode; see `merge_error`.
    `names`: adapters to act instead of the active ones."""
    if names is not None:
        with _acting(model.adapters, names):
            return outputs_of(model, batches, outputs)
    device, kept, training = next(model.parameters()).device, [], model.training
    model.eval()
    for batch in batches:
        moved = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
        said = (outputs or _outputs)(model, moved)
        mask = moved.get("attention_mask")
        seen = said[mask.bool()] if mask is not None and mask.shape == said.shape[:-1] else said.flatten(0, -2)
        kept.append(seen[:: -(-len(seen) // _POSITIONS) or 1].float().cpu())
    model.train(training)
    return kept


def _outputs(model: Any, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    said = model(**batch)
    for name in ("logits", "last_hidden_state"):
        if getattr(said, name, None) is not None:
            return getattr(said, name)  # type: ignore[no-any-return]
    if isinstance(said, torch.Tensor):
        return said
    raise ConfigError(f"{type(model).__name__} returns neither logits nor hidden states; say what to compare with outputs=")


def difference(one: list[torch.Tensor], other: list[torch.Tensor], base: list[torch.Tensor] | None = None) -> OutputError:
    """What `outputs_of` one model gave beside those of another, batch by batch."""
    apart = _norm(float((a - b).norm()) for a, b in zip(one, other, strict=True))
    done = None if base is None else _norm(float((a - b).norm()) for a, b in zip(other, base, strict=True))
    same = sum(int((a.argmax(-1) == b.argmax(-1)).sum()) for a, b in zip(one, other, strict=True))
    positions = sum(len(a) for a in one)
    error = _ratio(apart, _norm(float(b.norm()) for b in other))
    return OutputError(error, None if done is None else _ratio(apart, done), same / max(1, positions), positions)


def _norm(values: Iterable[float]) -> float:
    return math.sqrt(sum(value * value for value in values))


def _ratio(part: float, whole: float) -> float:
    return 0.0 if part == 0 else part / whole if whole else math.inf


def _share(lost: float) -> str:
    return f"{lost:.0%}" if lost < 10 else "more than 1000%"
