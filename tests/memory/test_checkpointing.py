"""Blocks computed again: asked for in a recipe, with every way of adapting a model that writes, or refused with the cure."""

from __future__ import annotations

import json

import pytest
import torch
from language_bases import save

import afina
from afina.errors import ConfigError
from afina.memory.checkpointing import checkpoint_blocks
from afina.tasks.task import Rows
from afina.training.recipe import Recipe
from afina.training.run import prepare

ROWS = [{"prompt": f"Say {word}.", "response": f"{word} it is"} for word in
        ("fox", "dog", "sea", "red", "one", "two", "quick", "brown", "lazy", "fruit", "Oslo", "Norway")]  # fmt: skip


def prepared(folder, architecture, method, **memory):
    """A run of the recipe, before it trains."""
    base = folder / architecture
    if not base.exists():
        save(base, architecture)
        rows = [r if architecture in ("Llama", "GPT-2") else {"text": r["prompt"], "summary": r["response"]} for r in ROWS]
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = Recipe()
    recipe.task = {"name": "causal_lm" if architecture in ("Llama", "GPT-2") else "seq2seq", "generate": False}
    recipe.model, recipe.method = str(base), method
    recipe.data.file = str(folder / "rows.jsonl")
    recipe.training.precision = "fp32"
    for name, value in memory.items():
        setattr(recipe.memory, name, value)
    return prepare(recipe, None, trial=True)


def gradients(run):
    features = run.rows["train"].features
    batch = run.task.collate([features[i] for i in range(3)])
    run.model.train()
    run.model.zero_grad()
    torch.manual_seed(5)
    run.task.loss_sum(run.model, batch).backward()
    return {name: p.grad.clone() for name, p in run.model.named_parameters() if p.grad is not None}


METHODS = {
    "lora": {"name": "lora", "r": 3}, "last layers": {"name": "last_layers"},
    "prompt": {"name": "prompt_tuning", "num_virtual_tokens": 3},
    "prefix": {"name": "prefix_tuning", "num_virtual_tokens": 3},
    "tokens": {"name": "trainable_tokens", "token_indices": [5, 7]},
}  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("architecture", ["Llama", "T5"])
def test_t37_a_recipe_that_asks_for_it_has_the_same_gradients(architecture, method, tmp_path):
    if (architecture, method) == ("T5", "prefix"):
        with pytest.raises(ConfigError, match=r"memory\.gradient_checkpointing: prefix tuning of T5.*hands its prefix over"):
            prepared(tmp_path, architecture, dict(METHODS[method]), gradient_checkpointing=True)
        return
    wanted = gradients(prepared(tmp_path, architecture, dict(METHODS[method])))
    run = prepared(tmp_path, architecture, dict(METHODS[method]), gradient_checkpointing=True)
    assert any(getattr(m, "gradient_checkpointing", False) for m in run.model.modules())
    found = gradients(run)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


def test_embeddings_take_no_gradient_for_it(tmp_path):
    """Only the older kind of checkpointing needs that."""
    run = prepared(tmp_path, "Llama", dict(METHODS["lora"]), gradient_checkpointing=True)
    assert not run.model.get_base_model().get_input_embeddings()(torch.tensor([[1, 2]])).requires_grad


def test_a_model_that_cannot_is_refused():
    import transformers as tf

    model = tf.MobileNetV2ForImageClassification(tf.MobileNetV2Config(num_labels=3))
    model = afina.get_peft_model(model, afina.LoraConfig(r=3, target_modules=["classifier"]))
    with pytest.raises(ConfigError, match="cannot compute its blocks again; leave it out"):
        checkpoint_blocks(model)


def test_offload_on_a_cpu_is_refused_before_anything_is_loaded(tmp_path):
    with pytest.raises(ConfigError, match=r"memory\.activation_offload: this run computes on the CPU"):
        prepared(tmp_path, "Llama", dict(METHODS["lora"]), activation_offload=True)


def test_t35_the_slower_way_is_told_before_the_run(tmp_path):
    assert not [note for note in prepared(tmp_path, "GPT-2", dict(METHODS["lora"])).notes if "LoRA layers" in note]
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    told = prepared(tmp_path, "Llama", {"name": "lora", "r": 3, "target_modules": ["q_proj"]}, weights="int8").notes
    assert [note for note in told if "2 of 2 LoRA layers take the slower path" in note and "computes in its own way" in note]


def test_t32_evaluation_holds_no_whole_logits(tmp_path, monkeypatch):
    from torch.utils._python_dispatch import TorchDispatchMode

    from afina.tasks import head_loss
    from afina.training.loop import make_engine, predict

    class Watch(TorchDispatchMode):
        most = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else [out]:
                known = not isinstance(tensor, torch.Tensor) or tensor.untyped_storage().data_ptr() in weights
                if not known and tensor.dim() and tensor.shape[-1] == size:
                    self.most = max(self.most, tensor.numel() // size)
            return out

    run = prepared(tmp_path, "Llama", dict(METHODS["lora"]))
    size = run.model.get_base_model().config.vocab_size
    weights = {p.untyped_storage().data_ptr() for p in run.model.parameters()}
    monkeypatch.setattr(head_loss, "_VALUES", 5 * size)
    rows: Rows = run.rows["train"]
    targets = run.task.targets_in(run.task.collate(list(rows.features)))
    with Watch() as watch:
        answers = predict(run.model, run.task, rows, len(rows.features), make_engine("fp32"))
    assert sum(a.foretold.tokens for a in answers) == targets > 20
    assert watch.most <= 5


@pytest.mark.parametrize("name", ["BERT", "GPT-2"])
def test_t37_blocks_that_end_in_a_norm_have_the_same_gradients(name):
    """What a block gives must not be computed again out of what the block keeps, for it keeps nothing."""
    import transformers as tf

    from afina.memory.step import lean_step

    def made():
        torch.manual_seed(0)
        if name == "BERT":
            sizes = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 131}
            base = tf.BertForSequenceClassification(tf.BertConfig(vocab_size=97, **sizes))
        else:
            base = tf.GPT2ForSequenceClassification(
                tf.GPT2Config(vocab_size=97, n_embd=64, n_layer=3, n_head=2, pad_token_id=0, bos_token_id=1, eos_token_id=1)
            )
        config = afina.LoraConfig(task_type="SEQ_CLS", r=3, target_modules="all-linear", init_lora_weights=False)
        return afina.get_peft_model(base, config).train()

    ids = torch.randint(2, 97, (13, 61), generator=torch.Generator().manual_seed(3))  # tensors that are worth the work
    found = {}
    for again in (False, True):
        model = made()
        lean_step(model, torch.device("cpu"), gradient_checkpointing=again)
        torch.manual_seed(5)
        model(input_ids=ids).logits.logsumexp(-1).sum().backward()
        found[again] = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert found[True].keys() == found[False].keys()
    for n, gradient in found[False].items():
        torch.testing.assert_close(found[True][n], gradient, rtol=1e-4, atol=1e-5, msg=n)
