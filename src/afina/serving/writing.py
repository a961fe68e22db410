"""Many texts written at once, a token of each a step; new ones join between two steps and finished ones leave.

A cohort is a batch of texts that share a cache of keys and values. New texts are read in a cohort of their own, and where
the cache is a plain one, the two become one: the shorter side is filled up on the left with places that the mask hides,
which is left padding made later. Positions are counted per row from the mask, so a row's tokens have the positions they
would have alone. Caches of another kind (sliding windows, states) and adapters that cannot be mixed keep cohorts of their
own, which take turns, so that a long text never holds up a short one for more than a step.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from afina.serving.models import Lane, Served
from afina.serving.sampling import Chooser, Choosing
from afina.serving.text import TextStream
from afina.tasks.batches import pad_right
from afina.tasks.generation import left_padded

__all__ = ["Cohort", "Writing", "processors_of"]

_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")


@dataclass(eq=False)
class Writing:
    """One text being written. `tell(piece, reason)` gets new text as it comes, and with the last piece why it ended."""

    served: Served
    prompt: list[int]
    most: int  # tokens
    how: Choosing
    text: TextStream
    ends: frozenset[int]
    tell: Callable[[str, str | None], None]
    streamed: bool = False
    written: list[int] = field(default_factory=list)
    reason: str | None = None  # "stop" or "length", once it has ended
    cancelled: bool = False
    chooser: Chooser | None = None
    fail: Callable[[BaseException], None] = lambda error: None

    @property
    def over(self) -> bool:
        """Whether nothing more is to be computed for it."""
        return self.cancelled or self.reason is not None

    def take(self, token: int) -> None:
        """One more token."""
        self.written.append(token)
        if token in self.ends:
            self.reason = "stop"
        elif len(self.written) >= self.most:
            self.reason = "length"
        self.show()

    def show(self) -> None:
        """Send what is new, where someone waits for it."""
        if not (self.streamed or self.text.stops or self.reason):
            return
        said = self.written[:-1] if self.written and self.written[-1] in self.ends else self.written
        with self.served.lock:
            piece = self.text.grow(said, last=self.reason is not None)
        if self.text.stopped:
            self.reason = "stop"
        if self.reason is not None:
            self.tell(piece if self.streamed else self.text.sent, self.reason)
        elif piece and self.streamed:
            self.tell(piece, None)


def processors_of(lane: Lane, prompt: int) -> Any:
    """What the checkpoint asks to be done to scores before a token is chosen, sampling left out, as in `afina predict`."""
    model = _base(lane)
    settings = copy.deepcopy(model.generation_config)
    for name in _SAMPLING:
        setattr(settings, name, None)
    settings.update(do_sample=False, num_beams=1, max_length=None, min_length=0, eos_token_id=None, pad_token_id=None)
    start = 1 if model.config.is_encoder_decoder else prompt
    return model._get_logits_processor(settings, input_ids_seq_length=start, device=str(lane.device))


def _base(lane: Lane) -> Any:
    return lane.model.get_base_model()


class Cohort:
    """Texts that are computed together; all of one lane."""

    def __init__(self, lane: Lane, rows: Sequence[Writing]):
        self.lane, self.rows = lane, list(rows)
        self.model = model = _base(lane)
        self.parameters = frozenset(inspect.signature(model.forward).parameters)
        self.encoder_decoder = bool(model.config.is_encoder_decoder)
        for row in self.rows:
            seen = [row.served.task.learned["start"]] if self.encoder_decoder else row.prompt
            row.chooser = Chooser(row.how, seen, processors_of(lane, len(row.prompt)))
        pad = self.rows[0].served.task.tokenizer.pad_token_id
        self.cache: Any = None
        self.encoded: Any = None
        with torch.no_grad(), self._arithmetic():
            if self.encoder_decoder:  # sources are padded on the right, as in training
                batch = pad_right([{"input_ids": row.prompt} for row in self.rows], pad)
                ids, self.mask = (batch[name].to(lane.device) for name in ("input_ids", "attention_mask"))
                with self._adapters():
                    self.encoded = model.get_encoder()(input_ids=ids, attention_mask=self.mask)
                starts = [[row.served.task.learned["start"]] for row in self.rows]
                self._advance(torch.tensor(starts, device=lane.device))
            else:
                prompts = [torch.tensor(row.prompt, device=lane.device) for row in self.rows]
                ids, self.mask = left_padded(prompts, pad)
                self._advance(ids)

    @property
    def mergeable(self) -> bool:
        """Whether another cohort can be taken in."""
        layers = getattr(self.cache, "layers", None)
        plain = layers is not None and all(type(layer).__name__ == "DynamicLayer" for layer in layers)
        return plain and not self.encoder_decoder and all(row.served.mixes for row in self.rows)

    def step(self) -> None:
        """One more token of every text."""
        last = torch.tensor([[row.written[-1]] for row in self.rows], device=self.lane.device)
        with torch.no_grad(), self._arithmetic():
            if not self.encoder_decoder:
                self.mask = torch.cat([self.mask, torch.ones_like(last)], dim=1)
            self._advance(last)

    def _arithmetic(self) -> Any:
        return self.lane.storage.arithmetic(self.lane.device)

    def _adapters(self) -> Any:
        return self.lane.adapters.runtime.using(self.lane.state([row.served.adapter for row in self.rows]))

    def _advance(self, ids: torch.Tensor) -> None:
        """Read tokens `[rows, n]`, and choose the next of each row."""
        with self._adapters():
            self.scores = self._scores(ids)
        broken = self.scores.isnan().any(dim=1).tolist()
        for row, own, bad in zip(self.rows, self.scores, broken, strict=True):
            if row.over or row.chooser is None:
                continue
            try:
                if bad:
                    raise FloatingPointError("the model's scores are not numbers")
                row.take(row.chooser(own, row.written))
            except Exception as error:  # one text's own: the others go on
                row.cancelled = True
                row.fail(error)

    def _scores(self, ids: torch.Tensor) -> torch.Tensor:
        """Of the token behind the last, `[rows, vocabulary]`."""
        inputs: dict[str, Any] = {"attention_mask": self.mask, "past_key_values": self.cache, "use_cache": True}
        if self.encoder_decoder:
            inputs |= {"encoder_outputs": self.encoded, "decoder_input_ids": ids}
        else:
            inputs["input_ids"] = ids
            if "position_ids" in self.parameters:
                inputs["position_ids"] = (self.mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
            if "logits_to_keep" in self.parameters:
                inputs["logits_to_keep"] = 1
        found = self.model(**inputs)
        self.cache = found.past_key_values
        return found.logits[:, -1]  # type: ignore[no-any-return]

    # --- rows that leave and rows that join

    def drop_finished(self) -> None:
        """Let go of what is over, and of places that no row has anything in."""
        kept = [i for i, row in enumerate(self.rows) if not row.over]
        if len(kept) == len(self.rows):
            return
        self.rows = [self.rows[i] for i in kept]
        if not kept:
            self.cache = self.encoded = None
            return
        index = torch.tensor(kept, device=self.mask.device)
        self.mask = self.mask[index]
        self.cache.batch_select_indices(index)
        if self.encoded is not None:
            for name, value in list(self.encoded.items()):
                if isinstance(value, torch.Tensor):
                    self.encoded[name] = value[index]
        if self.mergeable:
            self._trim(int(self.mask.any(dim=0).int().argmax()))

    def _trim(self, places: int) -> None:
        if places:
            self.mask = self.mask[:, places:]
            for layer in self.cache.layers:
                layer.keys, layer.values = layer.keys[:, :, places:].clone(), layer.values[:, :, places:].clone()

    def join(self, other: Cohort) -> None:
        """Take in the texts of another cohort. Both must be mergeable."""
        width = max(self.mask.shape[1], other.mask.shape[1])
        for cohort in (self, other):
            cohort._widen(width - cohort.mask.shape[1])
        self.mask = torch.cat([self.mask, other.mask])
        for own, more in zip(self.cache.layers, other.cache.layers, strict=True):
            own.keys, own.values = torch.cat([own.keys, more.keys]), torch.cat([own.values, more.values])
        self.rows += other.rows

    def _widen(self, places: int) -> None:
        if places:
            self.mask = torch.nn.functional.pad(self.mask, (places, 0))
            for layer in self.cache.layers:
                layer.keys = torch.nn.functional.pad(layer.keys, (0, 0, places, 0))
                layer.values = torch.nn.functional.pad(layer.values, (0, 0, places, 0))
