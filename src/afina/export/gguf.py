"""GGUF, for llama.cpp and what is built on it: weights, tokenizer, chat template and stop tokens in one file.

Names of tensors are those of gguf's own table. What differs between an architecture of transformers and the same one of
llama.cpp is here: Llama's queries and keys, whose rotation pairs neighbouring rows there and rows half a head apart here;
GPT-2's transposed layers; norms of Gemma, which count from one. Tensors of one dimension stay float32; matrices whose rows
do not divide into a type's blocks become f16. A tensor at a time is in memory.

What was written is read back by transformers (`from_pretrained(gguf_file=)`) and, tokenizer, template and stop tokens, by
gguf's own reader, and compared.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from afina.errors import CheckpointError, ConfigError, MissingDependencyError, did_you_mean, shortened
from afina.export.format import Format, Settings, Source
from afina.tasks.causal_lm import CausalLM
from afina.tasks.task import Task

__all__ = ["ARCHITECTURES", "QUANTISATIONS", "Gguf", "add_architecture", "architecture_of", "converted", "read_tokenizer"]

FILE = "model.gguf"
ARCHITECTURES = {  # transformers' name, llama.cpp's; those that transformers reads back
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "phi3": "phi3",
    "gemma2": "gemma2",
    "gpt2": "gpt2",
    "starcoder2": "starcoder2",
}
# Types that gguf makes with numpy, and how far probabilities may be from the run's, in the mean (f32, bf16, f16: at most).
QUANTISATIONS = {"f32": 1e-3, "f16": 5e-3, "bf16": 3e-2, "q8_0": 0.03, "q5_1": 0.1, "q5_0": 0.1, "q4_1": 0.2, "q4_0": 0.2}
_FILE_TYPES = {
    "f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0", "q5_1": "MOSTLY_Q5_1",
    "q5_0": "MOSTLY_Q5_0", "q4_1": "MOSTLY_Q4_1", "q4_0": "MOSTLY_Q4_0",
}  # fmt: skip
_NOT_STORED = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")  # made again by who reads
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # kinds of tokens


# --- tensors


def _paired(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of each head from two halves to pairs: 0, n/2, 1, n/2 + 1, ..."""
    rows = tensor.shape[0] // heads // 2
    return tensor.reshape(heads, 2, rows, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)


def converted(name: str, tensor: torch.Tensor, config: Any) -> torch.Tensor:
    """A tensor of transformers, by its name there, as llama.cpp wants it."""
    kind, leaf = config.model_type, name.rpartition(".")[0].rpartition(".")[2]
    if kind in ("llama", "mistral") and leaf == "q_proj":
        return _paired(tensor, config.num_attention_heads)
    if kind in ("llama", "mistral") and leaf == "k_proj":
        return _paired(tensor, config.num_key_value_heads)
    if kind == "gpt2" and tensor.dim() == 2 and leaf in ("c_attn", "c_proj", "c_fc"):
        return tensor.T
    if kind == "gemma2" and name.endswith("norm.weight"):
        return tensor + 1
    return tensor


def architecture_of(config: Any) -> str:
    """llama.cpp's name of a model's architecture; raises ConfigError where it has none that can be checked here."""
    if config.model_type not in ARCHITECTURES:
        raise ConfigError(
            f"--format gguf: models of the kind {config.model_type} cannot be written; those of {', '.join(ARCHITECTURES)} "
            "can. --format merged writes a folder that llama.cpp's own convert_hf_to_gguf.py may read"
        )
    return ARCHITECTURES[config.model_type]


def gguf_names(config: Any) -> Callable[[str], str | None]:
    """From a tensor's name in transformers to its name in a GGUF; None for what has none."""
    import gguf

    wanted = architecture_of(config)
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == wanted)
    table = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    return lambda name: table.get_name(name, try_suffixes=(".weight", ".bias"))


def _tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors of a merged model, mapped, one at a time."""
    from safetensors import safe_open

    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (no mapping)
                yield name, opened.get_tensor(name)


def _type_of(tensor: torch.Tensor, quantisation: str) -> Any:
    """The type a tensor is stored in."""
    import gguf

    if tensor.dim() < 2:
        return gguf.GGMLQuantizationType.F32
    wanted = gguf.GGMLQuantizationType[quantisation.upper()]
    block, _ = gguf.GGML_QUANT_SIZES[wanted]
    return wanted if tensor.shape[-1] % block == 0 else gguf.GGMLQuantizationType.F16


# --- settings


def add_architecture(writer: Any, config: Any) -> None:
    """The numbers that llama.cpp builds the model from. Raises ConfigError for what it would build otherwise."""
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") != "default":
        raise ConfigError(
            f"--format gguf: positions of this model are scaled ({rope['rope_type']}), which is not written; take --format "
            "merged and llama.cpp's own convert_hf_to_gguf.py"
        )
    kind = config.model_type
    context = config.max_position_embeddings
    window = getattr(config, "sliding_window", None)
    if kind == "mistral" and window:  # which llama.cpp does not do for this architecture
        context = min(context, window)
    writer.add_context_length(context)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * config.hidden_size
    writer.add_feed_forward_length(inner)
    writer.add_head_count(config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    if kind == "gpt2":
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    writer.add_head_count_kv(config.num_key_value_heads)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    if kind == "starcoder2":
        writer.add_layer_norm_eps(config.norm_epsilon)
    else:
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if kind in ("gemma2", "phi3"):
        writer.add_sliding_window(window or context)
    if kind == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping or 0.0)
        writer.add_final_logit_softcapping(config.final_logit_softcapping or 0.0)
    if kind == "phi3":
        writer.add_rope_scaling_orig_ctx_len(getattr(config, "original_max_position_embeddings", None) or context)


# --- tokenizer


def add_tokenizer(writer: Any, tokenizer: Any, vocabulary: int, stops: list[int]) -> None:
    """Vocabulary, merges, kinds of tokens, chat template, and up to three tokens that end an answer.

    Raises ConfigError for a tokenizer that llama.cpp has no like of.
    """
    said = json.loads(tokenizer.backend_tokenizer.to_str())
    model = said["model"]
    if model["type"] not in ("BPE", "Unigram"):
        raise ConfigError(
            f"--format gguf: the tokenizer is of the kind {model['type']}, which llama.cpp lacks; it has BPE and Unigram"
        )
    bytes_ = "ByteLevel" in json.dumps([said["pre_tokenizer"], said["decoder"]])
    added = {token["id"]: token for token in said["added_tokens"]}
    tokens, kinds = [], []
    known = {i: token for token, i in tokenizer.get_vocab().items()}
    for i in range(vocabulary):
        token = known.get(i)
        if token is None:
            tokens.append(f"[PAD{i}]")
            kinds.append(UNUSED)
        elif i in added:
            tokens.append(token)
            special = added[i]["special"]
            kinds.append(UNKNOWN if token == tokenizer.unk_token and not bytes_ else CONTROL if special else USER_DEFINED)
        else:
            tokens.append(token)
            raw = not bytes_ and len(token) == 6 and token.startswith("<0x") and token.endswith(">")
            kinds.append(BYTE if raw else UNKNOWN if token == tokenizer.unk_token and not bytes_ else NORMAL)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model.get("merges", ())]
    if bytes_:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_splitting(said["pre_tokenizer"]))
    else:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(_scores(tokens, kinds, model, merges))
        front = json.dumps([said["normalizer"], said["pre_tokenizer"]])
        writer.add_add_space_prefix('"Prepend"' in front or '"prepend_scheme": "first"' in front or '"always"' in front)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    if merges:
        writer.add_token_merges(merges)
    for name in ("bos", "eos", "unk", "pad"):
        if (number := getattr(tokenizer, f"{name}_token_id")) is not None:
            getattr(writer, f"add_{name}_token_id")(number)
    begun = tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    writer.add_add_bos_token(begun)
    others = [stop for stop in stops if stop != tokenizer.eos_token_id]
    for stop, add in zip(others, (writer.add_eot_token_id, writer.add_eom_token_id), strict=False):
        add(stop)
    if len(others) > 2:
        names = shortened(tokenizer.convert_ids_to_tokens(stops))
        raise ConfigError(f"--format gguf: answers end with any of {names}; a GGUF can name three")
    if tokenizer.chat_template is not None:
        writer.add_chat_template(tokenizer.chat_template)


def _scores(tokens: list[str], kinds: list[int], model: Any, merges: list[str]) -> list[float]:
    """Which pair is joined first: what Unigram says, or earlier merges before later ones."""
    if model["type"] == "Unigram":
        own = {token: float(score) for token, score in model["vocab"]}
        return [own.get(token, 0.0) for token in tokens]
    rank: dict[str, int] = {}
    for i, merge in enumerate(merges):
        rank.setdefault(merge.replace(" ", ""), i)
    return [
        0.0 if kind in (CONTROL, BYTE, UNKNOWN) else float(-rank[token]) if token in rank else -1e6
        for token, kind in zip(tokens, kinds, strict=True)
    ]


def _splitting(pre: Any) -> str:
    """llama.cpp's name for how text is split into words before pairs are joined."""
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    parts = pre.get("pretokenizers", [pre]) if pre else []
    patterns = [part["pattern"].get("Regex") or part["pattern"].get("String") for part in parts if part["type"] == "Split"]
    if not patterns and any(part["type"] == "ByteLevel" and part.get("use_regex", True) for part in parts):
        return "gpt-2"
    known = {pattern: name for name, pattern in reversed(GGUF_PRE_TOKENIZER_SPLITS.items())}
    if len(patterns) == 1 and patterns[0] in known:
        return known[patterns[0]]
    raise ConfigError(
        f"--format gguf: the tokenizer splits text by {shortened(patterns) or 'nothing'}, which llama.cpp has no name for; "
        "take --format merged and llama.cpp's own convert_hf_to_gguf.py"
    )


def read_tokenizer(file: Path) -> Any:
    """A tokenizer that splits text as llama.cpp does by what is in the file.

    transformers' own reader puts no space in front of a text that follows a special token, which llama.cpp does.
    """
    import gguf
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    fields = gguf.GGUFReader(file).fields

    def said(name: str, default: Any = None) -> Any:
        return fields[f"tokenizer.{name}"].contents() if f"tokenizer.{name}" in fields else default

    tokens, kinds = said("ggml.tokens"), said("ggml.token_type")
    bytes_ = said("ggml.model") == "gpt2"
    merges = [tuple(merge.split(" ")) for merge in said("ggml.merges", [])]
    own = {token: i for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True)) if kind != UNUSED}
    named = {name: said(f"ggml.{key}_token_id")
             for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))}  # fmt: skip
    unknown = tokens[named["unk"]] if named["unk"] is not None else None
    if not merges and not bytes_:
        scored = list(zip(tokens, said("ggml.scores"), strict=True))
        made = Tokenizer(models.Unigram(scored, named["unk"], byte_fallback=True))
    else:
        made = Tokenizer(models.BPE(own, merges, unk_token=unknown, byte_fallback=not bytes_, fuse_unk=not bytes_))
    if bytes_:
        pattern = GGUF_PRE_TOKENIZER_SPLITS.get(said("ggml.pre"))
        level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
        split = [] if pattern is None else [pre_tokenizers.Split(Regex(pattern), behavior="isolated")]
        made.pre_tokenizer = pre_tokenizers.Sequence([*split, level])
        made.decoder = decoders.ByteLevel()
    else:
        front = [normalizers.Prepend("▁")] if said("ggml.add_space_prefix", True) else []
        made.normalizer = normalizers.Sequence([*front, normalizers.Replace(" ", "▁")])
        strip = [decoders.Strip(" ", 1, 0)] if front else []
        made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    for special in (True, False):
        wanted = (CONTROL, UNKNOWN) if special else (USER_DEFINED,)
        texts = [token for token, kind in zip(tokens, kinds, strict=True) if kind in wanted]
        chosen = [AddedToken(text, normalized=False, special=special) for text in texts]
        (made.add_special_tokens if special else made.add_tokens)(chosen)
    if said("ggml.add_bos_token"):
        begin = tokens[named["bos"]]
        made.post_processor = processors.TemplateProcessing(single=f"{begin} $A", special_tokens=[(begin, named["bos"])])
    names = {f"{name}_token": tokens[number] for name, number in named.items() if number is not None}
    wrapped = PreTrainedTokenizerFast(tokenizer_object=made, **names)
    wrapped.chat_template = said("chat_template")
    return wrapped


# --- the format


class Gguf(Format):
    """One file for llama.cpp."""

    name = "gguf"
    title = "one file for llama.cpp and what is built on it, with tokenizer, chat template and stop tokens inside"

    def rounds(self, settings: Settings) -> bool:
        """Types of 8 bits and fewer."""
        return settings.quantisation not in ("f32", "f16", "bf16")

    def check(self, task: Task, config: Any, settings: Settings) -> None:
        """A model that continues text, of an architecture that can be checked, and a type that can be made."""
        if not isinstance(task, CausalLM):
            raise ConfigError(
                f"--format {self.name} is for models that continue text (causal_lm and policies); this run is of the task "
                f"{task.name}. For a CPU take --format int8 or onnx-int8"
            )
        architecture_of(config)
        if settings.quantisation not in QUANTISATIONS:
            near = did_you_mean(settings.quantisation, QUANTISATIONS)
            raise ConfigError(f"--quantisation {settings.quantisation}: gguf cannot make that with numpy.{near}")
        try:
            import gguf  # noqa: F401
        except ImportError:
            raise MissingDependencyError("gguf", "gguf", f"--format {self.name}") from None

    def write(self, source: Source, folder: Path) -> None:
        """Header first, for which the shapes are enough; then each tensor as it is converted."""
        import gguf
        from transformers import AutoConfig

        config, quantisation = AutoConfig.from_pretrained(source.folder), source.settings.quantisation
        names = gguf_names(config)
        places: dict[str, str] = {}
        unknown = []
        for name, _ in _tensors(source.folder):
            if not name.endswith(_NOT_STORED):
                found = names(name)
                places[name] = found or ""
                unknown += [] if found else [name]
        if unknown:
            raise ConfigError(f"--format gguf: gguf has no name for {shortened(unknown)}; take --format merged")
        writer = gguf.GGUFWriter(folder / FILE, architecture_of(config))
        try:
            writer.add_type("model")
            # transformers takes a name with "mistral" in it for an architecture that gguf does not know; it is Llama's
            writer.add_name(source.run.resolve().name.replace("mistral", "m"))
            writer.add_file_type(int(gguf.LlamaFileType[_FILE_TYPES[quantisation]]))
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
            add_architecture(writer, config)
            stops = _stops(source.folder)
            add_tokenizer(writer, source.task.tokenizer, config.vocab_size, stops)
            for name, tensor in _tensors(source.folder):
                if name in places:
                    tensor = converted(name, tensor, config)
                    kind = _type_of(tensor, quantisation)
                    block, size = gguf.GGML_QUANT_SIZES[kind]
                    bytes_ = tensor.numel() // block * size
                    writer.add_tensor_info(places[name], tuple(tensor.shape), np.dtype(np.float32), bytes_, raw_dtype=kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for name, tensor in _tensors(source.folder):
                if name in places:
                    tensor = converted(name, tensor, config)
                    values = tensor.float().contiguous().numpy()
                    writer.write_tensor_data(gguf.quantize(values, _type_of(tensor, quantisation)))
        finally:
            writer.close()

    def load(self, folder: Path, task: Task) -> Any:
        """By transformers, every weight as float32."""
        from transformers import AutoConfig, AutoModelForCausalLM

        with contextlib.redirect_stderr(io.StringIO()):  # a bar
            config = AutoConfig.from_pretrained(folder, gguf_file=FILE)
            if config.model_type == "gpt2":  # read as the one, used as the other
                config.n_positions = config.n_ctx
            found: Any = AutoModelForCausalLM.from_pretrained(
                folder, gguf_file=FILE, config=config, dtype=torch.float32, output_loading_info=True
            )
        model, info = found
        if wrong := [*info["missing_keys"], *info["mismatched_keys"]]:
            raise CheckpointError(f"{folder / FILE} was read by transformers, but lacks {shortened(wrong)}")
        return model.eval()

    def processor(self, folder: Path, kind: str = "tokenizer") -> Any:
        """See `read_tokenizer`."""
        return read_tokenizer(folder / FILE)

    def stops(self, model: Any) -> list[int]:
        """The tokens that the file names as ends."""
        import gguf

        fields = gguf.GGUFReader(Path(model.name_or_path) / FILE).fields
        named = [f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom")]
        return [int(fields[key].contents()) for key in named if key in fields]

    def tolerance(self, folder: Path, settings: Settings) -> float:
        """By the type of its weights."""
        return QUANTISATIONS[settings.quantisation]


def _stops(folder: Path) -> list[int]:
    """The tokens at which a merged model stops."""
    from transformers import GenerationConfig

    own = GenerationConfig.from_pretrained(folder).eos_token_id
    return list(own) if isinstance(own, list) else [own] if own is not None else []
