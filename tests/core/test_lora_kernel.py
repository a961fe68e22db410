"""The kernels of LoRA's dropout in Triton's interpreter, compiled, and on a card where one is; what is done without them."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from afina.core import lowrank
from afina.core.dropout import keep_mask
from afina.core.lora_dropout import LoraDropout
from afina.core.lowrank import LowRank, low_rank_linear

CHECKS = Path(__file__).with_name("kernel_checks.py")
NAMES = [node.name for node in ast.parse(CHECKS.read_text(encoding="utf-8")).body
         if isinstance(node, ast.FunctionDef) and node.name.startswith("check_")]  # fmt: skip


@pytest.fixture(scope="module")
def interpreted() -> dict[str, str]:
    """What went wrong in each check; the interpreter has to be asked for before Triton is first imported."""
    pytest.importorskip("triton")
    env = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, str(CHECKS)], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)  # type: ignore[no-any-return]


@pytest.mark.xdist_group("lora_kernel")
@pytest.mark.parametrize("name", NAMES)
def test_in_the_interpreter(name: str, interpreted: dict[str, str]) -> None:
    assert not interpreted[name], interpreted[name]


@pytest.mark.xdist_group("lora_kernel")
def test_the_kernels_compile_for_cards_that_are_not_here(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    code = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from afina.core import lora_kernel as use
same = {"keep": 62259, "r": 8, "padded": 16, "high": 32, "wide": 64, "precision": "ieee", "widen": False}
for kernel in (use._product, use._product_gradient, use._add_product, use._keep_mask):
    names = kernel.arg_names
    known = {n: v for n, v in same.items() if n in names}
    types = {"seeds": "*i64", "kept": "*i1", "rows": "i32", "columns": "i32", "stride": "i32", "each": "i32"}
    types |= {"z": "*fp32", "made": "*fp32"}
    signature = {n: "constexpr" if n in known else types.get(n, "*bf16") for n in names}
    source = ASTSource(fn=kernel, signature=signature, constexprs={(names.index(n),): v for n, v in known.items()})
    for capability in (80, 90):
        made = compile(source, target=GPUTarget("cuda", capability, 32))
        print("mma.sync" in made.asm["ptx"], len(made.asm["cubin"]) > 1000)
"""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["True True"] * 6 + ["False True"] * 2  # tensor cores, but for the mask alone


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_on_a_card_both_ways_learn_the_same(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    found = []
    for times in ([2.0, 1.0], [1.0, 2.0]):  # of the mask, of the seed: the last is measured first
        monkeypatch.setattr(lowrank, "DROPOUT", way := LoraDropout("cuda", lambda _, times=times: times.pop()))  # type: ignore
        torch.manual_seed(3)
        x, weight, down, up = (
            torch.randn(*s, device="cuda", dtype=dtype) for s in ((130, 515), (67, 515), (37, 515), (67, 37))
        )
        inputs = [t.requires_grad_() for t in (x, down, up)]
        torch.manual_seed(5)
        y = low_rank_linear(x, LowRank(weight, None, down, up, None, 0.7, 0.3))
        assert not any(w.reason for w in way.ways.values())
        found.append([y.detach(), *torch.autograd.grad((y * y).sum(), inputs)])
    bound = {torch.float32: 1e-5, torch.float16: 6e-3, torch.bfloat16: 6e-2}[dtype]
    for a, b in zip(*found, strict=True):
        assert float((a - b).abs().max()) <= bound * float(b.abs().max())


# --- the choice


def never(work: Any) -> float:
    raise AssertionError("nothing is to be measured")


def test_t35_without_triton_torch_draws_and_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    import afina.core

    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "afina.core.lora_kernel", raising=False)
    monkeypatch.delattr(afina.core, "lora_kernel", raising=False)
    way, x = LoraDropout("cpu", never), torch.ones(7, 11)
    for _ in range(2):
        torch.manual_seed(0)
        kept, factor = way.kept(x, 4, 0.3)
        torch.manual_seed(0)
        expected, same = keep_mask(x, 0.3)
        assert torch.equal(kept, expected)
        assert factor == same
    (said,) = way.said()
    assert said.startswith("LoRA's dropout keeps a mask for backward in 1 of 1 sizes: Triton cannot be imported (")


@pytest.mark.parametrize(
    "x", [torch.ones(7, 11, dtype=torch.float64), torch.ones(0, 11), torch.ones(7, 11, device="meta")], ids=str
)
def test_it_stays_out(x: torch.Tensor) -> None:
    way = LoraDropout("cpu" if x.is_cpu else "cuda", never)
    kept, _ = way.kept(x, 4, 0.3)
    assert kept.dtype is torch.bool
    assert kept.shape == x.shape
    assert not way.said()
