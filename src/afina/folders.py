"""Adapter folders: what `save_pretrained`, `load_adapter` and `push_to_hub` of an adapted model do.

A folder is checked before it is written and read back after; what is loaded must fit in every key, in its base and in its
tokenizer, or nothing is changed.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from afina.core import checkpoint
from afina.core.config import AdapterConfig, changed, resolve_file
from afina.core.files import read_weights
from afina.core.fingerprint import differences, fingerprint
from afina.core.injection import AdapterSet
from afina.core.plan import new_modules
from afina.core.registry import method_for
from afina.core.report import card
from afina.core.vocabulary import (
    fit_vocabulary,
    holds_one_side,
    resized_embeddings,
    take_embeddings,
    tokenizer_hash,
    vocabulary_rows,
)
from afina.errors import BaseMismatchError, CheckpointError, ConfigError

__all__ = ["AdapterFolders"]

logger = logging.getLogger("afina")
_NAMING = ("target_modules", "exclude_modules", "feedforward_modules", "modules_to_save")


class AdapterFolders(nn.Module):
    """The part of an adapted model that reads and writes folders."""

    adapters: AdapterSet
    prompt_encoder: nn.ModuleDict

    def get_base_model(self) -> nn.Module:
        """The model below the adapters."""
        raise NotImplementedError

    def _add(
        self, name: str, config: AdapterConfig, *, initialise: bool = True, strict: bool = True, bare: bool = False
    ) -> None:
        raise NotImplementedError

    def save_pretrained(
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        selected_adapters: Sequence[str] | None = None,
        save_embedding_layers: str | bool = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | None = None,
        tokenizer: Any = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Write each adapter to `save_directory`, those not called "default" to a folder of their name below it.

        What is written is checked and read back. `tokenizer` is saved along, and its hash is compared at loading.
        """
        if path_initial_model_for_weight_conversion is not None:
            raise ConfigError(
                "path_initial_model_for_weight_conversion: no initialisation of afina changes the base, so there is nothing "
                "to convert; leave it out"
            )
        if kwargs and not push_to_hub:
            raise ConfigError(f"save_pretrained() has no option {', '.join(kwargs)}; those of the hub need push_to_hub=True")
        if not safe_serialization:
            raise ConfigError("safe_serialization=False would write a pickle; afina reads such files but writes safetensors")
        folder = Path(save_directory)
        if folder.is_file():
            raise CheckpointError(f"{folder} is a file; give a folder to save into")
        names = list(selected_adapters or self.adapters.configs)
        self.adapters.check_names(names)
        states = {name: checkpoint.adapter_state(self.adapters, name) for name in names}
        if not is_main_process:
            return
        with self.adapters.unmerged():
            self._write(folder, states, save_embedding_layers, tokenizer)
        if push_to_hub:
            self._upload(folder, **kwargs)

    def _write(self, folder: Path, states: dict[str, Any], save_embedding_layers: str | bool, tokenizer: Any) -> None:
        for name, state in states.items():
            target = folder if name == "default" else folder / name
            config = changed(self.adapters.configs[name], inference_mode=True, peft_version=None)
            state = {**resized_embeddings(self.adapters, state, save_embedding_layers), **state}
            prompt: Any = self.adapters.prompts._modules.get(name)
            encoder = prompt.encoder_state() if prompt is not None else {}
            extra = {
                "format": 1,
                "base": fingerprint(self.adapters),
                "vocabulary": vocabulary_rows(self.adapters),
                "tokenizer": tokenizer_hash(tokenizer) if tokenizer is not None else None,
            }
            checkpoint.write_adapter(target, state, extra, encoder)
            config.save_pretrained(target)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        folder.mkdir(parents=True, exist_ok=True)
        readme, written = folder / "README.md", card(self.adapters, next(iter(states)))
        title = next(line for line in written.splitlines() if line.startswith("# "))
        there = readme.read_text(encoding="utf-8") if readme.exists() else None
        if there is None or ("\n- afina\n" in there and title not in there):  # a card of another adapter; one's own stays
            readme.write_text(written, encoding="utf-8")

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        max_shard_size: int | str | None = None,
        tags: Sequence[str] | None = None,
        selected_adapters: Sequence[str] | None = None,
        tokenizer: Any = None,
    ) -> Any:
        """Save into a temporary folder and upload it to a hub repository, which is created where there is none.

        `tags` go into the model card. `max_shard_size` changes nothing: an adapter is one file.
        """
        import tempfile

        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, selected_adapters=selected_adapters, tokenizer=tokenizer)
            return self._upload(
                Path(folder), repo_id, commit_message, commit_description, private, token, revision, create_pr, tags
            )

    @staticmethod
    def _upload(
        folder: Path,
        repo_id: str | None = None,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        tags: Sequence[str] | None = None,
    ) -> Any:
        from huggingface_hub import HfApi, ModelCard

        if tags:
            described = ModelCard.load(folder / "README.md")
            described.data.tags = [*(described.data.tags or []), *tags]
            described.save(folder / "README.md")
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id or folder.name, exist_ok=True, private=private).repo_id
        return api.upload_folder(
            repo_id=repo_id, folder_path=folder, commit_message=commit_message or "Upload adapter",
            commit_description=commit_description, revision=revision, create_pr=create_pr,
        )  # fmt: skip

    def load_adapter(
        self,
        model_id: str | Path,
        adapter_name: str,
        is_trainable: bool = False,
        torch_device: str | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: dict[str, str] | None = None,
        config: AdapterConfig | None = None,
        strict: bool = True,
        subfolder: str | None = None,
        tokenizer: Any = None,
        **hub: Any,
    ) -> checkpoint.LoadReport:
        """Load one more adapter beside those that are there; it is not active before `set_adapter`.

        Returns which keys were loaded, and with `strict=False` which did not fit. On an error nothing has changed.
        `key_mapping` holds regular expressions and what to put in their place in the file's keys, whose prefix
        `base_model.model.` is left out of account; of several, the first that matches a key is used. `torch_device` and
        `low_cpu_mem_usage` change nothing: an adapter lies where its layer lies and is made without values.
        """
        if ephemeral_gpu_offload:
            raise ConfigError("ephemeral_gpu_offload=True is not done; leave it out")
        source = f"{model_id}/{subfolder}" if subfolder else str(model_id)
        self.adapters.check_new_name(adapter_name)
        config = config or AdapterConfig.from_pretrained(model_id, subfolder=subfolder, **hub)
        config.check_file(source)
        config = changed(config, inference_mode=not is_trainable)
        if not autocast_adapter_dtype:
            config.autocast_adapter_dtype = False  # type: ignore[attr-defined,union-attr]
        state = checkpoint.read_state(model_id, subfolder, **hub)
        if key_mapping:
            state = {_mapped(key, key_mapping): tensor for key, tensor in state.items()}
        extra = checkpoint.read_extra(model_id, subfolder, **hub)
        _check_tokenizer(extra, tokenizer, source, strict)
        unfit = fit_vocabulary(self.adapters, state, extra.get("vocabulary"), source)
        try:
            config = _retargeted(config, self.adapters, state)
            if getattr(config, "ensure_weight_tying", False) and not config.trainable_token_indices:  # type: ignore[union-attr]
                if holds_one_side(self.adapters, state):  # PEFT heeds the option for certain names of embeddings only
                    logger.warning(
                        "%s: ensure_weight_tying=True, but its embeddings were not tied; nor are they here", source
                    )
                    config = changed(config, ensure_weight_tying=False)
            self._add(adapter_name, config, initialise=not strict, strict=False, bare=True)
            if adapter_name in self.prompt_encoder:
                self._load_encoder(adapter_name, config, model_id, subfolder, hub, is_trainable)
            expected = checkpoint.adapter_state(self.adapters, adapter_name)
            embeddings = take_embeddings(self.adapters, state, expected, source)
            report = checkpoint.assign(state, expected, source, strict=strict, layers=self.adapters.paths)
            self._check_base(extra, report.renamed, source, strict)
            self._check_heads(adapter_name, source, strict)
        except Exception:
            self.adapters.remove(adapter_name)
            if not self.adapters.configs:
                self.adapters.unwrap()
            unfit()
            raise
        with torch.no_grad():
            for own, stored in embeddings:
                own.copy_(stored)
        self.adapters.set_trainable(adapter_name, is_trainable and adapter_name in self.adapters.active)
        return report

    def _load_encoder(self, name: str, config: Any, source: Any, subfolder: Any, hub: Any, trainable: bool) -> None:
        """Take up the network behind a prompt where the file has it and training is to go on."""
        path = resolve_file(source, checkpoint.ENCODER_NAME, subfolder=subfolder, required=False, **hub)
        if path is None or not trainable:
            return
        prompt = method_for(config).adapter(self.adapters.configs[name], self.get_base_model(), initialise=False)
        prompt.load_state_dict(read_weights(path))
        self.prompt_encoder[name] = prompt

    def _check_heads(self, name: str, source: str, strict: bool) -> None:
        """A head that neither the base's checkpoint nor the adapter's file holds would answer at random (T5)."""
        saved = self.adapters.injected[name].saved
        found = [n for n in new_modules(self.adapters.map) if not any(n == s or n.startswith(f"{s}.") for s in saved)]
        if heads := [n for n in found if n in self.adapters.map.head_names()]:
            message = (
                f"{source} does not hold {', '.join(heads)}, which was not in the base's checkpoint either and is newly "
                "initialised: it would answer at random (T5). Load a base that has it, or pass strict=False to train it anew"
            )
            if strict:
                raise CheckpointError(message)
            logger.warning(message)
        elif found:
            logger.warning("%s does not hold %s, which is newly initialised", source, ", ".join(found))

    def _check_base(self, extra: dict[str, Any], renamed: tuple[str, str] | None, source: str, strict: bool) -> None:
        old, new = (part.removeprefix(checkpoint.PREFIX) for part in renamed or ("", ""))
        with self.adapters.unmerged():
            found = differences(extra.get("base", {}), self.adapters, (old, new))
        if found and strict:
            raise BaseMismatchError(
                f"{source} was trained on another base: {'; '.join(found)}. Load it on its own base, or pass strict=False"
            )
        if found:
            logger.warning("%s was trained on another base: %s", source, "; ".join(found))


def _mapped(key: str, mapping: dict[str, str]) -> str:
    prefix = checkpoint.PREFIX if key.startswith(checkpoint.PREFIX) else ""
    for pattern, replacement in mapping.items():
        new, count = re.subn(pattern, replacement, key.removeprefix(prefix))
        if count:
            return prefix + new
    return key


def _retargeted(config: Any, adapters: AdapterSet, state: dict[str, torch.Tensor]) -> Any:
    """The configuration with whole names of layers in the prefixes of this model (T4).

    Where ends of names also mean layers beside the language model of a multimodal model, and the file has as many layers
    as the language model alone, it was trained on that.
    """
    known, scope = adapters.map.modules, adapters.map.scope
    lists = {n: v for n in _NAMING if isinstance(v := getattr(config, n, None), list)}
    if (
        isinstance(text := getattr(config, "target_modules", None), str)
        and text not in known
        and re.fullmatch(r"[\w.]+", text)
    ):
        lists["target_modules"] = [text] if "." in text else []
    patterns = {n: dict(getattr(config, n)) for n in config.overrides if getattr(config, n)}
    lists |= {f"{n}": [re.sub(r"\\(.)", r"\1", key) for key in table] for n, table in patterns.items()}
    change = None
    for entries in lists.values():
        dotted = [e for e in entries if "." in e and not any(n == e or n.endswith(f".{e}") for n in known)]
        if dotted and change is None:
            change = scope and checkpoint.find_prefix(dotted, [n for n in known if n.startswith(scope)])
            change = change or checkpoint.find_prefix(dotted, known)
    if change:
        old, new = change
        turn = lambda e: new + e[len(old) :] if e.startswith(old) and new + e[len(old) :] in known else e
        changes: dict[str, Any] = {n: [turn(e) for e in entries] for n, entries in lists.items() if n not in patterns}
        for name, table in patterns.items():
            plain = {turn(e): e for e in lists[name]}
            changes[name] = {
                re.escape(t) if t != e else key: value
                for (t, e), (key, value) in zip(plain.items(), table.items(), strict=True)
            }
        return changed(config, **changes)
    targets = lists.get("target_modules")
    if scope and targets:
        meant = adapters.map._by_suffix(targets)[0]
        inside = [n for n in meant if n.startswith(scope)]
        leaves = {n.rsplit(".", 1)[-1] for n in meant}
        stored = {key[: key.rindex(f".{leaf}.")] + leaf for key in state for leaf in leaves if f".{leaf}." in key}
        if len(meant) > len(inside) == len(stored):
            return changed(config, target_scope=[scope.rstrip(".")])
    return config


def _check_tokenizer(extra: dict[str, Any], tokenizer: Any, source: str, strict: bool) -> None:
    if tokenizer is None or not extra.get("tokenizer"):
        return
    if tokenizer_hash(tokenizer) != extra["tokenizer"]:
        message = (
            f"{source} was trained with another tokenizer (vocabulary or special tokens differ); use the one saved beside it"
        )
        if strict:
            raise BaseMismatchError(message)
        logger.warning(message)
