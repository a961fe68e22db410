"""ONNX, for onnxruntime and whatever else reads it: any batch, any length, and the task's own answers beside the scores.

Inputs are `input_ids`, `attention_mask` and, where the tokenizer makes them, `token_type_ids`, each int64 `[rows, tokens]`;
of pictures `pixel_values`, float32 `[rows, channels, height, width]`, at the size that the image processor makes; of
recordings what the feature extractor makes, samples of any length with their mask or frames of one size; of
documents `bbox` too, `[rows, tokens, 4]`.
Outputs are what the model returns (`logits`; `start_logits` and `end_logits`; `last_hidden_state`), and what is answered
with: `probabilities` of classes and tags, `value` in the unit of the file, `sentence_embedding` of length 1. A model that
writes gives logits of the next token at every place, and is called once a token; one with an encoder is two files,
`encoder.onnx`, which is called once a text, and `decoder.onnx`. No keys and values are kept from call to call: a long answer
is quicker elsewhere.

`onnx-int8` is the same with int8 weights, one scale an output, by onnxruntime's own quantisation: tables too.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from afina.errors import CheckpointError, ConfigError, MissingDependencyError
from afina.export.format import Format, Settings, Source
from afina.export.int8 import copy_rest
from afina.export.merged import read_merged
from afina.tasks.causal_lm import CausalLM
from afina.tasks.pooling import pooled
from afina.tasks.sounds import SoundTask
from afina.tasks.task import Task
from afina.tasks.writing import WritingTask

__all__ = ["Onnx", "OnnxInt8", "OnnxModel"]

MODEL, ENCODER, DECODER = "model.onnx", "encoder.onnx", "decoder.onnx"
OPSET = 20
_LARGE = 1_500_000_000  # bytes of weights from which they lie in a file beside the graph, which may hold 2 GB
_WIDTHS = (2, 11)  # rows and tokens that are traced; both may be any number afterwards


class _Answering(nn.Module):
    """A model as a function of tensors that returns tensors: what it returns, and what the task makes of it."""

    def __init__(self, model: Any, task: Task, inputs: tuple[str, ...]):
        super().__init__()
        self.model, self.task, self.inputs = model, task, inputs
        self.names: list[str] = []

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        given = dict(zip(self.inputs, tensors, strict=True))
        extra = {"use_cache": False} if "use_cache" in inspect.signature(self.model.forward).parameters else {}
        said = self.model(**given, **extra)
        kinds = ("logits", "start_logits", "end_logits", "last_hidden_state")
        made = {kind: said[kind].float() for kind in kinds if kind in said}
        made |= self._answers(made, given)
        self.names = list(made)
        return tuple(made.values())

    def _answers(self, made: Mapping[str, torch.Tensor], given: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What the run answers with, where that is one function of what the model returns."""
        task, said = self.task, SimpleNamespace(**made)
        if task.kind.labels in ("class", "classes") and not isinstance(task, CausalLM):
            return {"probabilities": task.outputs(lambda **_: said, {}).float()}
        if task.task_type == "TOKEN_CLS":
            return {"probabilities": torch.softmax(said.logits, dim=-1)}
        if task.name == "reranking":
            return {"score": torch.sigmoid(said.logits.squeeze(-1))}
        if task.kind.labels == "number":
            return {"value": said.logits.squeeze(-1) * task.learned["deviation"] + task.learned["mean"]}
        if hasattr(task, "pooling"):
            return {"sentence_embedding": pooled(said.last_hidden_state, given["attention_mask"], task.pooling)}
        return {}


class _Encoding(nn.Module):
    """The encoder of a model that has a decoder too."""

    names = ("last_hidden_state",)

    def __init__(self, model: Any, inputs: Sequence[str]):
        super().__init__()
        self.encoder, self.inputs = model.get_encoder(), inputs

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.encoder(**dict(zip(self.inputs, tensors, strict=True))).last_hidden_state,)


class _Decoding(nn.Module):
    """The decoder, on what the encoder made of what it read; with the mask of that, where there is one."""

    names = ("logits",)

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor]:
        from transformers.modeling_outputs import BaseModelOutput

        ids, states, *mask = tensors
        read, seen = BaseModelOutput(last_hidden_state=states), {"attention_mask": mask[0]} if mask else {}
        said = self.model(encoder_outputs=read, **seen, decoder_input_ids=ids, use_cache=False)
        return (said.logits.float(),)


def _given(model: Any, task: Task) -> dict[str, torch.Tensor]:
    """What the model reads, as it is traced: two rows."""
    if task.processor_kind == "image_processor":
        examples = [replace(e, label="") for e in task.stand_ins(task.options) or ()]
        features = task.encode(examples, None, task.limit(model)).features
        return {"pixel_values": task.collate(features)["pixel_values"].contiguous()}
    if isinstance(task, SoundTask):
        heard = task.heard(task.collate(task.noises((1.0, 0.7))))
        return {name: heard[name] for name in heard if name != "attention_mask" or not task.learned.get("apart")}
    if task.processor_kind == "document":
        examples = [replace(e, label="") for e in task.stand_ins(task.options) or ()]
        batch = task.collate([{**f, "row": 0} for f in task.encode(examples, _WIDTHS[1], _WIDTHS[1]).features[: _WIDTHS[0]]])
        return {n: batch[n] for n in ("input_ids", "bbox", "attention_mask", "pixel_values") if n in batch}
    known = inspect.signature(model.forward).parameters
    names = [n for n in ("input_ids", "attention_mask", "token_type_ids")
             if n in known and n in (*task.tokenizer.model_input_names, "attention_mask")]  # fmt: skip
    ids = torch.full(_WIDTHS, 3)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    return {name: given[name] for name in names}


def _traced(module: Any, inputs: Mapping[str, torch.Tensor], lengths: Mapping[str, str], path: Path, bytes_: int) -> None:
    """Write the graph of a module. `lengths`: names of the second dimensions that may be any number."""
    import onnx

    any_ = torch.export.Dim.DYNAMIC
    shapes = tuple({0: any_, 1: any_} if name in lengths else {0: any_} for name in inputs)
    with torch.no_grad():
        module(*inputs.values())  # tells the names of its outputs
    with _silent():
        program = torch.onnx.export(
            module.eval(), tuple(inputs.values()), dynamo=True, dynamic_shapes=_shapes(module, shapes),
            input_names=list(inputs), output_names=list(module.names), opset_version=OPSET, verbose=False, optimize=True,
        )  # fmt: skip
    assert program is not None
    graph = program.model_proto
    _strip(graph)
    del graph.graph.value_info[:]  # shapes of the trace, which onnxruntime's quantisation would take for those of all calls
    for value in graph.graph.input:
        dimensions = value.type.tensor_type.shape.dim
        dimensions[0].dim_param = "rows"
        if value.name in lengths:
            dimensions[1].dim_param = lengths[value.name]
    onnx.save(graph, path, save_as_external_data=bytes_ > _LARGE, location=f"{path.name}.data" if bytes_ > _LARGE else None)


def _strip(graph: Any) -> None:
    """Take out what tells where in whose code each node was traced."""
    for part in (graph.graph, *graph.functions):
        del part.metadata_props[:]
        for node in (*part.node, *getattr(part, "initializer", ()), *getattr(part, "input", ())):
            if hasattr(node, "metadata_props"):
                del node.metadata_props[:]
            if hasattr(node, "doc_string"):
                node.doc_string = ""


def _shapes(module: nn.Module, shapes: tuple[Any, ...]) -> Any:
    """As torch.export wants them: a variadic forward takes all of them as one."""
    variadic = any(p.kind == p.VAR_POSITIONAL for p in inspect.signature(module.forward).parameters.values())
    return (shapes,) if variadic else shapes


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Exporters tell at length what they do."""
    import io

    names = ("torch.onnx", "onnxscript", "onnx_ir", "torch.export", "torch._dynamo", "torch.fx", "root")
    levels = {name: logging.getLogger(name).level for name in names}
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            for name in names:
                logging.getLogger(name).setLevel(logging.ERROR)
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)


# --- the runtime


class OnnxModel:
    """The graphs of a folder in onnxruntime, called like a model of transformers."""

    training = False

    def __init__(self, folder: Path):
        import onnxruntime
        from transformers import AutoConfig, GenerationConfig

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        self.sessions = {}
        for name in (MODEL, ENCODER, DECODER):
            if (folder / name).is_file():
                try:
                    made = onnxruntime.InferenceSession(folder / name, options, providers=["CPUExecutionProvider"])
                except Exception as error:  # onnxruntime raises kinds of its own
                    raise CheckpointError(f"{folder / name} cannot be read: {str(error)[:300]}") from None
                self.sessions[name] = made
        if not self.sessions:
            raise CheckpointError(f"{folder} holds no {MODEL}")
        self.config = AutoConfig.from_pretrained(folder)
        self.generation_config = GenerationConfig()
        if (folder / "generation_config.json").is_file():
            self.generation_config = GenerationConfig.from_pretrained(folder)

    def eval(self) -> OnnxModel:
        """It never trains."""
        return self

    def train(self, mode: bool = True) -> OnnxModel:
        """It never trains."""
        return self

    def get_output_embeddings(self) -> None:
        """Its head is a part of the graph."""

    def modules(self) -> Iterator[Any]:
        """Its layers are parts of the graph."""
        return iter(())

    def _run(self, name: str, **tensors: torch.Tensor) -> dict[str, torch.Tensor]:
        session = self.sessions[name]
        wanted = [value.name for value in session.get_inputs()]
        if "token_type_ids" in wanted and "token_type_ids" not in tensors:
            tensors["token_type_ids"] = torch.zeros_like(tensors["input_ids"])
        names = [value.name for value in session.get_outputs()]
        made = session.run(names, {key: tensors[key].contiguous().numpy() for key in wanted})
        return {key: torch.from_numpy(value) for key, value in zip(names, made, strict=True)}

    def __call__(self, **tensors: Any) -> Any:
        """What the model returns, by name."""
        return self.forward(**tensors)

    def forward(self, **tensors: Any) -> Any:
        """What the model returns, by name; what the graph does not ask for is left out."""
        if MODEL in self.sessions:
            return SimpleNamespace(**self._run(MODEL, **tensors))
        states = self._run(ENCODER, **tensors)["last_hidden_state"]
        return SimpleNamespace(**self._decoded(states, tensors.get("attention_mask"), tensors["decoder_input_ids"]))

    def _decoded(self, states: torch.Tensor, mask: torch.Tensor | None, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        seen = {} if mask is None else {"encoder_attention_mask": mask}
        return self._run(DECODER, decoder_input_ids=ids, encoder_hidden_states=states, **seen)

    def generate(
        self, *, generation_config: Any, logits_processor: Sequence[Any] = (), decoder_input_ids: torch.Tensor | None = None,
        **read: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        """The likeliest token, again and again, until every row has come to its end. `read`: what the model reads."""
        stops, most = generation_config.eos_token_id, generation_config.max_new_tokens
        ends = torch.tensor(stops if isinstance(stops, list) else [stops])
        rows, mask = len(next(iter(read.values()))), read.get("attention_mask")
        if ENCODER in self.sessions:
            states = self._run(ENCODER, **read)["last_hidden_state"]
            start = self.generation_config.decoder_start_token_id
            start = self.config.decoder_start_token_id if start is None else start
            ids = torch.full((rows, 1), start) if decoder_input_ids is None else decoder_input_ids
        else:
            ids = read["input_ids"]
        done = torch.zeros(rows, dtype=torch.bool)
        for _ in range(most):
            if ENCODER in self.sessions:
                logits = self._decoded(states, mask, ids)["logits"]
            else:
                seen = torch.ones_like(ids) if mask is None else F.pad(mask, (0, ids.shape[1] - mask.shape[1]), value=1)
                logits = self._run(MODEL, input_ids=ids, attention_mask=seen)["logits"]
            last = logits[:, -1]
            for processed in logits_processor:
                last = processed(ids, last)
            following = last.argmax(dim=-1)
            following = torch.where(done, generation_config.pad_token_id, following)
            ids = torch.cat([ids, following[:, None]], dim=1)
            done |= torch.isin(following, ends)
            if bool(done.all()):
                break
        return ids


# --- the formats


class Onnx(Format):
    """Graphs for onnxruntime."""

    name = "onnx"
    title = "a graph for onnxruntime and other engines, with the task's own answers as outputs"

    def check(self, task: Task, config: Any, settings: Settings) -> None:
        """The libraries are needed."""
        for library in ("onnx", "onnxruntime", "onnxscript"):
            try:
                __import__(library)
            except ImportError:
                raise MissingDependencyError(library, "onnx", f"--format {self.name}") from None

    def write(self, source: Source, folder: Path) -> None:
        """One graph, or an encoder's and a decoder's."""
        model = read_merged(source.folder, attn_implementation="eager").float()  # plain products: every engine has them
        for part in (model.config, getattr(model, "generation_config", None)):
            if part is not None and hasattr(part, "use_cache"):
                part.use_cache = False
        bytes_ = 4 * sum(p.numel() for p in model.parameters())
        try:
            given = _given(model, source.task)
            unit = source.task.unit
            lengths = {name: unit for name, tensor in given.items() if tensor.dim() == 2 or name == "bbox"}
            if model.config.is_encoder_decoder and isinstance(source.task, WritingTask):
                _traced(_Encoding(model, tuple(given)), given, lengths, folder / ENCODER, bytes_)
                states = torch.randn_like(model.get_encoder()(**given).last_hidden_state)
                ids = torch.full((len(states), 7), 3)
                seen = {"encoder_attention_mask": given["attention_mask"]} if "attention_mask" in given else {}
                given = {"decoder_input_ids": ids, "encoder_hidden_states": states, **seen}
                places = unit if unit == "tokens" else "places"
                lengths = {"decoder_input_ids": "written", "encoder_hidden_states": places, "encoder_attention_mask": unit}
                _traced(_Decoding(model), given, lengths, folder / DECODER, bytes_)
            else:
                made = _Answering(model, source.task, tuple(given))
                _traced(made, given, lengths, folder / MODEL, bytes_)
        except (RuntimeError, torch.onnx.OnnxExporterError) as error:
            reason = str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
            raise ConfigError(
                f"--format {self.name}: torch cannot trace a {type(model).__name__}: {reason}\n"
                "Take --format merged or int8, which transformers reads"
            ) from error
        copy_rest(source.folder, folder)

    def load(self, folder: Path, task: Task) -> Any:
        """By onnxruntime."""
        return OnnxModel(folder)

    def tolerance(self, folder: Path, settings: Settings) -> float:
        """Sums in another order, and what 16-bit weights make of that."""
        return 1e-3


class OnnxInt8(Onnx):
    """The same with int8 weights."""

    name = "onnx-int8"
    title = "the same graph with int8 weights: a quarter of the size, and faster"
    lossy = True
    timed = True

    def write(self, source: Source, folder: Path) -> None:
        """The plain graphs, each rounded by onnxruntime: linear layers one scale an output, tables one scale.

        Whole numbers are from 0 to 255: where they have signs, onnxruntime adds pairs of products in 16 bits on processors
        without VNNI, which overflows without a word, so that a file would answer otherwise than where it was verified.
        """
        from onnxruntime.quantization import QuantType, quantize_dynamic

        super().write(source, folder)
        for path in sorted(folder.glob("*.onnx")):
            plain = path.with_name(f"plain-{path.name}")
            data = path.with_name(f"{path.name}.data")
            path.rename(plain)
            with _silent():
                quantize_dynamic(
                    plain, path, per_channel=True, weight_type=QuantType.QUInt8, use_external_data_format=data.exists(),
                    extra_options={"MatMulConstBOnly": True},
                )  # fmt: skip
            plain.unlink()
            if data.exists():
                data.unlink()

    def tolerance(self, folder: Path, settings: Settings) -> float:
        """In the mean."""
        return 0.03
