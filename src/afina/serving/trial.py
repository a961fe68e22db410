"""What a base and an adapter can do is tried before the first request, not guessed from their names.

Rows of an adapter are mixed with others' where that gives what they give alone. Texts are stepped, token by token, where
that gives what one pass over the whole text gives; where it does not, they are written by one call of `generate`.
"""

from __future__ import annotations

from typing import Any

import torch

from afina.core.mixed import told
from afina.core.runtime import BASE_ROW
from afina.errors import AfinaError
from afina.serving.models import Lane, Models, Served
from afina.serving.reading import forward
from afina.serving.sampling import Choosing
from afina.serving.text import TextStream
from afina.serving.writing import Cohort, Writing

__all__ = ["try_out"]

_NEAR = 1e-3  # of the largest value: rounding, in any order of summation
_LONG, _SHORT = 11, 7  # tokens of the two rows of a trial
_TEXT = "What is the capital of Norway, and how many people live in it? "


def try_out(models: Models) -> None:
    """Set `mixes` and `whole` of everything served, and note what is not as usual."""
    for served in models.by_name.values():
        try:
            reason = _steps(served) if served.lane.writes else _mixed(served)
        except (AfinaError, RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError, IndexError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if reason:
            served.mixes = False
            if served.lane.writes:
                reason = _stepped_alone(served)
        beams = getattr(served.task.options, "num_beams", 1)
        if served.lane.writes and beams > 1:
            reason = f"its answers follow {beams} texts at once (task.num_beams)"
        if served.lane.writes and reason:
            served.whole = reason
            models.notes.append(f"{served.name} writes one answer after another, without streaming: {reason}")
        elif not served.mixes:
            models.notes.append(f"rows of {served.name} are computed in batches of their own: its adapter cannot be mixed")
    for lane in models.lanes:
        lane.mixture = None  # the adapters of the trial
        names = [served.adapter for served in lane.served if served.mixes and served.tuned]
        if len(names) > 1:
            models.notes.append(told(lane.adapters.layers, names))


def _ids(served: Served, count: int) -> list[int]:
    """So many tokens of some text."""
    ids = served.task.tokenizer(_TEXT * 4, add_special_tokens=False)["input_ids"]
    return list((ids * count)[:count])


def _far(one: torch.Tensor, other: torch.Tensor) -> bool:
    scale = float(other.abs().max()) or 1.0
    return not bool((one.float() - other.float()).abs().max() <= _NEAR * scale)


def _other(served: Served) -> str:
    """An adapter to mix with: another one, else none."""
    return next((s.adapter for s in served.lane.served if s.adapter != served.adapter), BASE_ROW)


@torch.no_grad()
def _mixed(served: Served) -> str:
    """Why rows cannot be mixed; empty where they can."""
    lane, rows = served.lane, [_ids(served, _SHORT), _ids(served, _LONG)]
    pad = served.task.tokenizer.pad_token_id
    alone = {"input_ids": torch.tensor(rows[:1]), "attention_mask": torch.ones(1, _SHORT, dtype=torch.long)}
    filled = [rows[0] + [pad] * (_LONG - _SHORT), rows[1]]
    mask = [[1] * _SHORT + [0] * (_LONG - _SHORT), [1] * _LONG]
    both = {"input_ids": torch.tensor(filled), "attention_mask": torch.tensor(mask)}
    right = forward(lane, [served.adapter], alone)
    found = forward(lane, [served.adapter, _other(served)], both)
    for name, value in right.items():
        if name == "pooler_output":
            continue
        own = found[name][:1]
        own = own[tuple(slice(0, size) for size in value.shape)]
        if own.shape != value.shape or _far(own, value):
            return f"{name} is another one in a mixed batch"
    return ""


def _writing(served: Served, tokens: int) -> Writing:
    stream = TextStream(lambda ids: "")
    return Writing(served, _ids(served, tokens), 100, Choosing(), stream, frozenset(), lambda piece, reason: None)


def _steps(served: Served) -> str:
    """Why the texts of an adapter and others cannot be stepped together; empty where they can."""
    lane = served.lane
    other = next((s for s in lane.served if s.adapter == _other(served)), None)
    companion = other or Served("", served.run, lane, BASE_ROW, 0)
    first = Cohort(lane, [_writing(served, _SHORT)])
    first.step()
    second = Cohort(lane, [_writing(companion, _LONG), _writing(served, _LONG - 1)])
    together = first.mergeable and second.mergeable
    if together:
        first.join(second)
    first.step()
    first.step()
    return _unlike(first, 0) or (_unlike(first, 2) if together else _unlike(second, 1))


def _stepped_alone(served: Served) -> str:
    """Why texts of one adapter cannot be stepped by themselves; empty where they can."""
    try:
        cohort = Cohort(served.lane, [_writing(served, _SHORT), _writing(served, _LONG)])
        cohort.step()
        cohort.step()
        return _unlike(cohort, 0) or _unlike(cohort, 1)
    except (AfinaError, RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError, IndexError) as error:
        return str(error).splitlines()[0] if str(error) else type(error).__name__


@torch.no_grad()
def _unlike(cohort: Cohort, row: int) -> str:
    """Whether the scores of a row differ from those of one pass over all of its text."""
    lane: Lane = cohort.lane
    one = cohort.rows[row]
    model: Any = lane.model.get_base_model()
    with lane.adapters.runtime.using(lane.state([one.served.adapter])), lane.storage.arithmetic(lane.device):
        if cohort.encoder_decoder:
            ids = [one.served.task.learned["start"], *one.written[:-1]]
            source = torch.tensor([one.prompt], device=lane.device)
            found = model(input_ids=source, decoder_input_ids=torch.tensor([ids], device=lane.device), use_cache=False)
        else:
            ids = [*one.prompt, *one.written[:-1]]
            found = model(input_ids=torch.tensor([ids], device=lane.device), use_cache=False)
    return "its steps give other scores than one pass" if _far(cohort.scores[row], found.logits[0, -1]) else ""
