"""A LoRA for llama.cpp: the adapter alone, to be laid over a GGUF of its base (`--lora adapter.gguf`).

Each adapted layer becomes two tensors named after the layer's own, `X.lora_a [r, in]` and `X.lora_b [out, r]`, and one
`adapter.lora.alpha` holds for all: what is added is `alpha / r * b @ a`, so a scaling that is another (rank patterns,
rsLoRA) goes into `b`. Rows of `b` follow those of Llama's queries and keys. A GGUF of the base must hold the same
architecture; tokenizer and template are the base's own there, and lie beside the adapter here as transformers reads them.

What was written is read back by gguf's reader, added to the base's weights in transformers, and compared.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from afina.core.layers import view_of
from afina.errors import CheckpointError, ConfigError, Problems, shortened
from afina.export.format import Settings, Source
from afina.export.gguf import Gguf, architecture_of, converted, gguf_names
from afina.methods.lora import LoRA
from afina.tasks.task import Task
from afina.training.models import find_model

__all__ = ["GgufAdapter"]

FILE = "adapter.gguf"
ALPHA, BASE = "adapter.lora.alpha", "general.base_model.0.name"


class GgufAdapter(Gguf):
    """The adapter's two factors a layer."""

    name = "gguf-adapter"
    title = "the adapter alone, for llama.cpp beside a GGUF of its base (LoRA)"
    merged = False

    def rounds(self, settings: Settings) -> bool:
        """Factors stay float32."""
        return False

    def check_adapter(self, model: Any) -> None:
        """Raise ConfigError naming all of an adapter that is not two factors of a linear layer."""
        problems = Problems(f"--format {self.name}")
        for key, layer in model.adapters.layers.items():
            for adapter in (layer.adapters[name] for name in model.adapters.active if name in layer.adapters):
                if type(adapter) is not LoRA:
                    problems.add(f"{key}: {type(adapter).__name__} is not a LoRA")
                elif adapter.view.kind != "linear" or "lora_bias" in adapter._parameters:
                    problems.add(f"{key}: llama.cpp adds a LoRA to linear layers alone, without a bias of its own")
        if len(problems.found) > 8:
            problems.found[8:] = [f"{len(problems.found) - 8} more are like that"]
        problems.raise_as(ConfigError, "Take --format gguf, which merges whatever can be merged.")

    def write(self, source: Source, folder: Path) -> None:
        """From the run's own adapter, on a base without values."""
        import gguf

        from afina.training.trained import TrainedRun

        trained = TrainedRun.load(source.run)
        self.check_adapter(trained.model)
        adapters, config = trained.model.adapters, trained.model.get_base_model().config
        names = gguf_names(config)
        own = adapters.configs[adapters.active[0]]
        alpha = float(own.lora_alpha)
        writer = gguf.GGUFWriter(folder / FILE, architecture_of(config))
        try:
            writer.add_type("adapter")
            writer.add_name(source.run.name)
            writer.add_string("adapter.type", "lora")
            writer.add_float32(ALPHA, alpha)
            writer.add_base_model_count(1)
            writer.add_base_model_name(0, trained.recipe.model)
            for path, layer in adapters.layers.items():
                adapter: Any = layer.adapters[adapters.active[0]]
                name = names(f"{path}.weight")
                tied = getattr(config, "tie_word_embeddings", False) and name == "output.weight"
                if name is None or tied:
                    why = "its weight is that of the embedding there" if tied else "gguf has no name for it"
                    raise ConfigError(f"--format {self.name}: llama.cpp cannot adapt {path}: {why}; take --format gguf")
                down, up = adapter.lora_A.detach().float(), adapter.lora_B.detach().float()
                up = _rows(path, up * (adapter.scaling * adapter.r / alpha), config)
                writer.add_tensor(f"{name}.lora_a", down.contiguous().numpy())
                writer.add_tensor(f"{name}.lora_b", up.contiguous().numpy())
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()
        trained.task.tokenizer.save_pretrained(folder)

    def load(self, folder: Path, task: Task) -> Any:
        """The base in transformers, with what the file adds in its weights."""
        import gguf

        reader = gguf.GGUFReader(folder / FILE)
        alpha = float(reader.fields[ALPHA].contents())
        found = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
        model = task.load_model(find_model(str(reader.fields[BASE].contents())).path)
        if model.get_input_embeddings().weight.shape[0] < len(task.tokenizer):
            raise CheckpointError(f"{folder / FILE}: the base has fewer rows than the tokenizer has tokens")
        names = gguf_names(model.config)
        with torch.no_grad():
            for path, module in model.named_modules():
                name = names(f"{path}.weight") if path else None
                if name is None or f"{name}.lora_a" not in found:
                    continue
                down, up = found.pop(f"{name}.lora_a"), found.pop(f"{name}.lora_b")
                view = view_of(module)
                delta = _rows(path, up, model.config, back=True) @ down * (alpha / down.shape[0])
                view.write(view.weight() + delta, view.bias())
        if found:
            raise CheckpointError(f"{folder / FILE} adapts what the base does not have: {shortened(found)}")
        ends = task.ends(model) if hasattr(task, "ends") else None
        model.generation_config.eos_token_id = ends
        return model.eval()

    def processor(self, folder: Path, kind: str = "tokenizer") -> Any:
        """Beside the adapter."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(folder)

    def stops(self, model: Any) -> list[int]:
        """Those of the base and the tokenizer."""
        return list(model.generation_config.eos_token_id)

    def tolerance(self, folder: Path, settings: Settings) -> float:
        """Sums in another order."""
        return 1e-4


def _rows(path: str, up: torch.Tensor, config: Any, *, back: bool = False) -> torch.Tensor:
    """Rows of `b [out, r]` in the order that the layer's rows have in a GGUF, or back; transposed layers are plain here."""
    if config.model_type not in ("llama", "mistral"):
        return up
    if not back:
        return converted(f"{path}.weight", up, config)
    order = converted(f"{path}.weight", torch.arange(len(up))[:, None], config)[:, 0]
    return up[order.argsort()]
