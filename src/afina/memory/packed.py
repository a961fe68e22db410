"""Checkpoints that were quantised before by GPTQ, AWQ or HQQ, as bases to train adapters on.

Each linear layer of which the checkpoint holds packed integers becomes a `PackedLinear`, into which transformers then loads
the file's tensors; everything else is loaded as ever. No other library is needed.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from afina.core.codecs.packed import PackedLinear
from afina.core.initialise import FloatWeights
from afina.errors import ConfigError

__all__ = ["PACKED", "load_packed"]

PACKED = ("gptq", "awq", "hqq")
_LEAF = {"gptq": "qweight", "awq": "qweight", "hqq": "W_q"}  # what the packed integers are called
_OWN = "afina_packed"


def load_packed(auto: Any, path: str, weights: str, dtype: torch.dtype, **settings: Any) -> tuple[Any, dict[str, Any]]:
    """A model of one of transformers' Auto classes with its linear layers as the checkpoint stores them, and what loading
    found. `dtype` is that of the rest. Raises ConfigError for a variant of the format that afina does not read."""
    from transformers import AutoConfig

    from afina.memory.loading import device_of_process, tensor_by_tensor

    config = AutoConfig.from_pretrained(path, **settings)
    said = config.quantization_config
    layout = _layout(weights, said if isinstance(said, dict) else said.to_dict())
    _let_in()
    config.quantization_config = {"quant_method": _OWN, "layout": layout}
    renamed = {rf"\.{_LEAF[weights]}$": ".weight"}
    if weights == "hqq":
        renamed |= {r"\.scale$": ".scales", r"\.zero$": ".qzeros"}
    with tensor_by_tensor():
        return auto.from_pretrained(  # type: ignore[no-any-return]
            path, config=config, output_loading_info=True, ignore_mismatched_sizes=True, dtype=dtype, key_mapping=renamed,
            device_map={"": device_of_process()},
        )  # fmt: skip


def _layout(weights: str, said: dict[str, Any]) -> dict[str, Any]:
    """How the integers lie, as the checkpoint's configuration says; raises ConfigError for what is not read."""
    if weights == "hqq":
        inner = said.get("quant_config", {})
        inner = inner.get("weight_quant_params", inner)
        known = inner.get("nbits") in (4, 8) and inner.get("axis", 1) == 1 and not inner.get("quant_zero")
        found = f"nbits={inner.get('nbits')}, axis={inner.get('axis')}"
        layout = {"kind": weights, "bits": inner.get("nbits"), "group_size": inner.get("group_size")}
    elif weights == "awq":
        known = said.get("bits", said.get("w_bit")) == 4 and str(said.get("version", said.get("format", "gemm"))) == "gemm"
        found = f"bits={said.get('bits')}, version={said.get('version')}"
        layout = {"kind": weights, "bits": 4, "group_size": said.get("group_size", said.get("q_group_size", 128))}
    else:
        version = str(said.get("checkpoint_format", "gptq"))
        known = said.get("bits") in (2, 4, 8) and version in ("gptq", "gptq_v2")
        found = f"bits={said.get('bits')}, checkpoint_format={version}"
        layout = {"kind": weights, "bits": said.get("bits"), "group_size": said.get("group_size", 128)}
        layout["less_one"] = version == "gptq"
    if not known:
        raise ConfigError(
            f"this {weights} checkpoint has {found}; afina reads gptq of 2, 4 and 8 bits, awq of 4 bits in version gemm, "
            "and hqq of 4 and 8 bits in groups along the inputs. Take the checkpoint in 16 bits, and memory.weights=nf4"
        )
    return layout


@functools.cache
def _let_in() -> None:
    """Make known to transformers the configuration and the quantiser that puts these layers in."""
    from transformers.quantizers.auto import register_quantization_config, register_quantizer
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    @register_quantization_config(_OWN)
    class PackedConfig(QuantizationConfigMixin):  # type: ignore[misc]
        def __init__(self, layout: dict[str, Any], quant_method: Any = _OWN):
            self.quant_method, self.layout = quant_method, layout

    @register_quantizer(_OWN)
    class PackedQuantizer(HfQuantizer):  # type: ignore[misc]
        requires_calibration = True

        def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
            _replace(model, self.quantization_config.layout)

        def is_serializable(self) -> bool:
            return False

        @property
        def is_trainable(self) -> bool:
            return True


def _replace(model: Any, layout: dict[str, Any]) -> None:
    """Put a `PackedLinear` in the place of every linear layer of which the checkpoint holds packed integers."""
    stored, leaf, count = FloatWeights(model, f"memory.weights={layout['kind']}"), _LEAF[layout["kind"]], 0
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and stored.name_of(name, leaf) is not None:
            with torch.device("meta"):
                made = PackedLinear(module.in_features, module.out_features, bias=module.bias is not None, **layout)
            model.set_submodule(name, made)
            count += 1
    if not count:
        raise ConfigError(
            f"{stored.name} says that it is stored as {layout['kind']}, and holds no packed integers of a linear layer of "
            f"{type(model).__name__}"
        )
