"""Dropout before LoRA's product: a mask that is kept for backward, or, on a card where that is faster, a seed of 8 bytes.

With the seed kernels (`lora_kernel.py`) draw the mask while they read x, and draw it again in backward. Whether that is
faster is measured: on the first meeting of a type, a width, a rank and a number of rows (to the next power of two) both
ways do the work of one pass, forward and backward, and the faster is used from then on. Both drop the same values, so that
the choice changes time and memory alone. The seed comes from torch's generator of the card: a seeded, resumed or recomputed
pass draws the same mask. What was found is told once a run (T35).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from afina.core.dropout import keep_mask, keep_steps

__all__ = ["DROPOUT", "LoraDropout", "is_seed", "kernels"]

_TYPES = (torch.float16, torch.bfloat16, torch.float32)
_SHOWN = 3  # sizes that are told with their times
_SAMPLES, _CALLS = 5, 4


class _Size(NamedTuple):
    """What the time depends on."""

    device: torch.device
    dtype: torch.dtype
    width: int
    rank: int
    rows: int  # at most

    def said(self) -> str:
        return f"{self.width:,} to {self.rank} in {str(self.dtype).removeprefix('torch.')}, up to {self.rows:,} rows"


class _Way(NamedTuple):
    """Seconds of forward and backward with a mask and with a seed, or why the kernels cannot be used."""

    mask: float = 0.0
    seed: float = 0.0
    reason: str = ""

    @property
    def seeded(self) -> bool:
        return not self.reason and self.seed < self.mask


def _on_card(work: Callable[[], Any]) -> float:
    """Seconds that a call takes on the card: the least of several."""
    for _ in range(2):
        work()
    samples = []
    for _ in range(_SAMPLES):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(_CALLS):
            work()
        end.record()
        end.synchronize()
        samples.append(begin.elapsed_time(end) / 1000 / _CALLS)
    return min(samples)


class LoraDropout:
    """Chooses for tensors on a device of type `device`. `seconds` measures a piece of work that is called again and again;
    what needs no kernel is done without importing Triton."""

    def __init__(self, device: str = "cuda", seconds: Callable[[Callable[[], Any]], float] = _on_card):
        self.device, self.seconds = device, seconds
        self.ways: dict[_Size, _Way] = {}
        self.met: set[_Size] = set()  # since somebody last emptied it

    def kept(self, x: torch.Tensor, rank: int, p: float) -> tuple[torch.Tensor, float]:
        """What x `[rows, in]` keeps: a mask (bool, the shape of x), or a seed (int64 `[1]`) for the kernels; and the factor
        that makes up for what is dropped. `rank` is that of the product."""
        if x.device.type != self.device or type(x) not in (torch.Tensor, torch.nn.Parameter) or not x.numel():
            return keep_mask(x, p)
        if x.dtype not in _TYPES:
            return keep_mask(x, p)
        size = _Size(x.device, x.dtype, x.shape[1], rank, 1 << (len(x) - 1).bit_length())
        way = self.ways.get(size)
        if way is None:
            if x.is_cuda and torch.cuda.is_current_stream_capturing():  # nothing can be measured
                return keep_mask(x, p)
            way = self.ways[size] = self._measured(x, rank, p)
        self.met.add(size)
        if way.reason:
            return keep_mask(x, p)
        seed = torch.empty(1, dtype=torch.int64, device=x.device).random_()
        return (seed if way.seeded else kernels().keep_mask(seed, *x.shape, p)), keep_steps(p)[1]

    def _measured(self, x: torch.Tensor, rank: int, p: float) -> _Way:
        """Both ways timed on x as it is, without a draw from torch's generator. What is found lasts, whatever it is: a pass
        that is recomputed has to keep what the first kept."""
        seed = torch.ones(1, dtype=torch.int64, device=x.device)
        try:
            use = kernels()
            if rank > use.MOST_RANKS:
                return _Way(reason=f"ranks above {use.MOST_RANKS} have no kernel")
            with torch.no_grad():
                d_z, down, d_x = x.new_ones(len(x), rank), x.new_ones(rank, x.shape[1]), torch.zeros_like(x)

                def by_seed() -> None:
                    use.product(x, down, seed, p)
                    use.product_gradient(d_z, x, seed, p)
                    use.add_product(d_x, d_z, down, seed, p)

                def by_mask() -> None:
                    kept = use.keep_mask(seed, *x.shape, p)
                    kept.view(torch.uint8).to(x.dtype).mul_(x).mm(down.t())
                    number = kept.view(torch.uint8).to(x.dtype)
                    d_z.t().mm(x * number)
                    d_x.addcmul_(d_z.mm(down), number)

                return _Way(seed=self.seconds(by_seed), mask=self.seconds(by_mask))
        except ImportError as error:
            return _Way(reason=f"Triton cannot be imported ({error})")
        except torch.OutOfMemoryError:
            return _Way(reason="memory was too full to time the kernels")
        except Exception as error:  # whatever a compiler, a driver or a full card may say: told, and done without
            return _Way(reason=f"the kernels do not run: {type(error).__name__}: {' '.join(str(error).split())[:200]}")

    def said(self) -> list[str]:
        """What was used in the sizes that were met, as sentences."""
        ways = {size: self.ways[size] for size in sorted(self.met, key=str)}
        reasons = sorted({way.reason for way in ways.values() if way.reason})
        lines = [f"LoRA's dropout keeps a mask for backward in {sum(w.reason == r for w in ways.values())} of {len(ways)} "
                 f"sizes: {r}" for r in reasons]  # fmt: skip
        for seeded in (True, False):
            chosen = [(s, w) for s, w in ways.items() if not w.reason and w.seeded is seeded]
            if not chosen:
                continue
            times = [f"{s.said()}: {1e3 * w.seed:.3g} ms for {1e3 * w.mask:.3g}" for s, w in chosen[:_SHOWN]]
            more = "" if len(chosen) <= _SHOWN else f"; and {len(chosen) - _SHOWN} more"
            what = (
                "is drawn again in backward by kernels, which are faster than to keep a mask,"
                if seeded else "keeps a mask for backward, which kernels that draw it again would not make faster,"
            )  # fmt: skip
            lines.append(f"LoRA's dropout {what} in {len(chosen)} of {len(ways)} sizes ({'; '.join(times)}{more})")
        return lines


DROPOUT = LoraDropout()


def is_seed(kept: torch.Tensor | None) -> bool:
    """Whether it stands for a mask that the kernels draw."""
    return kept is not None and kept.dtype is torch.int64


def kernels() -> Any:
    """`lora_kernel`, which takes Triton to import."""
    from afina.core import lora_kernel

    return lora_kernel
