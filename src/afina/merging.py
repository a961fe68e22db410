"""Adapters of a model merged into its weights, or combined into one adapter, with what that costs measured and said."""

from __future__ import annotations

import copy
import logging
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from afina.core.combine import combine
from afina.core.dequantise import dequantised
from afina.core.merge_error import MAX_ERROR, Outputs, difference, merge_error, outputs_of
from afina.errors import ConfigError
from afina.folders import AdapterFolders

__all__ = ["AdapterMerging"]

logger = logging.getLogger("afina")


class AdapterMerging(AdapterFolders):
    """The part of an adapted model that combines and merges adapters."""

    from_pretrained: Any

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "linear",
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = True,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: str = "total",
    ) -> float:
        """Add an adapter that adds the weighted combination of what others add.

        Returns the relative error of truncation to `svd_rank`, 0.0 when the combination is exact. `svd_clamp` is not
        done; `svd_full_matrices` and `svd_driver` have no bearing on the result.
        """
        if svd_clamp is not None:
            raise ConfigError("svd_clamp: clamping singular vectors changes the result by an unknown amount; leave it out")
        error = combine(
            self.adapters, adapters, weights, adapter_name, combination_type, svd_rank, density, majority_sign_method
        )
        if error > 1e-6:
            logger.warning(
                "adapter %r: cutting the combination to its rank leaves a relative error of %.2g", adapter_name, error
            )
        return error

    def merge_adapter(
        self,
        adapter_names: Sequence[str] | None = None,
        safe_merge: bool = False,
        *,
        max_error: float = MAX_ERROR,
        batches: Iterable[Mapping[str, torch.Tensor]] = (),
        outputs: Outputs | None = None,
    ) -> None:
        """Put adapters into the base's weights; `unmerge_adapter` gives back the stored bits. Values are always checked
        to be finite, so `safe_merge` changes nothing.

        Where weights are stored in 8 or 4 bits, what rounding takes is measured first and shown, on the outputs for
        `batches` where there are some (see `merge_error`). Raises MergeError where it is more than `max_error` of what the
        adapter does (T17).
        """
        self._measured(adapter_names, max_error, batches, outputs)
        self.adapters.merge(adapter_names)

    def _measured(self, names: Sequence[str] | None, max_error: float, batches: Any, outputs: Outputs | None) -> None:
        report = merge_error(self, batches, names=names, outputs=outputs)
        report.check(max_error)
        if report.layers:
            logger.warning("merging into %s weights rounds them\n%s", report.storages, report)

    def unmerge_adapter(self) -> None:
        """Undo every merge, bit for bit."""
        self.adapters.unmerge()

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: Sequence[str] | None = None,
        *,
        base: str | Path | nn.Module = "stored",
        dtype: torch.dtype | None = None,
        max_error: float = MAX_ERROR,
        batches: Iterable[Mapping[str, torch.Tensor]] = (),
        outputs: Outputs | None = None,
    ) -> Any:
        """The base model with adapters merged into its weights and all wrappers gone.

        `base` says into which weights (T18), where they are quantised:
        "stored"       those that are there, rounded again; measured and refused as `merge_adapter` does (T17)
        "dequantised"  the floating-point values they stand for, in `dtype`: answers as the adapter was trained
        a folder, hub id or model: those from before quantisation, in `dtype` or their own; this model keeps its adapters.
        With `batches` the outputs of the merged model are compared with this model's, and the difference is shown.
        """
        batches = list(batches)
        if base == "stored":
            self._measured(adapter_names, max_error, batches, outputs)
            self.adapters.unmerge()
            self.adapters.merge(adapter_names, keep=False)
            return self.adapters.unload()
        self.adapters.unmerge()
        names = list(adapter_names or self.adapters.active)
        before = outputs_of(self, batches, outputs, names=names) if batches else None
        if base == "dequantised":
            dequantised(self.get_base_model(), dtype)
            self.adapters.merge(names, keep=False)
            merged = self.adapters.unload()
        else:
            merged = self._on(base, dtype, names).merge_and_unload(adapter_names=names)
        if before is not None:
            said = difference(outputs_of(merged, batches, outputs), before)
            logger.warning("merged onto base=%s, beside the model as it was trained: %s", _named(base), said)
        return merged

    def _on(self, base: str | Path | nn.Module, dtype: torch.dtype | None, names: Sequence[str]) -> Any:
        """The same adapters around another copy of the base; raises BaseMismatchError where it is another base."""
        if not isinstance(base, nn.Module):
            own: Any = self.get_base_model()
            config = copy.deepcopy(own.config)
            if getattr(config, "quantization_config", None) is not None:
                del config.quantization_config
            base = type(own).from_pretrained(base, config=config, dtype=dtype or "auto", ignore_mismatched_sizes=True)
        elif dtype is not None:
            base = base.to(dtype)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, selected_adapters=names)
            places = {name: folder if name == "default" else str(Path(folder) / name) for name in names}
            moved = self.from_pretrained(base, places[names[0]], names[0])
            for name in names[1:]:
                moved.load_adapter(places[name], name)
        moved.set_adapter(names, inference_mode=True)
        return moved

    def unload(self) -> Any:
        """The base model without adapters."""
        self.adapters.unmerge()
        return self.adapters.unload()


def _named(base: Any) -> str:
    return type(base).__name__ if isinstance(base, nn.Module) else str(base)
