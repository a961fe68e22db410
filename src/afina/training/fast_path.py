"""What of a run can be computed once, or less of, without changing it; and what was found, as sentences (T35).

Two things are looked for. Blocks in and before which nothing is trained give the same hidden states in every epoch: they
are computed once a row and kept on the disk (`fast/trunk.py`). A last block that is read at one position alone is computed
there alone (`fast/last_position.py`). Each is tried with real rows first, and only what gives the same is used. Frozen
weights are held in the type that is computed in (`memory/ready.py`). On a CPU attention in bfloat16 goes back by plain
products (`fast/attention.py`), and dropout draws fewer bits (`fast/dropout.py`); on a GPU LoRA's is drawn again rather than
kept where that is faster (`core/lora_dropout.py`). Of runs of a sweep that are built alike one is tried.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from afina.core.files import cache_folder
from afina.core.lora_dropout import DROPOUT
from afina.fast.attention import short_attention
from afina.fast.blocks import Stack, find_stack
from afina.fast.dropout import quick_dropout
from afina.fast.gelu import quick_gelu
from afina.fast.last_position import narrowed, position_read
from afina.fast.states import States
from afina.fast.trunk import Trunk
from afina.memory.measure import available
from afina.memory.ready import ready_bytes, ready_weights
from afina.memory.sizes import parse_size, shown_size
from afina.tasks.task import Batch, Rows, Task
from afina.training import checkpoints
from afina.training.batching import sorted_batches
from afina.training.engines.engine import Engine
from afina.training.recipe import TrainingOptions

__all__ = ["engine_dtype", "fast_path", "states_size"]

Once = Callable[[str, Callable[[], Any]], Any]  # a name, and what is made if that has not been made before

_KNOWN: dict[int, tuple[weakref.ref[torch.Tensor], int, bytes]] = {}  # hashes of tensors by their id
_PROBED = 4  # rows that are tried
_ROOM = 0.25  # of the free memory, for copies of frozen weights
_FILLED = 4096  # tokens whose states are computed at once, where reading takes as many
_WIDTHS = 4  # what a batch is padded to a multiple of where every new shape costs; 8 costs more in tokens than it saves
_CLOSE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}  # of logits, relative to the largest


@contextmanager
def fast_path(
    model: Any, task: Task, rows: Mapping[str, Rows], options: TrainingOptions, engine: Engine,
    say: Callable[[str], None] = lambda sentence: None, *, spare: bool = True,
    once: Once = lambda what, make: make(),
) -> Iterator[list[str]]:  # fmt: skip
    """Inside the block the model runs as fast as it can without changing what is learned; gives what was found.

    With `frozen_dropout: keep` the blocks below what is trained draw as ever, and nothing is computed once. `say` is told of
    work that takes a while. `spare`: time may be bought with memory. `once` makes what is found by trying, or knows it from
    a run with the same rows whose model is built alike.
    """
    notes, known = list[str](), list[Any]()
    chance = checkpoints.random_states()
    train = rows["train"]
    order = sorted(range(len(train.features)), key=lambda i: train.lengths[i])
    chosen = [order[i * (len(order) - 1) // max(1, _PROBED - 1)] for i in range(min(_PROBED, len(order)))]
    probe = _batch(task, train, chosen, engine)

    def call() -> torch.Tensor:
        model.eval()
        with engine.autocast():
            return task.loss_sum(model, probe)

    given: list[torch.Tensor] = []  # by the whole model, where it is asked

    def placed() -> tuple[Any, ...] | str:
        found = find_stack(model, lambda: given.append(call()))
        return found if isinstance(found, str) else found.places(model)

    with ExitStack() as used:
        used.enter_context(quick_gelu())
        if task.widens and _is_narrow(engine):
            used.enter_context(_few_widths(task, rows))
            costly = f"new shapes cost a CPU more in {engine.precision}"
            notes.append(f"batches are padded to a multiple of {_WIDTHS} tokens, as {costly}")
        if engine.sharded:
            notes.append(f"every step computes the whole model: {engine.name} keeps it in shards")
        elif task.writes_rows:
            notes.append("every step computes the whole model: what it learns from is written anew in each step")
        elif isinstance(places := once("blocks", placed), str):
            notes.append(f"every step computes the whole model: {places}")
        else:
            stack = Stack.at(model, places)
            if stack.depth:
                fits = partial(_fits, call=call, given=given)
                if _first(task, model, stack, rows, options, engine, call, used, notes, say, spare, fits, once):
                    known = list(stack.blocks[: stack.depth])
            else:
                notes.append("something is trained in or before the first block, so every block is computed in every step")
            position, why = once("position", lambda: _position(model, task, stack, probe, engine))  # over the trunk
            if position is not None:
                used.enter_context(narrowed(stack.owner, stack.blocks[-1], position))
            notes += why
        if spare and not engine.sharded:
            _ready(model, engine, known, used, notes, call, once)
        used.enter_context(quick_dropout())
        products = used.enter_context(short_attention()) if _is_narrow(engine) else None
        checkpoints.set_random_states(chance)
        DROPOUT.met.clear()
        yield notes
        notes.extend(DROPOUT.said())
        if products is not None and products.asked:
            notes.append(products.said())


def _is_narrow(engine: Engine) -> bool:
    """Whether the arithmetic is that of a CPU in bfloat16."""
    return engine.device.type == "cpu" and engine_dtype(engine) == torch.bfloat16


@contextmanager
def _few_widths(task: Task, rows: Mapping[str, Rows]) -> Iterator[None]:
    """Pad batches to one of few widths: in 16 bits a CPU's matrix products are compiled anew for each shape, for 5 to 15 ms
    each, which in an epoch of short rows is a seventh of the time; three more tokens a row are less. No batch gets wider
    than the longest row."""
    before = task.widths
    task.widths = _WIDTHS, max(len(f["input_ids"]) for side in rows.values() for f in side.features)
    try:
        yield
    finally:
        task.widths = before


# --- frozen weights


def _ready(
    model: Any, engine: Engine, known: Sequence[Any], used: ExitStack, notes: list[str], call: Callable[[], torch.Tensor],
    once: Once,
) -> None:  # fmt: skip
    """Hold frozen weights in the type of the arithmetic, where there is room; `known` are blocks that are not computed."""
    dtype = engine_dtype(engine)
    size, free = ready_bytes(model, dtype, without=known), available(engine.device)
    if not size:
        return
    if size > free * _ROOM:
        notes.append(
            f"frozen weights are cast to {engine.precision} in every step: copies would take {shown_size(size)}, "
            f"more than a quarter of the {shown_size(free)} that are free"
        )
        return

    @torch.no_grad()
    def same() -> bool:
        expected = call()
        try:
            with ready_weights(model, dtype, without=known):
                return torch.equal(call(), expected)
        except RuntimeError:
            return False

    if once("copies", same):
        used.enter_context(ready_weights(model, dtype, without=known))
        notes.append(f"frozen weights are held in {engine.precision}, not cast in every step ({shown_size(size)} of memory)")
    else:
        notes.append(f"frozen weights are cast to {engine.precision} in every step: with copies answers would differ")


def _held(model: Any, engine: Engine, spare: bool) -> AbstractContextManager[Any]:
    """The same for what is computed once, in some dozen batches."""
    dtype = engine_dtype(engine)
    room = spare and ready_bytes(model, dtype) <= available(engine.device) * _ROOM
    return ready_weights(model, dtype) if room else nullcontext()


# --- the first blocks


def _first(
    task: Task, model: Any, stack: Stack, rows: Mapping[str, Rows], options: TrainingOptions, engine: Engine,
    call: Callable[[], torch.Tensor], used: ExitStack, notes: list[str], say: Callable[[str], None], spare: bool,
    fits: Callable[[Trunk], bool], once: Once,
) -> bool:  # fmt: skip
    """Still the trunk, and keep its states where there is room for them; says whether it is computed no more."""
    frozen = f"the first {stack.depth} of {len(stack.blocks)} blocks are frozen"
    if options.frozen_dropout == "keep":
        notes.append(f"{frozen} and computed in every step (training.frozen_dropout=keep)")
        return False
    tokens = sum(rows["train"].lengths) + sum(rows["validation"].lengths)
    size = states_size(stack, tokens) if task.tokenizer is not None else _measured(stack, rows, call)
    limit = 0 if options.trunk_cache == "off" else parse_size(options.trunk_cache)
    place = cache_folder("trunk")

    def every_step(why: str, needed: str = f"; {shown_size(size)} would be needed") -> bool:
        used.enter_context(Trunk(stack, None).used())
        notes.append(f"{frozen}, without dropout, and computed in every step ({why}{needed})")
        return False

    if task.varies:
        return every_step(f"{task.varies} makes a training row another in every epoch", "")
    if task.packed:
        return every_step("rows are packed")
    if place is None or size > limit:
        return every_step("AFINA_CACHE=off" if place is None else f"training.trunk_cache={options.trunk_cache}")
    inside = used.enter_context(ExitStack())
    try:
        folder = place / _name(stack, engine)
        _make_room(place, folder, limit - size)
        trunk = Trunk(stack, states := States(folder, limit))
        known = bool(states.rows)
        if (free := shutil.disk_usage(folder).free + trunk.size) < size:
            return every_step(f"{folder.parent} has room for {shown_size(free)}")
        inside.enter_context(trunk.used())
        if not once("trunk", lambda: fits(trunk)):
            inside.close()
            return every_step("what was kept of them did not give the same")

        def fill() -> None:
            with _held(model, engine, spare):
                _fill(task, model, stack, trunk, rows, options, engine, (lambda _: None) if known else say)

        once("states", fill)  # a row whose states are gone since is computed as it comes
    except OSError as error:
        inside.close()
        return every_step(f"{place} cannot be written: {error.strerror or error}")
    before = " in a run before" if known else ""
    notes.append(f"{frozen}, without dropout, and computed once a row{before} ({shown_size(size)} on the disk)")
    return True


def _fits(trunk: Trunk, call: Callable[[], torch.Tensor], given: Sequence[torch.Tensor]) -> bool:
    """Whether the rows that are tried give what they have given."""
    try:
        return trunk.fits(call, given[-1] if given else None)
    except (TypeError, AttributeError, IndexError):  # blocks that give other than one state a token
        return False


def states_size(stack: Stack, tokens: int) -> int:
    """Bytes that the states of so many tokens take at most."""
    return tokens * next((p.shape[-1] for p in stack.blocks[0].parameters() if p.dim() == 1), 0) * 4


def _measured(stack: Stack, rows: Mapping[str, Rows], call: Callable[[], Any]) -> int:
    """Bytes of the states of all rows, measured on some: how many a row has is known by its model alone."""
    sizes: list[float] = []

    def note(module: Any, args: Any, out: Any) -> None:
        hidden = out[0] if isinstance(out, tuple) else out
        sizes.append(hidden.nbytes / len(hidden))

    hook = stack.blocks[stack.depth - 1].register_forward_hook(note)
    try:
        with torch.no_grad():
            call()
    finally:
        hook.remove()
    return int(max(sizes) * sum(len(rows[side].features) for side in ("train", "validation")))


def _fill(
    task: Task, model: Any, stack: Stack, trunk: Trunk, rows: Mapping[str, Rows], options: TrainingOptions, engine: Engine,
    say: Callable[[str], None],
) -> None:  # fmt: skip
    """Compute the states of all rows that are not there yet."""

    def work(side: Rows, some: list[int]) -> Callable[[], Any]:
        def run() -> Any:
            model.eval()
            with engine.autocast():
                return task.loss_sum(model, _batch(task, side, some, engine))

        return run

    sides = rows["train"], rows["validation"]
    count = sum(len(side.features) for side in sides)
    say(f"computing the first {stack.depth} of {len(stack.blocks)} blocks, which are frozen, once for {count:,} rows")
    trunk.fill(work(side, some) for side in sides for some in _filled(side.lengths, options.read_at_once))
    if engine.main and trunk.states is not None:
        trunk.states.keep()


def _filled(lengths: Sequence[int], rows: int) -> Iterator[list[int]]:
    """Rows of like length, together no more tokens than `rows` of the longest, which is what memory was planned for."""
    some, room = list[int](), min(_FILLED, rows * max(lengths))
    for (row,) in sorted_batches(lengths, 1):
        if some and lengths[some[0]] * (len(some) + 1) > room:
            yield some
            some = []
        some.append(row)
    yield some


def _name(stack: Stack, engine: Engine) -> str:
    """A hash of all that the states follow from."""
    config = getattr(stack.owner, "config", None)
    about = [type(stack.owner).__name__, stack.name, stack.depth, engine.precision, str(engine.device.type), engine.process,
             version("torch"), version("transformers"), config.to_dict() if config is not None else {}]  # fmt: skip
    digest = hashlib.blake2b(json.dumps(about, sort_keys=True, default=str).encode(), digest_size=16)
    for module in (*stack.before, *stack.blocks[: stack.depth]):
        for name, value in module.state_dict(keep_vars=True).items():
            digest.update(name.encode())
            if isinstance(value, torch.Tensor):
                digest.update(_hashed(value))
    return digest.hexdigest()


def _hashed(tensor: torch.Tensor) -> bytes:
    """A hash of a tensor's content, known where it has not been written to: runs of a sweep share their frozen weights."""
    place = id(tensor)
    known = _KNOWN.get(place)
    if known is None or known[0]() is not tensor or known[1] != tensor._version:
        content = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
        made = hashlib.blake2b(content, digest_size=16).digest()
        known = _KNOWN[place] = weakref.ref(tensor, lambda _: _KNOWN.pop(place, None)), tensor._version, made
    return known[2]


def _make_room(place: Path, own: Path, room: int) -> None:
    """Remove the states of other trunks, the least recently used first, until they take no more than `room` bytes."""
    if not place.is_dir():
        return
    others = [p for p in place.iterdir() if p.is_dir() and p != own]
    sizes = {p: sum(f.stat().st_size for f in p.iterdir()) for p in others}
    for old in sorted(others, key=lambda p: p.stat().st_mtime):
        if sum(sizes.values()) <= room:
            return
        shutil.rmtree(old, ignore_errors=True)
        del sizes[old]


# --- the last block


def _position(model: Any, task: Task, stack: Stack, probe: Batch, engine: Engine) -> tuple[str | None, list[str]]:
    """The position at which alone the last block is to be computed, or None, and what is to be said of it."""
    mask = probe.get("attention_mask")
    if mask is None or len(mask) < 2 or len({int(row.sum()) for row in mask}) < 2 or stack.depth == len(stack.blocks):
        return None, []

    def logits() -> torch.Tensor:
        with engine.autocast():
            return task.logits(model, probe)

    model.eval()
    try:
        position = position_read(stack.blocks[-1], mask, lambda: logits().sum())
    except (TypeError, AttributeError, RuntimeError, NotImplementedError):
        return None, []  # a task whose answers are no logits
    if position is None:
        return None, []
    expected = logits().detach()
    try:
        with narrowed(stack.owner, stack.blocks[-1], position):
            found = logits().detach()
        bound = _CLOSE[engine_dtype(engine)] * max(1.0, float(expected.abs().max()))
        if not float((found - expected).abs().max()) <= bound:
            raise NotImplementedError("the answers differ")
    except (RuntimeError, NotImplementedError) as error:
        return None, [f"the last block is computed at every position, though one is read ({str(error)[:100]})"]
    return position, [f"the last block is computed at the {position} token of each row, where alone it is read"]


def engine_dtype(engine: Engine) -> torch.dtype:
    """Of the arithmetic."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(engine.precision, torch.float32)


def _batch(task: Task, rows: Rows, chosen: list[int], engine: Engine) -> Batch:
    return {k: v.to(engine.device) for k, v in task.collate([rows.features[i] for i in chosen]).items()}
