"""The part of a model below everything that is trained, computed once a row.

Where nothing in and before the first blocks learns, the hidden states that leave them are the same in every epoch. A
`Trunk` keeps them by the tokens of a row: the first time a row is read they are computed as ever, without gradients; after
that those blocks are passed over. What the blocks above get is equal, so losses and gradients are, too.

That holds as long as nothing in the trunk is drawn by chance. `still` puts its dropout off; with dropout kept there is no
trunk. Whether passing over gives what computing gives is tried with real rows before anything relies on it.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn

from afina.fast.blocks import Stack
from afina.fast.states import States

__all__ = ["Trunk"]

# What a call says of the output alone: the same row gives the same states whatever stands here.
_INPUTS = ("input_ids", "pixel_values", "input_features", "input_values")
_OF_THE_OUTPUT = {"labels", "logits_to_keep", "start_positions", "end_positions", "answer_at"}


class _Enough(Exception):  # noqa: N818 (it is no error)
    """The states are there, and what comes after them is not wanted."""


class Trunk:
    """The first `stack.depth` blocks of a model and all that comes before them."""

    def __init__(self, stack: Stack, states: States | None):
        self.stack, self.states = stack, states
        self.frozen = stack.blocks[: stack.depth]
        self.computed = self.passed_over = 0  # calls
        self._parameters = inspect.signature(stack.owner.forward)
        self._digests: list[str] | None = None  # of the rows of the call under way
        self._mask: torch.Tensor | None = None
        self._known = self._filling = False
        self._training: list[nn.Module] = []  # modules around the blocks that are in training above the trunk
        self._form: Any = None  # what the last block gives beside the hidden states

    @property
    def size(self) -> int:
        """Bytes of the states that are there."""
        return self.states.size if self.states is not None else 0

    @contextmanager
    def used(self) -> Iterator[None]:
        """Inside the block nothing in the trunk is drawn by chance, and rows whose states are known pass over it.

        Without `states` it is computed each time.
        """
        owner = self.stack.owner
        hooks = [
            owner.register_forward_pre_hook(self._begins, with_kwargs=True),
            owner.register_forward_hook(self._ends, always_call=True),
        ]
        for i, block in enumerate(self.frozen):
            block.forward = self._around(block.forward, last=i == self.stack.depth - 1)  # type: ignore[method-assign]
        still = (*self.stack.before, *self.frozen)
        before = [module.training for module in still]
        for module in still:  # going through thousands of modules to set them back and forth is most of a small step
            module.eval()
            module.train = _stays(module)  # type: ignore[method-assign]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for block in self.frozen:
                del block.forward
            for module, training in zip(still, before, strict=True):
                del module.train
                module.train(training)

    def fits(self, call: Callable[[], torch.Tensor], expected: torch.Tensor | None = None) -> bool:
        """Whether passing over gives what computing gives, for `call`, which runs the model on real rows in evaluation;
        inside `used`. What it keeps are true states in any case. `expected`: what computing gave, where that is known."""
        states, self.states = self.states, None
        with torch.no_grad():
            expected = call() if expected is None else expected
            self.states = states
            before = self.passed_over
            found = call()
            if self.passed_over == before:  # the states were not there yet
                found = call()
        return self.passed_over > before and torch.equal(found, expected)

    def fill(self, calls: Iterable[Callable[[], Any]]) -> None:
        """Compute the states of the rows of each call, and nothing above them; inside `used`."""
        self._filling = True
        try:
            for call in calls:
                with torch.no_grad(), suppress(_Enough):
                    call()
        finally:
            self._filling, self._digests = False, None

    # --- one call of the model

    def _begins(self, owner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._training = [module for module in self.stack.around if module.training]
        for module in self._training:  # chance in their own forward, before the blocks and between them
            module.training = False
        given = self._parameters.bind_partial(*args, **kwargs).arguments
        given |= given.pop("kwargs", {})
        tensors = {k: v for k, v in given.items() if isinstance(v, torch.Tensor) and k not in _OF_THE_OUTPUT}
        first = next((tensors[k] for k in _INPUTS if k in tensors), None)
        if self.states is None or first is None or given.get("past_key_values") is not None:
            self._digests = None  # tokens are being written, or come as embeddings: computed as ever
            return
        mask = tensors.pop("attention_mask", None)
        tokens = first.shape[:2] if first.dim() == 2 else None
        self._mask = mask.bool() if mask is not None and mask.shape == tokens else None
        rows = {k: v.detach().cpu() for k, v in sorted(tensors.items()) if v.dim() and len(v) == len(first)}
        kept = None if self._mask is None else self._mask.cpu()
        self._digests = [_digest(rows, kept, i) for i in range(len(first))]
        self._known = all(digest in self.states for digest in self._digests)
        self.passed_over, self.computed = self.passed_over + self._known, self.computed + (not self._known)
        if self._filling and self._known:
            raise _Enough

    def _ends(self, *_: Any) -> None:
        self._digests = None
        self._above()

    def _above(self) -> None:
        """The trunk is behind: what comes now may draw again."""
        for module in self._training:
            module.training = True
        self._training = []

    def _around(self, forward: Callable[..., Any], *, last: bool) -> Callable[..., Any]:
        def run(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if self._digests is None:
                with torch.no_grad():
                    out = forward(hidden, *args, **kwargs)
                if last:
                    self._form = len(out) if isinstance(out, tuple) else None
                    self._above()
                return out
            if last:
                self._above()
            if not self._known:
                with torch.no_grad():
                    out = forward(hidden, *args, **kwargs)
                if last:
                    self._keep(out[0] if isinstance(out, tuple) else out)
                    self._form = len(out) if isinstance(out, tuple) else None
                    if self._filling:
                        raise _Enough
                return out
            made = self._kept(hidden) if last else hidden
            return made if self._form is None else (made, *[None] * (self._form - 1))

        return run

    def _keep(self, hidden: torch.Tensor) -> None:
        assert self._digests is not None
        assert self.states is not None
        for i, digest in enumerate(self._digests):
            row = hidden[i] if self._mask is None else hidden[i][self._mask[i]]
            self.states.add(digest, row)

    def _kept(self, hidden: torch.Tensor) -> torch.Tensor:
        assert self._digests is not None
        assert self.states is not None
        rows = [self.states.get(digest) for digest in self._digests]
        if self._mask is None:
            return torch.stack(rows).to(hidden.device)
        made = torch.zeros(*hidden.shape[:2], *self.states.rest, dtype=self.states.dtype, device=hidden.device)
        made[self._mask] = torch.cat(rows).to(hidden.device)
        return made


def _stays(module: nn.Module) -> Callable[..., nn.Module]:
    """A `train` that leaves the module in evaluation."""
    return lambda mode=True: module


def _digest(rows: dict[str, torch.Tensor], mask: torch.Tensor | None, i: int) -> str:
    made = hashlib.blake2b(digest_size=16)
    for name, tensor in rows.items():
        row = tensor[i]
        if mask is not None and row.shape[:1] == mask.shape[1:]:
            row = row[mask[i]]
        made.update(name.encode())
        made.update(row.contiguous().view(torch.uint8).numpy().tobytes())
    return made.hexdigest()
