"""Which layers a configuration means.

Names work as in PEFT: an entry of a list is a module's whole name or the end of it; a string is one regular expression
for the whole name; "all-linear" is every linear layer but the output head. What a method adapts by default is found in
the module tree by the roles that layers play (query, value, feed-forward down, norm, ...), not in a table of models. A
requested name that matches nothing is an error with the nearest names (T7).
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from typing import Any

from torch import nn

from afina.core.adapted import AdaptedLayer
from afina.core.layers import is_norm, view_of
from afina.errors import Problems, TargetError, did_you_mean, shortened

__all__ = ["ModuleMap", "compact_names", "matches_any"]

# What attention projections are called; the only naming conventions the library relies on.
QUERY = {"q_proj", "query", "q", "q_lin", "to_q", "wq", "query_proj", "q_linear", "linear_q"}
KEY = {"k_proj", "key", "k", "k_lin", "to_k", "wk", "key_proj", "k_linear", "linear_k"}
VALUE = {"v_proj", "value", "v", "v_lin", "to_v", "wv", "value_proj", "v_linear", "linear_v"}
FUSED = {"c_attn", "query_key_value", "qkv", "qkv_proj", "Wqkv", "wqkv", "in_proj", "attn_qkv"}
HEADS = {
    "classifier",
    "score",
    "qa_outputs",
    "lm_head",
    "logits_proj",
    "classification_head",
    "out_proj_head",
    "pre_classifier",
}


class ModuleMap:
    """One pass over a model, and what can be told from its structure."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.modules: dict[str, nn.Module] = {}
        self.aliases: dict[str, list[str]] = {}  # other names under which the same module object hangs in the tree
        self._walk("", model, {})

    def _walk(self, prefix: str, module: nn.Module, seen: dict[int, str]) -> None:
        """Collect modules under the names they have without adapters."""
        for leaf, child in module._modules.items():
            if child is None:
                continue
            name = f"{prefix}.{leaf}" if prefix else leaf
            while isinstance(child, AdaptedLayer):
                child = child.base_layer
            if id(child) in seen:
                self.aliases.setdefault(seen[id(child)], []).append(name)
                continue
            seen[id(child)] = name
            self.modules[name] = child
            self._walk(name, child, seen)

    # --- structure

    @cached_property
    def blocks(self) -> list[list[str]]:
        """Lists of block names, one list per stack of blocks (encoder, decoder, ...), outermost lists only."""
        stacks: list[list[str]] = []
        for name, module in self.modules.items():
            if not isinstance(module, nn.ModuleList | nn.Sequential) or len(module) == 0:
                continue
            kinds = {type(m) for m in module}
            if len(kinds) > 2 or not any(next(m.children(), None) is not None for m in module):
                continue
            if any(name.startswith(f"{block}.") for stack in stacks for block in stack):
                continue
            stacks.append([f"{name}.{i}" for i in range(len(module))])
        return stacks

    @cached_property
    def width(self) -> int | None:
        """Width of the hidden states."""
        config: Any = getattr(self.model, "config", None)
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        for key in ("hidden_size", "d_model", "n_embd", "dim"):
            if isinstance(value := getattr(text, key, None), int):
                return value
        return None

    @cached_property
    def scope(self) -> str:
        """Prefix of the language model within a multimodal one; empty for every other model."""
        config = getattr(self.model, "config", None)
        several = [k for k in ("vision_config", "audio_config") if getattr(config, k, None) is not None]
        if not several or getattr(config, "text_config", None) is None:
            return ""
        text = next((n for n in self.modules if n.split(".")[-1] in ("language_model", "text_model")), "")
        return f"{text}." if text else ""

    def head_names(self) -> set[str]:
        """Names of the output heads."""
        heads = set()
        output = getattr(self.model, "get_output_embeddings", lambda: None)()
        for name, module in self.modules.items():
            if (output is not None and module is output) or self._in_head(name):
                heads.add(name)
        return heads

    def _in_head(self, name: str) -> bool:
        prefix = getattr(self.model, "base_model_prefix", "")
        first = name.split(".")[0]
        return first in HEADS and first != prefix

    def in_attention(self, name: str) -> bool:
        """Whether a module lies within an attention module."""
        parts = name.split(".")
        for end in range(len(parts) - 1, 0, -1):
            parent = self.modules[".".join(parts[:end])]
            kind = type(parent).__name__.lower()
            if "attention" in kind or "attn" in kind:
                return True
        return False

    def linears(self) -> Iterator[tuple[str, Any]]:
        """Every layer that multiplies by a matrix, with its view; heads left out."""
        heads = self.head_names()
        for name, module in self.modules.items():
            if name in heads or any(name.startswith(f"{h}.") for h in heads):
                continue
            if "weight" in module._parameters and not isinstance(module, nn.Embedding):
                view = view_of(module)
                if view.kind == "linear":
                    yield name, view

    def role(self, role: str) -> list[str]:
        """Names of the layers that play a role: query, key, value, fused, attention_out, ff_up, ff_down, norm, conv,
        linear."""
        if role == "norm":
            return [n for n, m in self.modules.items() if is_norm(m)]
        if role == "conv":
            return [n for n, m in self.modules.items() if isinstance(m, nn.Conv1d | nn.Conv2d | nn.Conv3d)]
        in_blocks = tuple(f"{b}." for stack in self.blocks for b in stack)
        tests: dict[str, Callable[[str, Any, bool], bool]] = {
            "linear": lambda leaf, view, attn: True,
            "query": lambda leaf, view, attn: attn and leaf in QUERY,
            "key": lambda leaf, view, attn: attn and leaf in KEY,
            "value": lambda leaf, view, attn: attn and leaf in VALUE,
            "fused": lambda leaf, view, attn: attn and leaf in FUSED,
            "attention_out": lambda leaf, view, attn: (
                attn and leaf not in QUERY | KEY | VALUE | FUSED and view.out_features == self.width
            ),
            "ff_up": lambda leaf, view, attn: not attn and view.in_features == self.width < view.out_features,
            "ff_down": lambda leaf, view, attn: not attn and view.out_features == self.width < view.in_features,
        }
        test = tests[role]
        return [
            name
            for name, view in self.linears()
            if (role == "linear" or name.startswith(in_blocks))
            and test(name.rsplit(".", 1)[-1], view, self.in_attention(name))
        ]

    def roles(self, *roles: str) -> list[str]:
        """Names of the layers of several roles, in model order."""
        wanted = {name for role in roles for name in self.role(role)}
        return [name for name in self.modules if name in wanted]

    # --- selection

    def select(self, config: Any, default: Callable[[ModuleMap], list[str]], *, strict: bool = True) -> list[str]:
        """Names of the layers that `config` means; `default` is asked where `target_modules` is None.

        Raises TargetError, naming every entry that matches nothing with its nearest names. `strict=False` (a
        checkpoint's keys will be compared anyway) lets entries without a match pass.
        """
        problems = Problems(type(config).__name__)
        target = config.target_modules
        if target is None:
            names = [n for n in default(self) if n.startswith(self.scope)]
            if not names:
                problems.add(
                    f"found no layer of {type(self.model).__name__} to adapt by default; say which with target_modules, "
                    f"for example target_modules={self._leaves()[:3]}"
                )
        elif target == "all-linear":
            names = self.role("linear")
        elif isinstance(target, str):
            pattern = re.compile(target)
            names = [n for n in self.modules if pattern.fullmatch(n)]
            if not names:
                problems.add(
                    f"target_modules={target!r} matches no module's whole name; names look like "
                    f"{shortened(list(self._adaptable())[:3])}"
                )
        else:
            names, unmatched = self._by_suffix(target)
            if strict:
                for entry in unmatched:
                    problems.add(f"target_modules entry {entry!r} matches no layer.{self._cure(entry)}")
        if config.exclude_modules is not None:
            names = [n for n in names if not matches_any(config.exclude_modules, n)]
            if strict:
                self._check_excluded(config.exclude_modules, problems)
        names = self._in_scope(config, names, problems)
        names = self._in_layers(config, names, problems, strict)
        saved = tuple(self.saved_names(config.modules_to_save, problems, strict=strict))
        names = [n for n in names if n not in saved and not n.startswith(tuple(f"{s}." for s in saved))]
        if not names and not problems.found and strict and not self._other_targets(config):
            problems.add("every layer that target_modules names is excluded again; nothing would be trained")
        problems.raise_as(TargetError)
        return names

    @staticmethod
    def _other_targets(config: Any) -> bool:
        others = ("target_parameters", "trainable_token_indices", "modules_to_save")
        return any(getattr(config, name, None) for name in others)

    def _check_excluded(self, excluded: Any, problems: Problems) -> None:
        if isinstance(excluded, str):
            if not any(matches_any(excluded, n) for n in self.modules):
                problems.add(
                    f"exclude_modules={excluded!r} matches no module's whole name; names look like "
                    f"{shortened(list(self._adaptable())[:3])}"
                )
            return
        for entry in self._by_suffix(excluded)[1]:
            problems.add(f"exclude_modules entry {entry!r} matches no module.{self._cure(entry)}")

    def _by_suffix(self, entries: Iterable[str]) -> tuple[list[str], list[str]]:
        simple = {e for e in entries if "." not in e}
        dotted = [e for e in entries if "." in e]
        hit: set[str] = set()
        names = []
        for name in self.modules:
            leaf = name.rsplit(".", 1)[-1]
            found = {leaf} & simple if leaf in simple else set()
            found |= {e for e in dotted if name == e or name.endswith(f".{e}")}
            if found:
                names.append(name)
                hit |= found
        return names, [e for e in entries if e not in hit]

    def _cure(self, entry: str) -> str:
        bare = [
            f"{path}.{p}"
            for path, module in self.modules.items()
            for p in module._parameters
            if p == entry.rsplit(".", 1)[-1]
        ]
        if bare:
            end = ".".join(bare[0].split(".")[-2:])
            return f" It is a bare parameter ({bare[0]}), not a layer: use target_parameters=[{end!r}]."
        fused = [f"{path}.{p}" for path, module in self.modules.items() for p, t in module._parameters.items()
                 if t is not None and t.dim() == 3 and not isinstance(module, nn.Conv1d)]  # fmt: skip
        ends = list(dict.fromkeys(".".join(name.split(".")[-2:]) for name in fused))
        hint = f" The experts are bare parameters here: use target_parameters={ends[:3]}." if ends else ""
        return did_you_mean(entry, self._leaves() if "." not in entry else self._adaptable()) + hint

    def _adaptable(self) -> Iterator[str]:
        for name, module in self.modules.items():
            if "weight" in module._parameters:
                yield name

    def _leaves(self) -> list[str]:
        return [leaf for leaf, _ in Counter(n.rsplit(".", 1)[-1] for n in self._adaptable()).most_common()]

    def _in_scope(self, config: Any, names: list[str], problems: Problems) -> list[str]:
        if not config.target_scope:
            return names
        for scope in config.target_scope:
            if scope not in self.modules:
                problems.add(f"target_scope entry {scope!r} is no module.{did_you_mean(scope, self.modules)}")
        inside = [n for n in names if n.startswith(tuple(f"{s}." for s in config.target_scope))]
        for entry in config.target_modules if isinstance(config.target_modules, list) else ():
            if matches := self._by_suffix([entry])[0]:
                if not set(matches) & set(inside):
                    problems.add(f"target_modules entry {entry!r} means {matches[0]}, which target_scope leaves out")
        return inside

    def _in_layers(self, config: Any, names: list[str], problems: Problems, strict: bool) -> list[str]:
        wanted = config.layers_to_transform
        if wanted is None:
            return names
        patterns = config.layers_pattern
        patterns = [patterns] if isinstance(patterns, str) else patterns
        numbers = {n: self._block_number(n, patterns) for n in names}
        present = {number for number in numbers.values() if number is not None}
        blocks = ", ".join(map(str, sorted(present))) or "(none found: say how the list is called with layers_pattern)"
        for number in wanted:
            if number not in present:
                problems.add(f"layers_to_transform has {number}, but the targets lie in blocks {blocks}")
        whole = config.target_modules if isinstance(config.target_modules, list) else []  # a whole name means what it says
        for entry in whole if strict else ():
            if (meant := self._by_suffix([entry])[0]) and not any(numbers.get(n) is not None or n in whole for n in meant):
                problems.add(
                    f"target_modules entry {entry!r} means {meant[0]}, which lies in no block, so layers_to_transform drops "
                    f"it; give its whole name, {meant[0]!r}, to adapt it"
                )
        return [n for n in names if numbers[n] in set(wanted) or n in whole]

    @staticmethod
    def _block_number(name: str, patterns: list[str] | None) -> int | None:
        parts = name.split(".")
        for before, part in itertools.pairwise(parts):
            if part.isdigit() and (not patterns or before in patterns):
                return int(part)
        return None

    def saved_names(self, entries: Iterable[str] | None, problems: Problems, *, strict: bool = True) -> list[str]:
        """Modules that `modules_to_save` means: whole names or ends of them, outermost only."""
        names, unmatched = self._by_suffix(list(entries or ()))
        if strict:
            for entry in unmatched:
                problems.add(f"modules_to_save entry {entry!r} matches no module.{did_you_mean(entry, self._leaves())}")
        return [n for n in names if not any(n.startswith(f"{other}.") for other in names)]


def matches_any(entries: Any, name: str) -> bool:
    """Whether a list of names or ends of names, or one regular expression, means this module."""
    if isinstance(entries, str):
        return re.fullmatch(entries, name) is not None
    return any(name == e or name.endswith(f".{e}") for e in entries)


def compact_names(chosen: list[str], everything: Iterable[str]) -> list[str]:
    """A short list of entries that means exactly the chosen modules: for each the shortest end of its name that means
    none but chosen ones."""
    ends: dict[str, bool] = {}  # end of a name -> whether only chosen modules have it
    chosen_set = set(chosen)
    for name in everything:
        parts = name.split(".")
        for i in range(len(parts)):
            end = ".".join(parts[i:])
            ends[end] = ends.get(end, True) and name in chosen_set
    entries = set()
    for name in chosen:
        parts = name.split(".")
        entries.add(next(end for i in reversed(range(len(parts))) if ends[end := ".".join(parts[i:])]))
    return sorted(entries)
