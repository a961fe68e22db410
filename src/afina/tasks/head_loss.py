"""The loss of a vocabulary, computed inside the output head, chunk by chunk: whole logits are never there.

Logits of `[targets, vocabulary]` are the largest tensors of a step, and the loss wants them twice more, as probabilities
and as gradients. Here the head's own forward is replaced for one pass of the model by a function that takes the hidden
states of the targets alone, sends a chunk of them through the head, makes of the chunk's logits first the loss and then,
in the same memory, its gradient, and goes back through the head at once. What is left of a chunk is the gradient of its
hidden states and of what is trained in the head, whatever that is; nothing is computed twice. The sum of the losses goes
on as if it were the logits, so it passes every hook that engines and devices have put around the model. Wijmans et al.
2024, https://arxiv.org/abs/2411.09009, and Liger-Kernel, https://arxiv.org/abs/2410.10989, argue the idea.

What a model does to its logits behind the head (`output_head.py`) is done to each chunk. Where it is something that is not
known there, or the head is no module of its own, the logits are made whole, and the reason is told before the run (T35).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from afina.tasks.batches import has_values
from afina.tasks.output_head import Behind, Head, base_of, behind_head, in_place_of, uncached
from afina.tasks.task import IGNORED

__all__ = ["Aim", "divergences", "loss_sum", "losses_and_hits", "supervised", "target_losses", "why_whole"]


_VALUES = 1 << 24  # logits that are there at once; 64 MB in float32
_ON_A_GPU = 4  # times as many, which keep it busy
_HALF_LIFT = 1024.0  # keeps small gradients of float16 logits above zero


@dataclass(frozen=True)
class Aim:
    """What is foretold where: for each target its row of the batch, its place among the last `width` hidden states, and
    the token that is right, each `[targets]`."""

    rows: torch.Tensor
    places: torch.Tensor
    tokens: torch.Tensor
    width: int


def supervised(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Row and place of every target among labels `[rows, tokens]`; of all places where labels have no values
    (the meta device, fake tensors)."""
    targets = torch.ones(labels.shape, dtype=torch.bool) if not has_values(labels) else labels != IGNORED
    rows, places = targets.nonzero(as_tuple=True)
    return rows.to(labels.device), places.to(labels.device)


def why_whole(model: Any) -> str | None:
    """Why the logits of this model have to be made whole; None where they do not."""
    found = behind_head(base_of(model))
    return found if isinstance(found, str) else None


def loss_sum(model: Any, inputs: Mapping[str, torch.Tensor], aim: Aim, *, label_smoothing: float = 0.0) -> torch.Tensor:
    """Cross-entropy (natural logarithm) of the targets, summed, in float32; `inputs` are what the model is called with."""
    base = base_of(model)
    behind = behind_head(base)
    if isinstance(behind, str):
        logits = model(**inputs, **uncached(base)).logits[:, -aim.width :][aim.rows, aim.places]
        return F.cross_entropy(logits.float(), aim.tokens, reduction="sum", label_smoothing=label_smoothing)

    def inside(head: Head, hidden: torch.Tensor) -> torch.Tensor:
        chosen = hidden[:, -aim.width :][aim.rows, aim.places]
        with saved_tensors_hooks(torch.Tensor.detach, torch.Tensor.detach):  # nothing of a chunk waits for backward
            value, known = _summed(head, behind, chosen, aim.tokens, label_smoothing)
        return behind.carried(_Known.apply(value, *known) if known else value)  # type: ignore[no-untyped-call]

    with in_place_of(base.get_output_embeddings(), inside):
        return behind.arrived(model(**inputs, **uncached(base)).logits)[0]


def target_losses(
    model: Any, inputs: Mapping[str, torch.Tensor], aim: Aim, *, temperature: float = 1.0
) -> torch.Tensor:  # fmt: skip
    """The cross-entropy of each target `[targets]`, in float32; logits are divided by `temperature`.

    Each loss may get a gradient of its own, which is not known before backward. So where the head is a frozen matrix the
    gradient of each hidden state is kept for a gradient of one; what is trained in the head is computed again, chunk by
    chunk.
    """
    base = base_of(model)
    behind = behind_head(base)
    if isinstance(behind, str) or behind.shift is not None:
        logits = model(**inputs, **uncached(base)).logits[:, -aim.width :][aim.rows, aim.places]
        return F.cross_entropy(logits.float() / temperature, aim.tokens, reduction="none")

    def scaled(raw: torch.Tensor) -> torch.Tensor:
        made = behind(raw)
        return made if temperature == 1.0 else made / temperature

    def inside(head: Head, hidden: torch.Tensor) -> torch.Tensor:
        return behind.carried(_each(head, scaled, hidden[:, -aim.width :][aim.rows, aim.places], aim.tokens))

    with in_place_of(base.get_output_embeddings(), inside):
        return behind.arrived(model(**inputs, **uncached(base)).logits)


@torch.no_grad()
def divergences(
    model: Any, inputs: Mapping[str, torch.Tensor], aim: Aim, other: Callable[[], AbstractContextManager[Any]]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cross-entropies of the targets by the model and by what it is inside `other()`, and the Kullback-Leibler divergence
    of the first from the second at each of their places, over the whole vocabulary; each `[targets]`, in float64."""
    base = base_of(model)
    behind = behind_head(base)
    kept: list[tuple[Head, torch.Tensor]] = []

    def inside(head: Head, hidden: torch.Tensor) -> torch.Tensor:
        kept.append((head, hidden[:, -aim.width :][aim.rows, aim.places]))
        return hidden.new_zeros(1, 1, 1)

    for state in (nullcontext, other):
        with state():
            if isinstance(behind, str):
                logits = model(**inputs, **uncached(base)).logits[:, -aim.width :][aim.rows, aim.places]
                kept.append((Head(lambda logits: logits, logits.shape[-1]), logits))
            else:
                with in_place_of(base.get_output_embeddings(), inside):
                    model(**inputs, **uncached(base))
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
    base = base_of(model)
    behind = behind_head(base)
    if isinstance(behind, str):
        logits = model(**inputs, **uncached(base)).logits[:, -aim.width :][aim.rows, aim.places]
        return _read(Head(lambda logits: logits, logits.shape[-1]), Behind(), logits, aim.tokens)
    read: list[tuple[torch.Tensor, torch.Tensor]] = []

    def inside(head: Head, hidden: torch.Tensor) -> torch.Tensor:
        chosen = hidden[:, -aim.width :][aim.rows, aim.places]
        read.append(_read(head, behind, chosen, aim.tokens))
        return hidden.new_zeros(1, 1, 1)

    with in_place_of(base.get_output_embeddings(), inside):
        model(**inputs, **uncached(base))
    return read[0]


# --- chunks


def _summed(
    head: Head, behind: Behind, hidden: torch.Tensor, tokens: torch.Tensor, smoothing: float
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
    head: Head, behind: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor, tokens: torch.Tensor
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
    head: Head, behind: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor, tokens: torch.Tensor
) -> torch.Tensor:
    return F.cross_entropy(behind(head.call(hidden)), tokens, reduction="none")


def _one(
    head: Head, behind: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor, tokens: torch.Tensor, smoothing: float
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


def _read(head: Head, behind: Behind, hidden: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    losses, hits = [torch.zeros(0, dtype=torch.float64, device=hidden.device)], [tokens.new_zeros(0, dtype=torch.bool)]
    for some, right in _chunks(head, hidden, tokens):
        scores = behind(head.call(some))
        top, likeliest = scores.max(1)
        hits.append(likeliest == right)
        aimed = scores.gather(1, right.unsqueeze(1)).squeeze(1).double()
        losses.append(top.double() + scores.sub_(top.unsqueeze(1)).exp_().sum(1).double().log() - aimed)
        del scores  # before the next chunk
    return torch.cat(losses), torch.cat(hits)


def _chunks(head: Head, hidden: torch.Tensor, tokens: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
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
