"""The output head of a model as a function that may be another for one pass, and what the model does to logits behind it.

Some models scale, shift or cap their logits behind the head (Cohere, Granite, BART, Gemma 2). What they do is found by a
trial with known logits, so that it can be done to a part of them.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import nn

from afina.tasks.batches import has_values

__all__ = ["Behind", "Head", "base_of", "behind_head", "in_place_of", "uncached"]

_STILL_STRAIGHT = 1e-12  # a cap changes so small a value by less than rounding


@dataclass(frozen=True)
class Head:
    """The output head as a function of hidden states `[targets, width]`, and the size of its vocabulary."""

    call: Callable[[torch.Tensor], torch.Tensor]
    size: int
    is_product: bool = False  # a frozen matrix and nothing else, so that backward does not ask for its output


def _head(module: Any, forward: Callable[[torch.Tensor], torch.Tensor]) -> Head:
    """The head whose own forward is given. Under autocast a plain matrix is cast once, and not for every chunk."""
    if type(module) is not nn.Linear or type(module.weight) is not nn.Parameter or module.weight.requires_grad:
        return Head(forward, module.out_features)
    weight: torch.Tensor = module.weight
    bias: torch.Tensor | None = module.bias
    device = "cpu" if weight.is_meta else weight.device.type
    if torch.is_autocast_enabled(device) and weight.dtype == torch.float32:
        weight = weight.to(torch.get_autocast_dtype(device))
        bias = None if bias is None else bias.to(weight.dtype)
    return Head(lambda hidden: F.linear(hidden, weight, bias), module.out_features, is_product=True)


@dataclass(frozen=True)
class Behind:
    """What a model does to its logits behind the head: cap * tanh(scale * logits / cap) + shift, each if it is there."""

    scale: float = 1.0
    cap: float | None = None
    shift: torch.Tensor | None = None  # [vocabulary]

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """The model's logits, in float32 at least, from those of the head `[..., vocabulary]`."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.cap is not None:
            logits = torch.tanh(logits / self.cap) * self.cap
        return logits if self.shift is None else logits + self.shift.to(logits)

    def carried(self, value: torch.Tensor) -> torch.Tensor:
        """What comes out as the `n` values behind the head, or as `value * _STILL_STRAIGHT` where there is a cap;
        `[1, n, 1]`."""
        return (value / self.scale * (1.0 if self.cap is None else _STILL_STRAIGHT)).reshape(1, -1, 1)

    def arrived(self, logits: torch.Tensor) -> torch.Tensor:
        """The values `[n]` that `carried` sent."""
        value = logits[0, :, 0]
        if self.shift is not None:
            value = value - self.shift[0].to(value)
        return value if self.cap is None else value / _STILL_STRAIGHT


def base_of(model: Any) -> Any:
    """The model of transformers below adapters and engines."""
    while (inner := getattr(model, "module", None)) is not None:
        model = inner
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def uncached(base: Any) -> dict[str, bool]:
    """Keys and values are not gathered for tokens that nobody is going to write."""
    return {"use_cache": False} if "use_cache" in inspect.signature(base.forward).parameters else {}


@contextmanager
def in_place_of(head: Any, function: Callable[[Head, torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Inside the block calling the head calls `function`, with the head's hooks around it."""
    forward, own = head.forward, head.__dict__.get("forward")
    head.forward = lambda hidden: function(_head(head, forward), hidden)
    try:
        yield
    finally:
        del head.forward
        if own is not None:
            head.forward = own


_FOUND: WeakKeyDictionary[nn.Module, Behind | str] = WeakKeyDictionary()


def behind_head(base: Any) -> Behind | str:
    """What the model does behind its head, or why it cannot be done to chunks; looked for once a model."""
    found = _FOUND.get(base)
    shift = found.shift if isinstance(found, Behind) else None
    if shift is not None and len(shift) != base.get_output_embeddings().out_features:
        found = None  # the vocabulary has changed
    if found is None:
        found = _FOUND[base] = _looked_up(base)
    return found


@torch.no_grad()
def _looked_up(base: Any) -> Behind | str:
    """Sends known values through the model in place of logits, and finds the formula that made of them what came out."""
    head = base.get_output_embeddings()
    size = getattr(head, "out_features", None)
    if not isinstance(head, nn.Module) or not isinstance(size, int):
        return f"{type(base).__name__} has no output head of its own"
    if not has_values(next(base.parameters())):
        return Behind()
    device = next(base.parameters()).device
    line = torch.linspace(-3.0, 3.0, size, device=device)
    sent = torch.stack([torch.zeros_like(line), torch.full_like(line, 1e6), line, line.flip(0) * 5])
    shapes: list[tuple[int, ...]] = []

    def trial(_: Head, hidden: torch.Tensor) -> torch.Tensor:
        shapes.append(tuple(hidden.shape))
        return sent.unsqueeze(0)

    tokens = torch.zeros(1, len(sent), dtype=torch.long, device=device)
    inputs: dict[str, Any] = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    if base.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = tokens
    if base.main_input_name != "input_ids":  # of an encoder that reads no tokens: what it puts out
        encoder = getattr(base.config, "encoder", base.config)
        states = torch.zeros(1, len(sent), encoder.hidden_size, device=device, dtype=base.dtype)
        inputs = {"encoder_outputs": (states,), "decoder_input_ids": tokens}
    training = [module for module in base.modules() if module.training]
    base.eval()
    try:
        with in_place_of(head, trial):
            got = base(**inputs, **uncached(base)).logits
    except Exception as error:
        return f"{type(base).__name__} could not be tried with known logits ({str(error).splitlines()[0][:120]})"
    finally:
        for module in training:
            module.training = True
    if len(shapes) != 1 or len(shapes[0]) != 3 or shapes[0][1] < len(sent) or got.shape != (1, *sent.shape):
        return f"{type(base).__name__} calls its output head in a way of its own"
    found = _fitted(sent, got[0])
    return found or f"{type(base).__name__} does something to its logits behind the head that is not known here"


def _fitted(sent: torch.Tensor, got: torch.Tensor) -> Behind | None:
    """The formula behind `got`, from values sent for 0, for the infinite and for two lines; None where there is none."""
    _, infinite, line, _ = got.double() - got[0].double()
    shift = got[0] if bool(got[0].any()) else None
    end = int(sent.shape[1]) - 1
    cap, at = float(infinite[0]), float(sent[2, end])
    if abs(cap) >= 1e4:  # values grow without an end
        found = Behind(float(line[end]) / at, None, shift)
    elif cap > abs(float(line[end])):
        found = Behind(cap * math.atanh(float(line[end]) / cap) / at, cap, shift)
    else:
        return None
    found = Behind(_rounded(found.scale), None if found.cap is None else _rounded(found.cap), shift)
    return found if torch.allclose(found(sent).double(), got.double(), rtol=2e-6, atol=2e-6) else None


def _rounded(value: float) -> float:
    """The number that was meant, or the one that was divided by, where float32 has left its rounding on it."""
    for near in (float(f"{value:.6g}"), 1.0 / float(f"{1.0 / value:.6g}")):
        if math.isclose(near, value, rel_tol=2e-7):
            return near
    return value
