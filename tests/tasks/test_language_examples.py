"""The recipes for language models under examples/ do what they say, on the data they name and on models that are at hand."""

from __future__ import annotations

from pathlib import Path

import pytest
from language_bases import save

from afina.tasks.catalogue import find_task
from afina.training.recipe import read_recipe
from afina.training.run import prepare

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared" / "data"
STORIES = SHARED / "models" / "stories260K-llama"
EXAMPLES = {
    "instructions": "instructions/instruction-data.json",
    "continued_pretraining": "lm_corpus/tiny_shakespeare.txt",
    "summarisation": "summarisation/train_flat.jsonl",
    "translation": "translation/eng_cat.csv",
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_can_be_run(name, tmp_path):
    recipe = read_recipe(ROOT / "examples" / f"{name}.yaml")
    assert recipe.data.file == Path(EXAMPLES[name]).name
    if not (SHARED / EXAMPLES[name]).is_file():
        pytest.skip(f"../shared/data/{EXAMPLES[name]} is absent")
    recipe.data.file = _begin(SHARED / EXAMPLES[name], tmp_path)
    recipe.training.max_truncated = 1.0  # the tiny tokenizer makes several tokens of a word
    recipe.training.max_length = 127
    task = find_task(recipe.task["name"])
    recipe.model = str(save(tmp_path / "base", "Llama" if task.name == "causal_lm" else "T5"))
    run = prepare(recipe, tmp_path / "run")
    assert run.task.name == task.name
    _, tokens, aimed = run.example()
    assert len(tokens) == len(aimed)
    assert any(aimed)
    if name == "instructions":
        assert run.columns == {"text": "instruction", "text_pair": "input", "label": "output"}
    elif name == "summarisation":
        assert "".join(tokens).replace("Ġ", " ").startswith("summarize: ")


def _begin(file, folder):
    """The first rows of a file, in a file of the same form."""
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".json":
        import json

        text = json.dumps(json.loads(text)[:60])
    else:
        text = "\n".join(text.split("\n")[:60]) + "\n"
    (folder / file.name).write_text(text, encoding="utf-8")
    return str(folder / file.name)


@pytest.mark.skipif(not STORIES.is_dir(), reason="../shared/data/models/stories260K-llama is absent")
def test_a_real_model_gains_on_real_instructions_and_prose(tmp_path):
    """In a fraction of an epoch, against the same model without its adapter and against frequencies."""
    for name in ("instructions", "continued_pretraining"):
        recipe = read_recipe(ROOT / "examples" / f"{name}.yaml")
        recipe.model, recipe.training.epochs, recipe.training.learning_rate = str(STORIES), 2, 5e-3
        recipe.training.max_length, recipe.training.precision = 208 if name == "instructions" else 64, "fp32"
        recipe.task["generate"] = False
        file = SHARED / EXAMPLES[name]
        if name == "instructions":
            import json

            (tmp_path / "rows.json").write_text(json.dumps(json.loads(file.read_text())[:220]), encoding="utf-8")
            recipe.data.file = str(tmp_path / "rows.json")
        else:
            (tmp_path / "book.txt").write_text(file.read_text(encoding="utf-8")[:30_000], encoding="utf-8")
            recipe.data.file = str(tmp_path / "book.txt")
        metrics = prepare(recipe, tmp_path / name).execute()
        test, baselines = metrics["test"], metrics["baselines"]
        assert test["loss"] < baselines["untuned"]["loss"] - 1.0, name
        assert test["loss"] < baselines["frequencies"]["loss"] - 0.7, name
        assert test["token_accuracy"] > baselines["untuned"]["token_accuracy"] + 0.05, name
