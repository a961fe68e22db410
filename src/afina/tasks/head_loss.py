"""The loss of a vocabulary, computed inside the output head, chunk by chunk: whole logits are never there.

Logits of `[targets, vocabulary]` are the largest tensors of a step, and the loss wants them twice more, as probabilities
and as gradients. Here the head's own forward is replaced for one pass of the model by a function that takes the hidden
states of the targets alone, sends a chunk of them through the head, makes of the chunk's logits first the loss and then,
in the same memory, its gradient, and goes back through the head at once. What is left of a chunk is the gradient of its
hidden states and of what is trained in the head, whatever that is; nothing is computed twice. The sum of the losses goes
on as if it were the logits, so it passes every hook that engines and devices have put around the model. Wijmans et al.
2024, https://arxiv.org/abs/2411.09009, and Liger-Kernel, https://arxiv.org/abs/2410.10989, argue the idea.

Some models scale, shift or cap their logits behind the head (Cohere, Granite, BART, Gemma 2). What they do is found by a
trial with known logits and is then done to each chunk. Where it is something else, or the head is no module of its own,
the logits are made whole, and the reason is told before the run (T35).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from afina.tasks.task import IGNORED

__all__ = [
    "Aim", "Behind", "divergences", "has_values", "loss_sum", "losses_and_hits", "supervised", "target_losses", "why_whole",
]  # fmt: skip


_VALUES = 1 << 24  # logits that are there at once; 64 MB in float32
_ON_A_GPU = 4  # times as many, which keep it busy
_STILL_STRAIGHT = 1e-12  # a cap changes so small a value by less than rounding
_HALF_LIFT = 1024.0  # keeps small gradients of float16 logits above zero


@dataclass(frozen=True)
class Aim:
    """What is foretold where: for each target its row of the batch, its place among the last `width` hidden states, and
    the token that is right, each `[targets]`."""

    rows: torch.Tensor
    places: torch.Tensor
    tokens: torch.Tensor
    width: int


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


def supervised(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Row and place of every target among labels `[rows, tokens]`; of all places where labels have no values
    (the meta device, fake tensors)."""
    targets = torch.ones(labels.shape, dtype=torch.bool) if not has_values(labels) else labels != IGNORED
    rows, places = targets.nonzero(as_tuple=True)
    return rows.to(labels.device), places.to(labels.device)


def has_values(tensor: torch.Tensor) -> bool:
    """Whether there is more of a tensor than its shape."""
    from torch._subclasses.fake_tensor import FakeTensor

    return not tensor.is_meta and not isinstance(tensor, FakeTensor)


_FOUND: WeakKeyDictionary[nn.Module, Behind | str] = WeakKeyDictionary()


def why_whole(model: Any) -> str | None:
    """Why the logits of this model have to be made whole; None where they do not."""
    found = _behind(_base(model))
    return found if isinstance(found, str) else None


def loss_sum(model: Any, inputs: Mapping[str, torch.Tensor], aim: Aim, *, label_smoothing: float = 0.0) -> torch.Tensor:
    """Cross-entropy (natural logarithm) of the targets, summed, in float32; `inputs` are what the model is called with."""
    base = _base(model)
    behind = _behind(base)
    if isinstance(behind, str):
        logits = model(**inputs, **_uncached(base)).logits[:, -aim.width :][aim.rows, aim.places]
        return F.cross_entropy(logits.float(), aim.tokens, reduction="sum", label_smoothing=label_smoothing)

    def inside(head: _Head, hidden: torch.Tensor) -> torch.Tensor:
        chosen = hidden[:, -aim.width :][aim.rows, aim.places]
        with saved_tensors_hooks(torch.Tensor.detach, torch.Tensor.detach):  # nothing of a chunk waits for backward
            value, known = _summed(head, behind, chosen, aim.tokens, label_smoothing)
        return behind.carried(_Known.apply(value, *known) if known else value)  # type: ignore[no-untyped-call]

    with _in_place_of(base.get_output_embeddings(), inside):
        return behind.arrived(model(**inputs, **_uncached(base)).logits)[0]


def target_losses(
    model: Any, inputs: Mapping[str, torch.Tensor], aim: Aim, *, temperature: float = 1.0
) -> torch.Tensor:  # fmt: skip
    """The cross-entropy of each target `[targets]`, in float32; logits are divided by `temperature`.

    Each loss may get a gradient of its own, which is not known before backward. So where the head is a frozen matrix the
    gradient of each hidden state is kept for a gradient of one; what is trained in the head is computed again, chunk by
    chunk.
    """
    base = _base(model)
    behind = _behind(base)
    if isinstance(behind, str) or behind.shift is not None:
        logits = model(**inputs, **_uncached(base)).logits[:, -aim.width :][aim.rows, aim.places]
        return F.cross_entropy(logits.float() / temperature, aim.tokens, reduction="none")

    def scaled(raw: torch.Tensor) -> torch.Tensor:
        made = behind(raw)
        return made if temperature == 1.0 else made / temperature

    def inside(head: _Head, hidden: torch.Tensor) -> torch.Tensor:
        return behind.carried(_each(head, scaled, hidden[:, -aim.width :][aim.rows, aim.places], aim.tokens))

    with _in_place_of(base.get_output_embeddings(), inside):
        return behind.arrived(model(**inputs, **_uncached(base)).logits)


@torch.no_grad()
def divergences(
    model: Any, inputs: Mapping[str, torch.Tensor], aim: Aim, other: Callable[[], AbstractContextManager[Any]]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cross-entropies of the targets by the model and by what it is inside `other()`, and the Kullback-Leibler divergence
    of the first from the second at each of their places, over the whole vocabulary; each `[targets]`, in float64."""
    base = _base(model)
    behind = _behind(base)
    kept: list[tuple[_Head, torch.Tensor]] = []

    def inside(head: _Head, hidden: torch.Tensor) -> torch.Tensor:
        kept.append((head, hidden[:, -aim.width :][aim.rows, aim.places]))
        return hidden.new_zeros(1, 1, 1)

    for state in (nullcontext, other):
        with state():
            if isinstance(behind, str):
                logits = model(**inputs, **_uncached(base)).logits[:, -aim.width :][aim.rows, aim.places]
                kept.append((_Head(lambda logits: logits, logits.shape[-1]), logits))
            else:
                with _in_place_of(base.get_output_embeddings(), inside):
                    model(**inputs, **_uncached(base))
    formula = Behind() if isinstance(behind, str) else behind
    (head, hidden), (other_head, other_hidden) = kept
    made: list[list[torch.Tensor]] = [[torch.zeros(0, dtype=torch.float64, device=hidden.device)] for _ in range(3)]
    for (some, right), (others, _) in zip(
        _chunks(head, hidden, aim.tokens), _chunks(head, other_hidden, aim.tokens), strict=True
    ):
        own = formula(head.call(some)).log_softmax(1)
        with other():
            beside = formula(other_head.call(others)).log_softmax(1)
        place = right.unsqueeze(1)
        made[0].append(-own.gather(1, place).squeeze(1).double())
        made[1].append(-beside.gather(1, place).squeeze(1).double())
        made[2].append((own.exp() * (own - beside)).sum(1).double().clamp(min=0.0))
        del own, beside  # before the next chunk
    losses, other_losses, apart = (torch.cat(parts) for parts in made)
    return losses, other_losses, apart


@torch.no_grad()
def losses_and_hits(model: Any, inputs: Mapping[str, torch.Tensor], aim: Aim) -> tuple[torch.Tensor, torch.Tensor]:
    """Negative log likelihood `[targets]` in float64, and whether the target was the likeliest token; no gradients."""
    base = _base(model)
    behind = _behind(base)
    if isinstance(behind, str):
        logits = model(**inputs, **_uncached(base)).logits[:, -aim.width :][aim.rows, aim.places]
        return _read(_Head(lambda logits: logits, logits.shape[-1]), Behind(), logits, aim.tokens)
    read: list[tuple[torch.Tensor, torch.Tensor]] = []

    def inside(head: _Head, hidden: torch.Tensor) -> torch.Tensor:
        chosen = hidden[:, -aim.width :][aim.rows, aim.places]
        read.append(_read(head, behind, chosen, aim.tokens))
        return hidden.new_zeros(1, 1, 1)

    with _in_place_of(base.get_output_embeddings(), inside):
        model(**inputs, **_uncached(base))
    return read[0]


# --- chunks


@dataclass(frozen=True)
class _Head:
    """The output head as a function of hidden states `[targets, width]`, and the size of its vocabulary."""

    call: Callable[[torch.Tensor], torch.Tensor]
    size: int
    is_product: bool = False  # a frozen matrix and nothing else, so that backward does not ask for its output


def _head(module: Any, forward: Callable[[torch.Tensor], torch.Tensor]) -> _Head:
    """The head whose own forward is given. Under autocast a plain matrix is cast once, and not for every chunk."""
    if type(module) is not nn.Linear or type(module.weight) is not nn.Parameter or module.weight.requires_grad:
        return _Head(forward, module.out_features)
    weight: torch.Tensor = module.weight
    bias: torch.Tensor | None = module.bias
    device = "cpu" if weight.is_meta else weight.device.type
    if torch.is_autocast_enabled(device) and weight.dtype == torch.float32:
        weight = weight.to(torch.get_autocast_dtype(device))
        bias = None if bias is None else bias.to(weight.dtype)
    return _Head(lambda hidden: F.linear(hidden, weight, bias), module.out_features, is_product=True)


def _summed(
    head: _Head, behind: Behind, hidden: torch.Tensor, tokens: torch.Tensor, smoothing: float
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The loss of hidden states `[targets, width]`; what takes gradients, each followed by its gradient."""
    total = torch.zeros((), device=hidden.device)
    into_hidden, into_trained = list[torch.Tensor](), dict[torch.Tensor, torch.Tensor]()
    for some, right in _chunks(head, hidden, tokens):
        loss, some_hidden, some_trained = _one(head, behind, some, right, smoothing)
        total = total + loss.sum()
        into_hidden += some_hidden
        for leaf, gradient in some_trained.items():
            into_trained[leaf] = into_trained[leaf].add_(gradient) if leaf in into_trained else gradient
        del some_trained
    known = [(hidden, torch.cat(into_hidden))] if into_hidden else []
    return total, [tensor for pair in (*known, *into_trained.items()) for tensor in pair]


def _each(
    head: _Head, behind: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor, tokens: torch.Tensor
) -> torch.Tensor:
    """The loss of each hidden state `[targets, width]`."""
    losses, gradients = [torch.zeros(0, device=hidden.device)], list[torch.Tensor]()
    for some, right in _chunks(head, hidden, tokens):
        if head.is_product or not torch.is_grad_enabled():
            with saved_tensors_hooks(torch.Tensor.detach, torch.Tensor.detach):
                value, found, _ = _one(head, behind, some, right, 0.0)
            gradients += found
        else:
            value = checkpoint(_entropies, head, behind, some, right, use_reentrant=False)
        losses.append(value)
    value = torch.cat(losses)
    if not gradients:
        return value
    return _Known.apply(value, hidden, torch.cat(gradients))  # type: ignore[no-untyped-call, no-any-return]


def _entropies(
    head: _Head, behind: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor, tokens: torch.Tensor
) -> torch.Tensor:
    return F.cross_entropy(behind(head.call(hidden)), tokens, reduction="none")


def _one(
    head: _Head, behind: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor, tokens: torch.Tensor, smoothing: float
) -> tuple[torch.Tensor, list[torch.Tensor], dict[torch.Tensor, torch.Tensor]]:
    """The losses of a chunk, the gradient of its hidden states if they take one, those of what is trained in the head."""
    some = hidden.detach().requires_grad_(torch.is_grad_enabled() and hidden.requires_grad)
    raw = head.call(some)
    scores = behind(raw)
    used = scores.detach().clone() if scores is raw and not head.is_product else scores.detach()
    loss = _entropy(used, tokens, smoothing)
    wanted = _leaves(scores) if scores.requires_grad else []
    if not wanted:
        return loss, [], {}
    lift = _HALF_LIFT if raw.dtype == torch.float16 else 1.0
    found = torch.autograd.grad(scores, wanted, used if lift == 1.0 else used.mul_(lift))
    known = dict(zip(wanted, found if lift == 1.0 else [gradient / lift for gradient in found], strict=True))
    return loss, [known.pop(some)] if some.requires_grad else [], known


def _entropy(scores: torch.Tensor, tokens: torch.Tensor, smoothing: float) -> torch.Tensor:
    """The losses `[rows]` of scores `[rows, vocabulary]`, in whose place their gradients come to lie."""
    right = tokens.unsqueeze(1)
    aimed = scores.gather(1, right) * (1.0 - smoothing)
    if smoothing:
        aimed = aimed + scores.mean(1, keepdim=True) * smoothing
    top = scores.amax(1, keepdim=True)
    sums = scores.sub_(top).exp_().sum(1, keepdim=True)
    losses = (top - aimed + sums.log()).squeeze(1)
    scores.div_(sums).scatter_add_(1, right, torch.full_like(top, smoothing - 1.0))
    if smoothing:
        scores.sub_(smoothing / scores.shape[1])
    return losses


def _read(
    head: _Head, behind: Behind, hidden: torch.Tensor, tokens: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    losses, hits = [torch.zeros(0, dtype=torch.float64, device=hidden.device)], [tokens.new_zeros(0, dtype=torch.bool)]
    for some, right in _chunks(head, hidden, tokens):
        scores = behind(head.call(some))
        top, likeliest = scores.max(1)
        hits.append(likeliest == right)
        aimed = scores.gather(1, right.unsqueeze(1)).squeeze(1).double()
        losses.append(top.double() + scores.sub_(top.unsqueeze(1)).exp_().sum(1).double().log() - aimed)
        del scores  # before the next chunk
    return torch.cat(losses), torch.cat(hits)


def _chunks(
    head: _Head, hidden: torch.Tensor, tokens: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Hidden states and tokens of as many targets as may be looked at together, in nearly equal parts."""
    if not len(tokens):
        return
    most = _VALUES * (1 if hidden.device.type == "cpu" else _ON_A_GPU)
    count = math.ceil(len(tokens) / max(1, most // head.size))
    yield from zip(hidden.tensor_split(count), tokens.tensor_split(count), strict=True)


def _leaves(scores: torch.Tensor) -> list[torch.Tensor]:
    """What takes gradients on the way to `scores`: the leaves of its graph."""
    found, seen, waiting = list[torch.Tensor](), set[Any](), [scores.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            found.append(leaf)
        waiting += [before for before, _ in node.next_functions]
    return found


class _Known(torch.autograd.Function):
    """A value with inputs whose gradients are known already: `value, input, its gradient, input, its gradient, ...`; or
    values, and an input with a row and its gradient for each."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, *pairs: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*pairs[1::2])
        return value.clone()

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        made: list[torch.Tensor | None] = [None]
        for gradient in ctx.saved_tensors:
            each = g.to(gradient.dtype)  # in place: they are as large as what is trained
            made += [gradient.mul_(each.unsqueeze(1) if g.dim() else each), None]
        return tuple(made)


# --- the model


def _base(model: Any) -> Any:
    """The model of transformers below adapters and engines."""
    while (inner := getattr(model, "module", None)) is not None:
        model = inner
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _uncached(base: Any) -> dict[str, bool]:
    """Keys and values are not gathered for tokens that nobody is going to write."""
    return {"use_cache": False} if "use_cache" in inspect.signature(base.forward).parameters else {}


@contextmanager
def _in_place_of(head: Any, function: Callable[[_Head, torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Inside the block calling the head calls `function`, with the head's hooks around it."""
    forward, own = head.forward, head.__dict__.get("forward")
    head.forward = lambda hidden: function(_head(head, forward), hidden)
    try:
        yield
    finally:
        del head.forward
        if own is not None:
            head.forward = own


def _behind(base: Any) -> Behind | str:
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

    def trial(_: _Head, hidden: torch.Tensor) -> torch.Tensor:
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
        with _in_place_of(head, trial):
            got = base(**inputs, **_uncached(base)).logits
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
