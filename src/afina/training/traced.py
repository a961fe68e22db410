"""The parts of a run in a trace (`memory.trace`), without contents: weights, optimizer, what is gathered of shards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from afina.core.codecs.outline import OutlineLinear
from afina.memory.storage import FLOATS
from afina.memory.trace import Trace, faked
from afina.training.optimizers import make_optimizer

__all__ = ["NAMES", "gathered_bytes", "placed", "planned_optimizer", "vocabulary_of"]

NAMES = {dtype: name for name, dtype in FLOATS.items()}
_BLOCK = 256  # weights of an 8-bit optimizer's state that share a scale
_SMALL = 4096  # parameters with fewer values keep a float32 state in an 8-bit optimizer


def placed(trace: Trace, model: nn.Module) -> list[Any]:
    """Put the model's tensors into the trace, each with its part; returns the trained parameters."""
    made: dict[int, Any] = {}
    trained = []
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    new: Any = faked(trace, tensor)
                    part = _weights_part(module, tensor)
                    if isinstance(tensor, nn.Parameter):
                        new = nn.Parameter(new, requires_grad=tensor.requires_grad)
                        new.__dict__.update(tensor.__dict__)
                        if tensor.requires_grad:
                            part = "adapters"
                            trained.append(new)
                    made[id(tensor)] = (tensor, new)  # the old one too, so that its number is not given again
                    trace.follow([new], part)
                held[name] = made[id(tensor)][1]
    return trained


def _weights_part(module: nn.Module, tensor: torch.Tensor) -> str:
    if isinstance(module, OutlineLinear) and (tensor is module.weight or tensor is module.scales):
        return f"weights {module.kind}"
    return f"weights {NAMES[tensor.dtype]}" if tensor.dtype in NAMES else "workspace"


def planned_optimizer(trace: Trace, name: str, trained: list[Any], decay: float) -> Any:
    """The optimizer with its state, as it is after the first step, and the copies of trained weights that a run keeps.

    Those from bitsandbytes are not run, since their kernels take contents: their state is made here, of the size it has.
    """
    trace.kept += [p.detach().clone() for p in trained for _ in range(2)]
    trace.follow(trace.kept, "copies")
    if "8bit" in name:
        count = 1 if name.startswith("lion") else 2
        state = [x for p in trained for x in _state_8bit(p, count)]
        if not name.startswith("paged"):
            trace.follow(state, "optimizer")
            trace.kept += state
        return None
    optimizer = make_optimizer(name, {str(i): p for i, p in enumerate(trained)}, 1e-3, decay)
    for p in trained:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for p in trained:
        p.grad = None
    states = [x for state in optimizer.state.values() for x in state.values() if isinstance(x, torch.Tensor)]
    trace.follow(states, "optimizer")
    return optimizer


def _state_8bit(p: torch.Tensor, count: int) -> list[torch.Tensor]:
    if p.numel() < _SMALL:
        return [torch.zeros_like(p, dtype=torch.float32) for _ in range(count)]
    scales = [torch.zeros(-(-p.numel() // _BLOCK)) for _ in range(count)]
    return [*(torch.zeros_like(p, dtype=torch.uint8) for _ in range(count)), *scales]


def gathered_bytes(model: Any, weights: Mapping[str, int]) -> int:
    """Frozen bytes that are whole at once where weights lie in shards: two blocks, one at work and one on its way."""
    blocks = [m for m in model.modules() if type(m).__name__.endswith(("Block", "Layer", "DecoderLayer"))]
    sizes = [sum(p.numel() * p.element_size() for p in m.parameters()) for m in blocks]
    table = _table(model)
    embeddings = table.weight.numel() * table.weight.element_size() if table is not None else 0
    return min(sum(weights.values()), max(2 * max(sizes, default=0), embeddings))


def _table(model: Any) -> Any:
    """The embeddings of tokens; None where there are none."""
    try:
        found = model.get_base_model().get_input_embeddings()
    except (NotImplementedError, AttributeError):
        return None
    return found if isinstance(found, nn.Embedding) else None


def vocabulary_of(model: Any) -> int:
    """Rows of the embeddings of tokens; 0 where there are none."""
    table = _table(model)
    return 0 if table is None else int(table.weight.shape[0])
