"""DoRA: weight decomposed into direction and magnitude. W' = m * (W + s B A) / ||W + s B A||, the norm taken per output.

Liu et al. 2024, https://arxiv.org/abs/2402.09353. Cost over LoRA: one norm of the whole weight a layer and step; the norm
is a constant in backward (section 4.3 of the paper), so nothing weight-sized is kept. The activation form needs one call
of the base: y = f (base(x) + delta(x)) + b - f b with f = m / norm, two passes over the output. For an
embedding the norm is taken per dimension over all rows. Dropout acts on the input of the low-rank product, as in LoRA.
"""

from __future__ import annotations

import torch

from afina.core.adapter import Base, Weights, cast
from afina.core.registry import register
from afina.methods.lora import LoRA, LoraConfig

__all__ = ["DoRA"]


@register(
    "dora",
    config=LoraConfig,
    trains="a low-rank matrix and a magnitude for each output",
    cost="LoRA and a norm of each weight a step; none when merged",
    paper="https://arxiv.org/abs/2402.09353",
    when=lambda config: config.use_dora,
    use_dora=True,
)
class DoRA(LoRA):
    kinds = frozenset({"linear", "conv", "embedding"})

    def build(self, config: LoraConfig) -> None:
        super().build(config)
        self.checkpoint_keys = {**self.checkpoint_keys, "magnitude": "lora_magnitude_vector"}
        out = self.view.out_features
        self.parameter("magnitude", (1, out, *self._conv((1, 1))[2:]) if self.view.kind == "conv" else (out,))

    @torch.no_grad()
    def reset(self, config: LoraConfig) -> None:
        super().reset(config)
        self.magnitude.copy_(self._norm(self.view.weight()).reshape(self.magnitude.shape))

    def _norm(self, weight: torch.Tensor) -> torch.Tensor:
        """Norm of each row of W + s B A `[out]`, in the adapter's dtype, without gradient."""
        with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
            weight, up, down = weight.to(self.dtype), self.lora_B.flatten(1), self.lora_A.flatten(1)
            if weight.is_contiguous():
                return torch.addmm(weight, up, down, alpha=self.scaling).norm(dim=1)
            changed = torch.addmm(weight.T, down.T, up.T, alpha=self.scaling)  # as it lies in memory
            return changed.square_().sum(0).sqrt_()

    def forward(self, x: torch.Tensor, base: Base) -> torch.Tensor:
        y = self.add_to(base(x), x)
        weight, bias = base.weights()  # after the layer has computed: ZeRO-3 takes them away when it has
        factor = cast(self.magnitude.flatten() / self._norm(weight), y)
        if bias is None:
            return y * self.view.per_feature(factor, y)
        bias = cast(bias, y)
        rest = bias - factor * bias  # the bias is not scaled
        return torch.addcmul(self.view.per_feature(rest, y), y, self.view.per_feature(factor, y))

    def values_kept(self, rows: int) -> int:
        return rows * (self.view.in_features + self.r + self.view.out_features) + 3 * self.view.out_features

    def merge_into(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Weights:
        factor = self.magnitude.flatten() / self._norm(weight)
        return (weight + LoRA.delta_weight(self).to(weight.dtype)) * factor.to(weight.dtype).unsqueeze(-1), bias
