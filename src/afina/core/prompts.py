"""Virtual tokens: embeddings in front of the input, or keys and values handed to the attention function.

One permanent hook on the base model (and one on the encoder of an encoder-decoder) puts them in, so that training,
`generate` and pipelines all take the same way. What comes out is PEFT's: virtual positions stay in the logits of prompt
tuning, labels are extended by -100, positions of the text are shifted by the number of virtual tokens.

Prefix keys and values go in at the attention function of transformers' registry: this equals handing over a filled
cache, and works where a cache does not (gradient checkpointing drops caches). Encoder-decoders take the cache, since
their decoders derive positions from it.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from afina.core.config import PromptConfig
from afina.core.injection import AdapterSet
from afina.core.runtime import Runtime
from afina.core.targets import ModuleMap
from afina.errors import ConfigError, TargetError, TrainingError

__all__ = ["Prompt", "PromptFeeder", "complete_prompt_config"]


class Prompt(nn.Module):
    """Base class of the methods that train virtual tokens.

    `output()` gives what is stored and used, `[rows, width]`; a subclass may compute it by an encoder, which PEFT's files
    leave out. Read from such a file, the output itself is the parameter.
    """

    prompt_key: ClassVar[str] = "prompt_embeddings"
    prefix: ClassVar[bool] = False  # keys and values instead of embeddings
    mergeable: ClassVar[bool] = False
    identity_at_init: ClassVar[bool] = False

    def __init__(self, config: Any, model: nn.Module, *, initialise: bool = True, bare: bool = False):
        super().__init__()
        stored = next(p for p in model.parameters() if p.dtype.is_floating_point)
        self.dtype = torch.float32 if config.autocast_adapter_dtype and stored.dtype != torch.float64 else stored.dtype
        self.device = stored.device
        if bare:
            self.table = nn.Parameter(torch.zeros(*self.shape(config), dtype=self.dtype, device=self.device))
        else:
            self.build(config)
            self.to(device=self.device, dtype=self.dtype)
            if initialise and self.device.type != "meta":
                self.reset(config, model)

    if TYPE_CHECKING:  # parameters are registered by name

        def __getattr__(self, name: str) -> Any: ...

    @staticmethod
    def shape(config: Any) -> tuple[int, int]:
        """Shape of the output."""
        return config.num_virtual_tokens * config.num_transformer_submodules, config.token_dim

    def build(self, config: Any) -> None:
        """Create the parameters; `table` is the output itself where there is no encoder."""
        self.table = nn.Parameter(torch.empty(*self.shape(config)))

    def reset(self, config: Any, model: nn.Module) -> None:
        """Give the parameters their initial values."""

    def encode(self) -> torch.Tensor:
        """The output, from the parameters made by `build`."""
        return self.table

    def output(self) -> torch.Tensor:
        """What is stored and used, `[rows, width]`."""
        return self.table if "table" in self._parameters else self.encode()

    def stored(self) -> dict[str, torch.Tensor]:
        """What goes into a checkpoint."""
        return {self.prompt_key: self.output()}

    def encoder_state(self) -> dict[str, torch.Tensor]:
        """Parameters behind the output, for an exact resume; empty where the output is the parameter."""
        return {} if "table" in self._parameters else dict(self.state_dict(keep_vars=True))


def complete_prompt_config(config: PromptConfig, model: nn.Module, prompt: type[Prompt]) -> dict[str, Any]:
    """The options that PEFT fills in from the base model, as changes to the configuration."""
    base: Any = getattr(model, "config", None)
    if base is None or not hasattr(model, "get_input_embeddings") or not hasattr(base, "get_text_config"):
        raise TargetError(f"{type(config).__name__} needs a transformers model with input embeddings")
    text = base.get_text_config()
    if getattr(model, "main_input_name", "input_ids") != "input_ids" and not prompt.prefix:
        raise TargetError(
            f"{type(model).__name__} takes no token ids, so virtual tokens have no place in its input; use a method that "
            "acts on layers, or prefix tuning"
        )

    def first(*names: str) -> int | None:
        return next((v for n in names if isinstance(v := getattr(text, n, None), int)), None)

    width = first("hidden_size", "d_model", "n_embd")
    heads = first("num_attention_heads", "n_head", "num_heads", "decoder_attention_heads", "encoder_attention_heads")
    layers = first("decoder_layers", "num_decoder_layers", "num_hidden_layers", "n_layer", "num_layers")
    if prompt.prefix and heads and width:
        head_dim = getattr(text, "head_dim", None) or getattr(text, "d_kv", None) or width // heads
        heads = first("num_key_value_heads") or heads
        width = heads * head_dim
    encoder_decoder = bool(getattr(base, "is_encoder_decoder", False))
    found = {
        "token_dim": width,
        "num_attention_heads": heads,
        "num_layers": layers,
        "num_transformer_submodules": 2 if encoder_decoder else 1,
    }
    if missing := [k for k, v in found.items() if v is None and getattr(config, k) is None]:
        raise ConfigError(f"{type(config).__name__}: {', '.join(missing)} not found in the base model; give it yourself")
    return {k: v for k, v in found.items() if getattr(config, k) is None}


class PromptFeeder:
    """Puts the virtual tokens of the active prompt into a forward call. Hung into a model once, it stays until `unload`."""

    def __init__(self, adapters: AdapterSet):
        self.adapters = adapters
        self.runtime: Runtime = adapters.runtime
        model: Any = adapters.model
        self.model = model
        self.encoder_decoder = bool(model.config.is_encoder_decoder)
        self.names = _parameters(model)
        self.causal = False  # whether a token sees those before it alone
        self.handles = [model.register_forward_pre_hook(self, with_kwargs=True)]
        adapters.undo.append(self.remove)
        if self.encoder_decoder:
            encoder = model.get_encoder()
            self.encoder_names = _parameters(encoder)
            self.handles.append(encoder.register_forward_pre_hook(self.feed_encoder, with_kwargs=True))

    def remove(self) -> None:
        """Take the hooks, and what prefixes changed in the attention, out of the model again."""
        for handle in self.handles:
            handle.remove()
        plain = {changed: kind for kind, changed in _PREFIXED.items()}
        for module in self.model.modules():
            module.__dict__.pop("afina_prefix", None)
            config: Any = getattr(module, "config", None)
            if (kind := getattr(config, "_attn_implementation", None)) in plain:
                config._attn_implementation = plain[kind]

    def active(self) -> tuple[Any, Any]:
        """The active prompt and its configuration."""
        state = self.runtime.state
        if state.enabled:
            for name in state.active:
                if name in self.adapters.prompts:
                    return self.adapters.prompts[name], self.adapters.configs[name]
        return None, None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        prompt, config = self.active()
        if prompt is None:
            if self.runtime.state.prefix is not None and self.runtime.state.enabled:
                self.runtime.set(prefix=None)
            return None
        if self.runtime.state.rows is not None:
            raise ConfigError("adapter_names: a prompt cannot be one of several adapters in a mixed batch")
        kwargs = dict(kwargs) | dict(zip(self.names, args, strict=False))
        n = config.num_virtual_tokens
        if prompt.prefix:
            self.feed_prefix(prompt, config, kwargs, n)
        elif self.encoder_decoder:
            _extend_mask(kwargs, n)
        else:
            self.feed_embeddings(prompt, kwargs, n)
        return (), kwargs

    # --- embeddings in front of the input

    def feed_embeddings(self, prompt: Any, kwargs: dict[str, Any], n: int) -> None:
        """Prompts of a model that is a decoder alone or an encoder alone."""
        past = kwargs.get("past_key_values")
        if past is not None and past.get_seq_length() > 0:  # generation past its first step: the prompt is in the cache
            _extend_mask(kwargs, n)
            _shift(kwargs, n)
            return
        if self._pools_last():
            self._mask_padding(kwargs)
        embeds = self._embeds(kwargs, prompt.output(), self.model, n)
        kwargs["inputs_embeds"], length = embeds, embeds.shape[1]
        _extend_mask(kwargs, n)
        if kwargs.get("token_type_ids") is not None:
            kwargs["token_type_ids"] = F.pad(kwargs["token_type_ids"], (n, 0))
        if kwargs.get("bbox") is not None:  # of words on a page: virtual tokens stand in its corner
            kwargs["bbox"] = F.pad(kwargs["bbox"], (0, 0, n, 0))
        if kwargs.get("position_ids") is not None:
            text = kwargs["position_ids"] + n
            front = torch.arange(n, device=text.device).expand(text.shape[0], n)
            kwargs["position_ids"] = torch.cat([front, text], dim=1)
        kwargs.pop("cache_position", None)
        labels = kwargs.get("labels")
        if labels is not None and labels.dim() == 2 and labels.shape[1] == length - n:
            kwargs["labels"] = F.pad(labels, (n, 0), value=-100)
        for name in ("start_positions", "end_positions"):
            if kwargs.get(name) is not None:
                kwargs[name] = kwargs[name] + n
        if self._pools_last():
            _pad_left(kwargs)

    def _pools_last(self) -> bool:
        """Whether the model classifies at the last token, which transformers cannot find without token ids (T22)."""
        return hasattr(self.model, "score") and getattr(self.model.config, "pad_token_id", None) is not None

    def _mask_padding(self, kwargs: dict[str, Any]) -> None:
        """Mask what follows the last token of each row, found by the padding's id where no mask is given."""
        ids = kwargs.get("input_ids")
        if kwargs.get("attention_mask") is None and ids is not None:
            kept = (ids != self.model.config.pad_token_id).int()
            kwargs["attention_mask"] = (kept.flip(1).cumsum(1).flip(1) > 0).long()

    @staticmethod
    def _embeds(kwargs: dict[str, Any], rows: torch.Tensor, model: Any, n: int) -> torch.Tensor:
        embeds = kwargs.pop("inputs_embeds", None)
        if embeds is None:
            ids = kwargs.pop("input_ids", None)
            if ids is None:
                raise TargetError(f"{type(model).__name__} was called without input_ids; a prompt needs token inputs")
            embeds = model.get_input_embeddings()(ids)
        kwargs["input_ids"] = None
        front = rows[:n].to(embeds.device, embeds.dtype).expand(embeds.shape[0], -1, -1)
        return torch.cat([front, embeds], dim=1)

    def feed_encoder(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Prompts of an encoder-decoder go in front of the encoder's input."""
        prompt, config = self.active()
        if prompt is None or prompt.prefix:
            return None
        kwargs = dict(kwargs) | dict(zip(self.encoder_names, args, strict=False))
        n, mask = config.num_virtual_tokens, kwargs.get("attention_mask")
        kwargs["inputs_embeds"] = embeds = self._embeds(kwargs, prompt.output(), self.model, n)
        if mask is not None and mask.shape[1] == embeds.shape[1] - n:
            _extend_mask(kwargs, n)
        return (), kwargs

    # --- keys and values

    def feed_prefix(self, prompt: Any, config: Any, kwargs: dict[str, Any], n: int) -> None:
        """Prefixes for this pass, one pair of keys and values a layer."""
        heads, layers = config.num_attention_heads, config.num_layers
        rows = prompt.output().view(n, 2 * layers, heads, -1).permute(1, 2, 0, 3)  # [2 layers, heads, n, head_dim]
        if self.encoder_decoder:
            # PEFT's files number the slots of a decoder so; with an even number of layers some serve two layers
            slots = [(4 * layer + side) % (2 * layers) for layer in range(layers) for side in (0, 1)]
            self._prefix_in_cache(rows[slots], kwargs)
            return
        self.runtime.set(prefix=(tuple((rows[2 * i], rows[2 * i + 1]) for i in range(layers)), {}))
        if kwargs.get("position_ids") is not None:
            _shift(kwargs, n)
        elif "position_ids" in self.names:
            kwargs["position_ids"] = self._positions(kwargs, n)

    def _positions(self, kwargs: dict[str, Any], n: int) -> torch.Tensor | None:
        """Positions that the model would give its tokens, shifted by the prefix."""
        tokens = kwargs.get("input_ids")
        tokens = tokens if tokens is not None else kwargs.get("inputs_embeds")
        if tokens is None:
            return None
        past = kwargs.get("past_key_values")
        seen = past.get_seq_length() if past is not None else 0
        make = next((m for m in self.model.modules() if hasattr(type(m), "create_position_ids_from_input_ids")), None)
        if make is not None and tokens.dim() == 2:  # the RoBERTa family counts from its padding token on
            return make.create_position_ids_from_input_ids(tokens, make.padding_idx, seen + n)
        mask = kwargs.get("attention_mask")
        if mask is not None and mask.dim() == 2 and self.model.config.model_type == "opt":  # counts what is attended to
            return ((mask.cumsum(1) + n) * mask - 1)[:, -tokens.shape[1] :].long()
        if mask is not None and mask.dim() == 2 and self.causal:  # a row counts from its first token, padded left or not
            places = torch.arange(mask.shape[1], device=mask.device)[None]
            if torch.compiler.is_compiling() or not bool(mask[:, 0].all()):
                places = (places - (mask.cumsum(1) == 0).sum(1, keepdim=True)).clamp(min=0)
            return (places + n)[:, -tokens.shape[1] :]
        return torch.arange(seen + n, seen + n + tokens.shape[1], device=tokens.device)[None]

    def _prefix_in_cache(self, rows: torch.Tensor, kwargs: dict[str, Any]) -> None:
        from transformers import DynamicCache, EncoderDecoderCache

        past = kwargs.get("past_key_values")
        if past is not None and past.get_seq_length() > 0 and kwargs.get("use_cache") is not False:
            return  # without a cache, generation passes every token again, and back what it got as a cache
        if self.model.training and any(getattr(m, "gradient_checkpointing", False) for m in self.model.modules()):
            raise TrainingError(
                f"prefix tuning of {type(self.model).__name__} hands its prefix over in a cache, and gradient "
                "checkpointing drops caches: the prefix would not be trained. Turn gradient checkpointing off, or use "
                "prompt tuning or LoRA"
            )
        ids = next(
            v for k in ("input_ids", "inputs_embeds", "decoder_input_ids", "labels") if (v := kwargs.get(k)) is not None
        )
        if kwargs.get("decoder_input_ids") is not None:
            ids = kwargs["decoder_input_ids"]
        cache = DynamicCache()
        dtype = self.model.dtype
        for i in range(len(rows) // 2):
            key, value = (rows[2 * i + j].to(dtype).expand(ids.shape[0], -1, -1, -1) for j in (0, 1))
            cache.update(key, value, i)
        kwargs["past_key_values"] = EncoderDecoderCache(cache, DynamicCache())

    def install_prefix(self, modules: ModuleMap, layers: int) -> None:
        """Make the attention of a model ask for prefixes; does nothing where that has been done."""
        if self.encoder_decoder:
            return
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
        from transformers.modeling_utils import AttentionInterface

        found = [name for name in modules.roles("query", "fused") if name.startswith(modules.scope)]
        places = dict.fromkeys(name.rpartition(".")[0] for name in found)
        attentions: list[Any] = [modules.modules[place] for place in places]
        if len(attentions) != layers:
            raise TargetError(
                f"prefix tuning found {len(attentions)} attention modules in {type(self.model).__name__} for {layers} "
                "layers; this architecture is not supported"
            )
        for i, attention in enumerate(attentions):
            config: Any = getattr(attention, "config", None)
            kind = getattr(config, "_attn_implementation", None)
            if kind not in (*_PREFIXED, *_PREFIXED.values()):
                raise TargetError(
                    f"prefix tuning works with attn_implementation 'sdpa' or 'eager', not {kind!r}; load the base with "
                    "attn_implementation='sdpa'"
                )
            attention.afina_prefix = (self.runtime, i)
        self.causal = bool(getattr(attentions[0], "is_causal", False))
        for attention in attentions:
            if (kind := attention.config._attn_implementation) in _PREFIXED:
                AttentionInterface.register(_PREFIXED[kind], _attend_sdpa if kind == "sdpa" else _attend_eager)
                AttentionMaskInterface.register(_PREFIXED[kind], ALL_MASK_ATTENTION_FUNCTIONS[kind])
        for module in self.model.modules():
            config = getattr(module, "config", None)
            kind = getattr(config, "_attn_implementation", None)
            if config is not None and kind in _PREFIXED:
                config._attn_implementation = _PREFIXED[kind]


_PREFIXED = {"sdpa": "afina_prefix_sdpa", "eager": "afina_prefix_eager"}


def _attend_sdpa(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return _attend(sdpa_attention_forward, module, query, key, value, mask, kwargs)


def _attend_eager(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
    own: Any = sys.modules[type(module).__module__]
    return _attend(own.eager_attention_forward, module, query, key, value, mask, kwargs)


def _attend(function: Callable[..., Any], module: Any, q: Any, k: Any, v: Any, mask: Any, kwargs: dict[str, Any]) -> Any:
    """Attention with the prefix of this layer in front of keys `[B, heads, T, d]` and values; every token sees it."""
    runtime, layer = getattr(module, "afina_prefix", (None, 0))
    prefix: Any = runtime.state.prefix if runtime is not None and runtime.state.enabled else None
    if prefix is None:
        return function(module, q, k, v, mask, **kwargs)
    pairs, masks = prefix
    front_k, front_v = (t.to(k.dtype).expand(k.shape[0], -1, -1, -1) for t in pairs[layer])
    n, queries, keys = front_k.shape[2], q.shape[2], k.shape[2]
    causal = kwargs.pop("is_causal", None)
    causal = getattr(module, "is_causal", True) if causal is None else causal
    if mask is not None or (causal and queries > 1):
        own, key = mask, (id(mask), queries, keys, q.dtype, q.device)
        if torch.compiler.is_compiling() or key not in masks:
            mask = _mask_with_front(own, q, keys, n, eager=function.__name__.startswith("eager"))
            if not torch.compiler.is_compiling():
                masks[key] = own, mask  # all layers of a pass get one, kept once
        else:
            mask = masks[key][1]
    return function(module, q, torch.cat([front_k, k], 2), torch.cat([front_v, v], 2), mask, is_causal=False, **kwargs)


def _mask_with_front(mask: Any, q: torch.Tensor, keys: int, n: int, *, eager: bool) -> torch.Tensor:
    """The mask, or the causal one that the attention function makes by itself, with n columns in front that all see."""
    if mask is None:
        queries = q.shape[2]
        mask = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)[None, None]
        if eager:
            mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, torch.finfo(q.dtype).min)
    return F.pad(mask[..., :keys], (n, 0), value=1 if mask.dtype == torch.bool else 0.0)


def _parameters(module: nn.Module) -> list[str]:
    return [*inspect.signature(type(module).forward).parameters][1:]


def _extend_mask(kwargs: dict[str, Any], n: int) -> None:
    mask = kwargs.get("attention_mask")
    if mask is not None:
        kwargs["attention_mask"] = F.pad(mask, (n, 0), value=1)


def _shift(kwargs: dict[str, Any], n: int) -> None:
    if kwargs.get("position_ids") is not None:
        kwargs["position_ids"] = kwargs["position_ids"] + n


def _pad_left(kwargs: dict[str, Any]) -> None:
    """Move padding to the left, so that the last position holds the last token of every row."""
    mask, embeds = kwargs.get("attention_mask"), kwargs["inputs_embeds"]
    if mask is None:
        return
    order = torch.argsort(mask, dim=1, stable=True)
    kwargs["inputs_embeds"] = embeds.gather(1, order.unsqueeze(-1).expand_as(embeds))
    kwargs["attention_mask"] = mask = mask.gather(1, order)
    kwargs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
