"""One pass of a model for the steps of several runs: `JoinedModel`.

Rows do not know of each other, so the batches of several runs go through the frozen base as one, each row with the
adapter of its run (`adapters.set_rows`). The adapters are the very modules of the runs' own models: gradients arrive where
the runs' optimizers look for them. What a task makes of the model's output is the task's business: it is asked twice, first
with a stand-in that notes what the model would be called with, then with one that gives the run's own rows of the joined
output. A loss that is computed inside the output head (`tasks/head_loss.py`) gets the run's own hidden states there.

Batches of different widths are padded to the widest; a group is chosen so that this stays small.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from afina.core.runtime import Rows
from afina.functions import get_peft_model
from afina.memory.step import lean_step
from afina.tasks.output_head import Behind, base_of, behind_head

__all__ = ["Asked", "JoinedModel", "width_of"]

Ask = Callable[[Any, Any], torch.Tensor]


@dataclass
class Asked:
    """The loss that one run asks for: what the task does with model and batch."""

    model: Any
    ask: Ask
    batch: dict[str, torch.Tensor]


class _Called(Exception):  # noqa: N818 (it is no error)
    """What the model would be called with."""

    def __init__(self, inputs: dict[str, Any], *, inside_head: bool):
        super().__init__()
        self.inputs, self.inside_head = inputs, inside_head


class _StandIn:
    """The model of a run, but for what calling it does."""

    def __init__(self, model: Any, call: Callable[[dict[str, Any]], Any]):
        self._model, self._call = model, call

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if args:
            raise NotImplementedError("the task calls the model with inputs that have no names")
        return self._call(kwargs)


class JoinedModel:
    """The base of `models` once more, with the adapters of all of them; `base` is a bare tree around the same weights.

    `pad` is the padding token; `checkpointing` and `roomy` are as in `lean_step`.
    """

    def __init__(
        self, base: nn.Module, models: Mapping[str, Any], device: torch.device, pad: int, *, checkpointing: bool = False,
        roomy: bool = False,
    ):  # fmt: skip
        self.models, self.pad = dict(models), pad
        self.model: Any = None
        for name, one in self.models.items():
            config = one.peft_config["default"]
            if self.model is None:
                self.model = get_peft_model(base, config, adapter_name=name)
            else:
                self.model.add_adapter(name, config)
        for name, one in self.models.items():
            for key, layer in self.model.adapters.layers.items():
                own = one.adapters.layers.get(key)
                if own is not None and "default" in own.adapters:
                    layer.adapters[name] = own.adapters["default"]
        self.model.adapters.runtime.choose(None)  # what was chosen has been replaced
        lean_step(self.model, device, gradient_checkpointing=checkpointing, roomy=roomy)
        self.model.to(device)
        self._rows: dict[tuple[str, ...], Rows] = {}

    def losses(self, asked: Mapping[str, Asked]) -> list[torch.Tensor]:
        """The loss of each run, in one pass.

        Raises NotImplementedError, saying why, for a task that does more than call the model once.
        """
        calls = [_called(one) for one in asked.values()]
        inputs, counts, widths = _together([call.inputs for call in calls], self.pad, self._taken)
        self._set(asked, counts)
        try:
            if calls[0].inside_head:
                parts = self._hidden(inputs, counts, widths)
                return [_in_head(one, part) for one, part in zip(asked.values(), parts, strict=True)]
            outputs = _apart(self.model(**inputs), counts, widths)
            return [one.ask(_StandIn(one.model, _once(made)), one.batch)
                    for one, made in zip(asked.values(), outputs, strict=True)]  # fmt: skip
        finally:
            self.model.adapters.set_rows(None)

    def _set(self, asked: Mapping[str, Asked], counts: Sequence[int]) -> None:
        names = tuple(name for name, count in zip(asked, counts, strict=True) for _ in range(count))
        if names not in self._rows:
            self.model.adapters.set_rows(names)
            self._rows[names] = self.model.adapters.runtime.state.rows
        else:
            self.model.adapters.runtime.set(rows=self._rows[names])

    @property
    def _taken(self) -> set[int]:
        """Sizes that a width may not have, so that tokens are told from classes and from values."""
        config = self.model.get_base_model().config
        return {getattr(config, "num_labels", 0), getattr(config, "hidden_size", 0)}

    def _hidden(self, inputs: dict[str, Any], counts: Sequence[int], widths: _Widths) -> list[torch.Tensor]:
        """What enters the output head, of each run."""
        head = self.model.get_base_model().get_output_embeddings()
        found: list[torch.Tensor] = []

        def note(hidden: torch.Tensor) -> torch.Tensor:
            found.append(hidden)
            return hidden.new_zeros(1, 1, 1)

        with _replaced(head, note):
            self.model(**inputs)
        return [widths.cut(part, i) for i, part in enumerate(found[0].split(list(counts)))]


@contextmanager
def _replaced(module: Any, forward: Callable[..., Any]) -> Iterator[None]:
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


def _called(asked: Asked) -> _Called:
    """What a task calls the model with."""
    head = _head(asked.model)
    before = None if head is None else head.__dict__.get("forward")

    def call(inputs: dict[str, Any]) -> Any:
        raise _Called(inputs, inside_head=head is not None and head.__dict__.get("forward") is not before)

    try:
        asked.ask(_StandIn(asked.model, call), asked.batch)
    except _Called as called:
        return called
    raise NotImplementedError("the task computes its loss without calling the model as a whole")


def _head(model: Any) -> Any:
    base = model.get_base_model()
    return base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None


def _once(made: Any) -> Callable[[dict[str, Any]], Any]:
    waiting = [made]

    def call(inputs: dict[str, Any]) -> Any:
        if not waiting:
            raise NotImplementedError("the task calls the model more than once")
        return waiting.pop()

    return call


def _in_head(asked: Asked, hidden: torch.Tensor) -> torch.Tensor:
    """A loss that is computed where the head is called."""
    head, behind = _head(asked.model), behind_head(base_of(asked.model))
    assert isinstance(behind, Behind)

    def call(inputs: dict[str, Any]) -> Any:
        return _Output(logits=behind(head(hidden)))

    return asked.ask(_StandIn(asked.model, call), asked.batch)


class _Output(dict[str, Any]):
    """What a model gives, by name."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


@dataclass
class _Widths:
    """Tokens of a row in the joined batch, and in the batch of each run."""

    joined: int
    own: list[int]

    def cut(self, tensor: torch.Tensor, i: int) -> torch.Tensor:
        """The tokens that run `i` has."""
        if tensor.dim() > 1 and tensor.shape[1] == self.joined != self.own[i]:
            return tensor[:, : self.own[i]]
        return tensor


def width_of(inputs: Mapping[str, torch.Tensor]) -> int:
    """Tokens of a row of the batch: of all that is read."""
    return sum(inputs[key].shape[1] for key in ("input_ids", "decoder_input_ids") if key in inputs)


def _together(calls: Sequence[dict[str, Any]], pad: int, taken: set[int]) -> tuple[dict[str, Any], list[int], _Widths]:
    """One batch of several, the rows of each, and how wide each was."""
    if any(call.keys() != calls[0].keys() for call in calls):
        raise NotImplementedError("the runs call the model with different inputs")
    if "input_ids" not in calls[0]:
        raise NotImplementedError("the runs call the model with something else than tokens")
    counts = [len(call["input_ids"]) for call in calls]
    reference = "decoder_input_ids" if "decoder_input_ids" in calls[0] else "input_ids"
    made: dict[str, Any] = {}
    joined = 0
    for key, value in calls[0].items():
        values = [call[key] for call in calls]
        if not isinstance(value, torch.Tensor) or not value.dim():
            if any(other is not value and other != value for other in values):
                raise NotImplementedError(f"the runs call the model with different {key}")
            made[key] = value
            continue
        if value.dim() > 1:
            own = [v.shape[1] for v in values]
            widest = max(own)
            while len(set(own)) > 1 and widest in taken:
                widest += 1
            fill = pad if key in ("input_ids", "decoder_input_ids") else 0
            values = [v if v.shape[1] == widest else _widened(v, widest, fill) for v in values]
            joined = widest if key == reference else joined
        made[key] = torch.cat(values)
    return made, counts, _Widths(joined, [call[reference].shape[1] for call in calls])


def _widened(tensor: torch.Tensor, width: int, fill: int) -> torch.Tensor:
    made = tensor.new_full((tensor.shape[0], width, *tensor.shape[2:]), fill)
    made[:, : tensor.shape[1]] = tensor
    return made


def _apart(output: Any, counts: Sequence[int], widths: _Widths) -> list[_Output]:
    """The output of each run: what has a row for each row of the batch."""
    made = [_Output() for _ in counts]
    for key, value in output.items():
        if not isinstance(value, torch.Tensor) or not value.dim() or len(value) != sum(counts):
            continue
        for i, part in enumerate(value.split(list(counts))):
            made[i][key] = widths.cut(part, i)
    return made
