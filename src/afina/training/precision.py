"""Chooses the precision of the arithmetic for the device that is there (T45).

Trained weights are float32 whatever is chosen; autocast computes in the 16-bit type. bf16 pays where the processor
multiplies it natively; fp16 on a CPU runs at a hundredth of the speed of fp32.
"""

from __future__ import annotations

import torch

from afina.errors import ConfigError

__all__ = ["choose_precision", "slow_precision"]


def choose_precision(asked: str, device: torch.device) -> str:
    """`fp32`, `bf16` or `fp16`; raises ConfigError for one that the device does not do."""
    if device.type == "cpu":
        if asked == "fp16":
            raise ConfigError(
                f"precision=fp16: a CPU computes it at a hundredth of the speed of fp32; use {_cpu_best()}, or auto"
            )
        return _cpu_best() if asked == "auto" else asked
    native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if asked == "bf16" and not native:
        other = "fp16" if device.type == "cuda" else "fp32"
        raise ConfigError(f"precision=bf16: this {device.type} device does not do it; use {other}")
    if asked == "auto":
        return "bf16" if native else "fp32"
    return asked


def slow_precision(precision: str, device: torch.device) -> list[str]:
    """What to tell of a precision that the device does by detours."""
    if device.type != "cpu" or precision != "bf16" or _cpu_best() == "bf16":
        return []
    return ["this processor has no arithmetic in bf16 and gets it by detours, at a fraction of the speed of fp32"]


def _cpu_best() -> str:
    tests = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return "bf16" if any(test() for name in tests if (test := getattr(torch.cpu, name, None)) is not None) else "fp32"
