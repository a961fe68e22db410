"""`afina targets`: what a method would adapt in a model, without loading a single weight."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from afina.cli.show import console, heading, pairs, quiet

__all__ = ["targets"]


def targets(
    options: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Options of the method.")] = None,
    model: Annotated[str, typer.Option(help="minilm, a folder, or a hub id.")] = "minilm",
    method: Annotated[str, typer.Option(help="See `afina methods`.")] = "lora",
    task: Annotated[
        str, typer.Option(help="SEQ_CLS, CAUSAL_LM, SEQ_2_SEQ_LM, TOKEN_CLS, QUESTION_ANS, FEATURE_EXTRACTION.")
    ] = "SEQ_CLS",
) -> None:
    """Preview which layers are adapted, trained whole and frozen."""
    quiet()
    from afina.cli.assignments import method_options
    from afina.core.config import TaskType
    from afina.core.registry import get_method
    from afina.errors import ConfigError, Problems, did_you_mean
    from afina.training.models import find_model, load_config
    from afina.training.recipe import METHOD_DEFAULTS

    problems = Problems("afina targets")
    chosen: Any = None
    values: dict[str, Any] = {}
    try:
        chosen = get_method(method)
        values = method_options(options or [], chosen.config, chosen.name, problems)
    except ConfigError as error:
        problems.add(f"--method: {error}")
    tasks = [t.value for t in TaskType]
    if task.upper() not in tasks:
        problems.add(f"--task {task!r} is not a task.{did_you_mean(task.upper(), tasks)}")
    source = None
    try:
        source = find_model(model)
    except (ConfigError, ImportError) as error:
        problems.add(f"--model: {error}")
    problems.raise_as(ConfigError)
    assert source is not None
    config = chosen.make_config(**{**METHOD_DEFAULTS.get(method, {}), **values, "task_type": task.upper()})
    adapted = on_meta(load_config(source), task.upper(), config)
    trainable, total = adapted.get_nb_trainable_parameters()
    heading(f"{method} on {model} ({type(adapted.get_base_model()).__name__})")
    console().print(adapted.adapter_report(), markup=False)
    heading("In all")
    injected = adapted.adapters.injected["default"]
    pairs(
        {
            "adapted": f"{len(injected.adapted)} layers",
            "trained whole": ", ".join(injected.saved) or "nothing",
            "trained": f"{trainable:,} of {total:,} parameters ({trainable / total:.2%})",
            "in a file": f"about {4 * trainable / 2**20:.1f} MiB",
        }
    )


def on_meta(architecture: Any, task: str, config: Any) -> Any:
    """An adapted model without values, from a configuration."""
    import torch
    import transformers

    from afina.auto import AUTO_CLASSES
    from afina.errors import ConfigError
    from afina.functions import get_peft_model

    auto = getattr(transformers, AUTO_CLASSES[task])
    with torch.device("meta"):
        try:
            model = auto.from_config(architecture)
        except ValueError as error:
            raise ConfigError(
                f"--task {task}: transformers has no {AUTO_CLASSES[task]} for {architecture.model_type}"
            ) from error
        return get_peft_model(model, config)
