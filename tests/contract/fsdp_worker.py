"""Run by torchrun: gradients of every method under FSDP2 against those of one process. Prints one line a method."""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch
import torch.distributed as dist
from architectures import build
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import afina
from afina.core.registry import get_method, methods

OPTIONS: dict[str, dict[str, Any]] = {
    "prompt_tuning": {"num_virtual_tokens": 3},
    "prefix_tuning": {"num_virtual_tokens": 3},
    "p_tuning": {"num_virtual_tokens": 3},
    "trainable_tokens": {"token_indices": [7, 9, 40]},
}


def main() -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    rank, mesh = dist.get_rank(), init_device_mesh("cpu", (2,))
    wrong = []
    for name in methods():
        base, inputs, task = build("gpt2")
        torch.manual_seed(3)
        model = afina.get_peft_model(base, get_method(name).make_config(task_type=task, **OPTIONS.get(name, {})))
        with torch.no_grad():
            for adapter in model.adapters.adapters("default"):
                for parameter in adapter.parameters():
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        model.eval()  # dropout off; gradients flow all the same
        alone = copy.deepcopy(model)
        inputs = {k: torch.cat([v, v[:1]]) for k, v in inputs.items()}
        alone(**inputs).loss.backward()
        for block in model.get_base_model().transformer.h:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        mine = {k: v[2 * rank : 2 * rank + 2] for k, v in inputs.items()}
        model(**mine).loss.backward()
        expected = {n: p.grad for n, p in alone.named_parameters() if p.grad is not None}
        found: dict[str, torch.Tensor] = {}
        for n, p in model.named_parameters():
            if p.grad is not None:
                found[n] = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
        same = found.keys() == expected.keys() and all(torch.allclose(found[n], g, atol=1e-5) for n, g in expected.items())
        if rank == 0:
            print(f"{name} {'equal' if same and expected else 'DIFFERENT'}", flush=True)
        if not same:
            wrong.append(name)
    dist.destroy_process_group()
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
