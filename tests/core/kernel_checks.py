"""What `test_lora_kernel.py` has run in a process of its own, where Triton interprets its kernels on a CPU.

TRITON_INTERPRET=1 python kernel_checks.py       prints, as JSON, what went wrong in each check, "" where nothing did
"""

from __future__ import annotations

import itertools
import json
import sys
import traceback
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from afina.core import lora_dropout, lowrank
from afina.core.lora_dropout import LoraDropout, is_seed
from afina.core.lowrank import LowRank, low_rank_linear

CLOSE = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}  # of the largest value
SHAPES = ((37, 101, 5), (1, 8, 1), (67, 131, 37), (130, 29, 16))  # rows, in, rank


def tensors(dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    torch.manual_seed(3)
    return [torch.randn(*shape).to(dtype) for shape in shapes]


def near(found: torch.Tensor, expected: torch.Tensor, bound: float) -> None:
    difference = (found.double() - expected.double()).abs().max()
    assert found.shape == expected.shape
    assert difference <= bound * expected.double().abs().max(), float(difference)


def seed(value: int = 123_456_789_012_345) -> torch.Tensor:
    return torch.tensor([value])


def check_products_are_those_of_the_mask_that_is_drawn() -> None:
    use = lora_dropout.kernels()
    for dtype, (rows, width, r) in itertools.product(CLOSE, SHAPES):
        x, down, d_z, to = tensors(dtype, (rows, width), (r, width), (rows, r), (rows, width))
        mask = use.keep_mask(seed(), rows, width, 0.3)
        seen, bound = x.double() * mask, CLOSE[dtype]
        near(use.product(x, down, seed(), 0.3), seen @ down.double().t(), bound)
        near(use.product_gradient(d_z, x, seed(), 0.3), d_z.double().t() @ seen, bound)
        expected = to.double() + d_z.double() @ down.double() * mask
        near(use.add_product(to, d_z, down, seed(), 0.3), expected, bound)


def check_rows_may_lie_apart_and_columns_too() -> None:
    use = lora_dropout.kernels()
    whole, down, d_z = tensors(torch.float32, (41, 53), (3, 17), (41, 3))
    for x in (whole[:, 5:22], whole.t()[:41, :17]):
        own = x.contiguous()
        assert not x.is_contiguous()
        d = d_z[: len(x)]
        assert torch.equal(use.product(x, down, seed(), 0.1), use.product(own, down, seed(), 0.1))
        assert torch.equal(use.product_gradient(d, x, seed(), 0.1), use.product_gradient(d, own, seed(), 0.1))
    to, expected = whole.clone(), whole.clone()
    use.add_product(to[:, 5:22], d_z, down, seed(), 0.1)
    expected[:, 5:22] = use.add_product(whole[:, 5:22].clone(), d_z, down, seed(), 0.1)
    assert torch.equal(to, expected)


def check_the_mask_drops_its_share_and_bits_are_independent() -> None:
    use = lora_dropout.kernels()
    for p in (0.05, 0.5):
        mask = use.keep_mask(seed(), 128, 512, p).double()
        deviation = (p * (1 - p) / mask.numel()) ** 0.5
        assert abs(float(mask.mean()) - (1 - p)) < 4 * deviation + 2**-16
        lanes = mask.view(-1, 8)  # the values that share one draw
        assert float((lanes.mean(0) - (1 - p)).abs().max()) < 12 * deviation
        assert float((torch.corrcoef(lanes.t()) - torch.eye(8)).abs().max()) < 0.05
        other = use.keep_mask(seed(7), 128, 512, p).double()
        assert abs(float(torch.corrcoef(torch.stack([mask.flatten(), other.flatten()]))[0, 1])) < 0.02
        assert abs(float(torch.corrcoef(torch.stack([mask[:-1].flatten(), mask[1:].flatten()]))[0, 1])) < 0.02
    assert not use.keep_mask(seed(), 3, 11, 1.0).any()
    assert torch.equal(use.keep_mask(seed(), 3, 11, 0.5), use.keep_mask(seed(), 64, 96, 0.5)[:3, :11])  # place alone counts


def chosen(seeded: bool) -> LoraDropout:
    """On the CPU, with a clock by which one way is the faster."""
    times = iter([1.0, 2.0] if seeded else [2.0, 1.0])

    def clock(work: Any) -> float:
        work()
        return next(times)

    return LoraDropout("cpu", clock)


def passed(way: LoraDropout, dtype: torch.dtype, again: bool = False) -> tuple[list[torch.Tensor], list[Any]]:
    """Output and gradients of the node, and what it kept."""
    lowrank.DROPOUT = way
    x, weight, down, up = tensors(dtype, (3, 13, 29), (31, 29), (5, 29), (31, 5))
    for tensor in (x, down, up):
        tensor.requires_grad_()
    layer, packed = LowRank(weight, None, down, up, None, 0.7, 0.3), list[Any]()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
        torch.manual_seed(11)
        y = checkpoint(low_rank_linear, x, layer, use_reentrant=False) if again else low_rank_linear(x, layer)
    return [y.detach(), *torch.autograd.grad((y * y).sum(), (x, down, up))], packed


def check_both_ways_learn_the_same() -> None:
    for dtype, bound in CLOSE.items():
        by_seed, kept = passed(chosen(True), dtype)
        by_mask, kept_of_mask = passed(chosen(False), dtype)
        assert any(is_seed(t) for t in kept)
        assert not any(t.dtype is torch.bool for t in kept)
        assert any(t.dtype is torch.bool for t in kept_of_mask)
        for found, expected in zip(by_seed, by_mask, strict=True):
            near(found, expected, 3 * bound)


def check_a_recomputed_pass_draws_the_same() -> None:
    """Also where the first pass is the one in which the ways are measured."""
    expected, _ = passed(chosen(True), torch.float32)
    for found, wanted in zip(passed(chosen(True), torch.float32, again=True)[0], expected, strict=True):
        assert torch.equal(found, wanted)


def check_a_seeded_pass_repeats_and_the_next_differs() -> None:
    way = chosen(True)
    first, _ = passed(way, torch.float32)
    again, _ = passed(way, torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    one, _ = way.kept(torch.ones(39, 29), 5, 0.3)
    two, _ = way.kept(torch.ones(39, 29), 5, 0.3)
    assert is_seed(one)
    assert not torch.equal(one, two)


def check_second_derivatives_are_those_of_the_mask() -> None:
    found = []
    for seeded in (True, False):
        lowrank.DROPOUT = chosen(seeded)
        x, weight, down, up = tensors(torch.float32, (7, 5), (3, 5), (2, 5), (3, 2))
        inputs = [t.requires_grad_() for t in (x, down, up)]
        torch.manual_seed(0)
        y = low_rank_linear(x, LowRank(weight, None, down, up, None, 0.7, 0.4))
        first = torch.autograd.grad((y**2).sum(), inputs, create_graph=True)
        found.append(torch.autograd.grad(sum((g**2).sum() for g in first), inputs))
    for a, b in zip(*found, strict=True):
        near(a, b, 1e-5)


def clock(*times: float) -> Any:
    """Which tells, in turn, what a piece of work took."""
    told = iter(times)
    return lambda work: next(told)


def check_the_faster_is_used_from_then_on() -> None:
    way = LoraDropout("cpu", clock(0.001, 0.003, 0.007, 0.002))
    for rows in (33, 64, 50):  # one size, to the next power of two
        kept, factor = way.kept(torch.ones(rows, 11), 4, 0.5)
        assert is_seed(kept)
        assert factor == 2.0
    for rows in (65, 128):
        kept, _ = way.kept(torch.ones(rows, 11), 4, 0.5)
        assert kept.dtype is torch.bool
        assert kept.shape == (rows, 11)
    assert way.said() == [
        "LoRA's dropout is drawn again in backward by kernels, which are faster than to keep a mask, in 1 of 2 sizes "
        "(11 to 4 in float32, up to 64 rows: 1 ms for 3)",
        "LoRA's dropout keeps a mask for backward, which kernels that draw it again would not make faster, in 1 of 2 sizes "
        "(11 to 4 in float32, up to 128 rows: 7 ms for 2)",
    ], way.said()
    way.met.clear()
    assert way.said() == []


def check_t35_what_does_not_run_is_told_and_done_without() -> None:
    def broken(work: Any) -> float:
        raise ValueError("no\n compiler")

    way = LoraDropout("cpu", broken)
    for rank in (4, 257):
        assert way.kept(torch.ones(7, 11), rank, 0.3)[0].dtype is torch.bool
    assert way.said() == [
        f"LoRA's dropout keeps a mask for backward in 1 of 2 sizes: {reason}"
        for reason in ("ranks above 256 have no kernel", "the kernels do not run: ValueError: no compiler")
    ], way.said()


def check_without_room_to_measure_a_recomputed_pass_still_draws_the_same() -> None:
    """There may be room by then."""

    def full(work: Any) -> float:
        way.seconds = clock(1.0, 2.0)
        raise torch.OutOfMemoryError("full")

    found = []
    for again in (False, True):
        way = LoraDropout("cpu", full)
        found.append(passed(way, torch.float32, again)[0])
        assert not is_seed(way.kept(torch.ones(39, 29), 5, 0.3)[0])
        assert [w.reason for w in way.ways.values()] == ["memory was too full to time the kernels"]
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def check_the_arithmetic_of_float32_is_as_torch_is_told() -> None:
    """By the newer name or the older switch, of which torch lets only the newer be read once both were used."""
    use, own, x = lora_dropout.kernels(), torch.backends.cuda.matmul, torch.ones(3, 5)
    for fast in (True, False):
        own.allow_tf32 = fast
        assert use._arithmetic(x)["precision"] == ("tf32" if fast else "ieee")
    if getattr(own, "fp32_precision", None) is not None:
        for named in ("tf32", "ieee"):
            own.fp32_precision = named
            assert use._arithmetic(x)["precision"] == named
            assert use._arithmetic(x.half())["precision"] == "ieee"


def main() -> None:
    said = {}
    for name, check in globals().copy().items():
        if name.startswith("check_"):
            try:
                check()
                said[name] = ""
            except Exception:
                said[name] = traceback.format_exc()
    json.dump(said, sys.stdout)


if __name__ == "__main__":
    main()
