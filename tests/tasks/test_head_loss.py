"""The loss inside the output head is the loss of whole logits: same value, same gradients, same figures, less memory."""

from __future__ import annotations

import warnings
from contextlib import nullcontext

import pytest
import torch
import transformers as tf

import afina
from afina.tasks import head_loss
from afina.tasks.head_loss import (
    Aim,
    divergences,
    loss_sum,
    losses_and_hits,
    supervised,
    target_losses,
    why_whole,
)
from afina.tasks.output_head import Behind, behind_head

VOCABULARY = 101
SMALL = {"vocab_size": VOCABULARY, "initializer_range": 0.4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
WIDE = {"hidden_size": 20, "intermediate_size": 29, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 10, "max_position_embeddings": 61}  # fmt: skip


def llama():
    return tf.LlamaForCausalLM(tf.LlamaConfig(**SMALL, **WIDE))


def qwen2():
    return tf.Qwen2ForCausalLM(tf.Qwen2Config(**SMALL, **WIDE, tie_word_embeddings=True))


def gemma2():
    return tf.Gemma2ForCausalLM(
        tf.Gemma2Config(**SMALL, **WIDE, final_logit_softcapping=3.0, sliding_window=7, attn_implementation="eager")
    )


def cohere():
    return tf.CohereForCausalLM(tf.CohereConfig(**SMALL, **WIDE, logit_scale=0.3))


def granite():
    return tf.GraniteForCausalLM(tf.GraniteConfig(**SMALL, **WIDE, logits_scaling=0.7))


def gpt2():
    return tf.GPT2LMHeadModel(
        tf.GPT2Config(vocab_size=VOCABULARY, n_embd=20, n_layer=2, n_head=2, n_positions=61, resid_pdrop=0.0, embd_pdrop=0.0,
                      attn_pdrop=0.0, initializer_range=0.4, bos_token_id=1, eos_token_id=2)
    )  # fmt: skip


def opt():
    return tf.OPTForCausalLM(
        tf.OPTConfig(vocab_size=VOCABULARY, hidden_size=20, num_hidden_layers=2, num_attention_heads=2, ffn_dim=29,
                     word_embed_proj_dim=14, max_position_embeddings=61, dropout=0.0, init_std=0.4)
    )  # fmt: skip


def t5(tied=True):
    return tf.T5ForConditionalGeneration(
        tf.T5Config(vocab_size=VOCABULARY, d_model=20, d_kv=10, d_ff=29, num_layers=2, num_heads=2, dropout_rate=0.0,
                    tie_word_embeddings=tied, decoder_start_token_id=0)
    )  # fmt: skip


def bart():
    model = tf.BartForConditionalGeneration(
        tf.BartConfig(vocab_size=VOCABULARY, d_model=20, encoder_layers=1, decoder_layers=2, encoder_attention_heads=2,
                      decoder_attention_heads=2, encoder_ffn_dim=29, decoder_ffn_dim=29, max_position_embeddings=61,
                      dropout=0.0, init_std=0.4, decoder_start_token_id=2)
    )  # fmt: skip
    model.final_logits_bias.normal_(generator=torch.Generator().manual_seed(5))
    return model


MODELS = {"Llama": llama, "Qwen2": qwen2, "Gemma2": gemma2, "Cohere": cohere, "Granite": granite, "GPT-2": gpt2, "OPT": opt,
          "T5": t5, "T5 untied": lambda: t5(tied=False), "BART": bart}  # fmt: skip
METHODS = {
    "lora": lambda kind: afina.LoraConfig(r=3, target_modules="all-linear", task_type=kind, init_lora_weights=False),
    "head too": lambda kind: afina.LoraConfig(
        r=3, target_modules=["lm_head", "q_proj", "c_attn", "q"], task_type=kind, init_lora_weights=False
    ),
    "dora head": lambda kind: afina.LoraConfig(
        r=3, target_modules=["lm_head"], use_dora=True, task_type=kind, init_lora_weights=False
    ),
    "tied sides": lambda kind: afina.LoraConfig(
        r=3, target_modules=["lm_head"], ensure_weight_tying=True, task_type=kind, init_lora_weights=False
    ),
    "whole head": lambda kind: afina.LoraConfig(
        r=3, modules_to_save=["lm_head"], ensure_weight_tying=True, task_type=kind, init_lora_weights=False
    ),
    "tokens": lambda kind: afina.TrainableTokensConfig(token_indices=[3, 17, 29], init_weights=False, task_type=kind),
    "prompt": lambda kind: afina.PromptTuningConfig(num_virtual_tokens=3, task_type=kind),
    "prefix": lambda kind: afina.PrefixTuningConfig(num_virtual_tokens=3, task_type=kind),
    "last layers": lambda kind: afina.LastLayersConfig(num_layers=1, task_type=kind),
    "head alone": lambda kind: afina.LastLayersConfig(num_layers=0, final_norm=False, task_type=kind),
}
CASES = [
    *((name, method) for name in ("Llama", "GPT-2", "T5", "BART") for method in METHODS),
    *((name, method) for name in MODELS for method in ("lora", "head too", "tokens")),
]


def adapted(name, method):
    torch.manual_seed(2)
    base = MODELS[name]()
    config = METHODS[method]("SEQ_2_SEQ_LM" if base.config.is_encoder_decoder else "CAUSAL_LM")
    if hasattr(config, "target_modules") and isinstance(config.target_modules, list):
        names = [path.rpartition(".")[2] for path, _ in base.named_modules()]
        config.target_modules = [target for target in config.target_modules if target in names]
    return afina.get_peft_model(base, config).train()


def task(model, rows=5, length=13):
    """What a model is called with, and where its targets are: few in one row, none in another."""
    made = torch.Generator().manual_seed(4)
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=made)
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    labels = ids.masked_fill(torch.rand(ids.shape, generator=made) < 0.4, -100).masked_fill(mask == 0, -100)
    labels[2] = -100
    inputs = {"input_ids": ids, "attention_mask": mask}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids.flip(1)
        at, places = supervised(labels)
        return inputs, Aim(at, places, labels[at, places], length)
    at, places = supervised(labels[:, 1:])
    return inputs, Aim(at, places, labels[at, places + 1], length)


@pytest.fixture
def whole(monkeypatch):
    """Calls a function with whole logits instead."""

    def call(function, *args, **options):
        with monkeypatch.context() as patch:
            patch.setattr(head_loss, "behind_head", lambda base: "asked")
            return function(*args, **options)

    return call


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Seven targets a chunk."""
    monkeypatch.setattr(head_loss, "_VALUES", 7 * VOCABULARY + 5)


def gradients(model, value):
    model.zero_grad()
    value.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def compare(found, wanted, rtol=2e-4):
    assert found.keys() == wanted.keys()
    assert wanted
    size = max(float(g.abs().max()) for g in wanted.values())
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=rtol, atol=rtol * size, msg=name)


@pytest.mark.parametrize(("name", "method"), dict.fromkeys(CASES))
def test_loss_gradients_and_figures_are_those_of_whole_logits(name, method, whole):
    model = adapted(name, method)
    assert why_whole(model) is None
    inputs, aim = task(model)
    expected = whole(loss_sum, model, inputs, aim)
    wanted = gradients(model, expected)
    found = loss_sum(model, inputs, aim)
    assert found.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    compare(gradients(model, found / 3 * 3), wanted)
    losses, hits = losses_and_hits(model, inputs, aim)
    theirs, theirs_hits = whole(losses_and_hits, model, inputs, aim)
    torch.testing.assert_close(losses, theirs, rtol=1e-5, atol=1e-5)
    assert torch.equal(hits, theirs_hits)
    assert float(losses.sum()) == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("name", ["Llama", "GPT-2", "Gemma2", "Cohere", "Granite", "BART"])
@pytest.mark.parametrize("method", ["lora", "head too", "tokens"])
def test_each_target_takes_a_gradient_of_its_own(name, method, whole):
    model = adapted(name, method)
    inputs, aim = task(model)
    weights = torch.randn(len(aim.rows), generator=torch.Generator().manual_seed(6))
    expected = whole(target_losses, model, inputs, aim, temperature=1.7)
    wanted = gradients(model, (expected * weights).sum())
    found = target_losses(model, inputs, aim, temperature=1.7)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    compare(gradients(model, (found * weights).sum()), wanted)
    with torch.no_grad():
        torch.testing.assert_close(target_losses(model, inputs, aim, temperature=1.7), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["Llama", "Gemma2", "BART"])
@pytest.mark.parametrize("method", ["lora", "head too"])
def test_divergences_are_those_of_whole_distributions(name, method):
    model = adapted(name, method)
    inputs, aim = task(model)
    own, other, apart = divergences(model, inputs, aim, model.disable_adapter)
    scores = []
    for state in (nullcontext(), model.disable_adapter()):
        with state, torch.no_grad():
            scores.append(model(**inputs).logits[:, -aim.width :][aim.rows, aim.places].double().log_softmax(1))
    for losses, said in ((own, scores[0]), (other, scores[1])):
        torch.testing.assert_close(losses, -said.gather(1, aim.tokens[:, None])[:, 0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(apart, (scores[0].exp() * (scores[0] - scores[1])).sum(1), rtol=1e-4, atol=1e-6)
    assert float(apart.min()) >= 0.0
    assert float(apart.max()) > 1e-3


@pytest.mark.parametrize("name", ["Llama", "Gemma2", "BART"])
@pytest.mark.parametrize("method", ["lora", "head too"])
def test_label_smoothing(name, method, whole):
    model = adapted(name, method)
    inputs, aim = task(model)
    expected = whole(loss_sum, model, inputs, aim, label_smoothing=0.3)
    wanted = gradients(model, expected)
    found = loss_sum(model, inputs, aim, label_smoothing=0.3)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    compare(gradients(model, found), wanted)


@pytest.mark.parametrize("name", ["Llama", "GPT-2", "BART"])
@pytest.mark.parametrize("method", ["lora", "head too", "whole head"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
def test_sixteen_bits(name, method, stored, whole):
    model = adapted(name, method)
    model.get_base_model().to(stored)
    for adapter in model.adapters.adapters("default"):
        adapter.float()
    inputs, aim = task(model)
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = whole(loss_sum, model, inputs, aim), loss_sum(model, inputs, aim)
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)
    compare(gradients(model, found), gradients(model, expected), rtol=0.1)


@pytest.mark.parametrize("name", ["Llama", "T5"])
@pytest.mark.parametrize("method", ["lora", "head too", "whole head", "tokens"])
def test_checkpointed_blocks(name, method, whole):
    model = adapted(name, method)
    inputs, aim = task(model)
    wanted = gradients(model, whole(loss_sum, model, inputs, aim))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable({"use_reentrant": False})
    compare(gradients(model, loss_sum(model, inputs, aim)), wanted)


def test_a_second_backward_is_an_error_and_not_a_wrong_gradient():
    model = adapted("Llama", "head too")
    loss = loss_sum(model, *task(model))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError):
        loss.backward()


def test_no_target_at_all_is_no_loss():
    model = adapted("Llama", "lora")
    inputs, aim = task(model)
    none = Aim(aim.rows[:0], aim.places[:0], aim.tokens[:0], aim.width)
    assert loss_sum(model, inputs, none).item() == 0.0
    losses, hits = losses_and_hits(model, inputs, none)
    assert losses.shape == hits.shape == (0,)


def test_the_head_is_as_before_after_an_error():
    model = adapted("Llama", "lora")
    inputs, aim = task(model)
    before = loss_sum(model, inputs, aim)
    with pytest.raises(IndexError):
        loss_sum(model, inputs, Aim(aim.rows, aim.places + 61, aim.tokens, aim.width))
    assert "forward" not in model.get_output_embeddings().__dict__
    torch.testing.assert_close(loss_sum(model, inputs, aim), before)
    assert model(**inputs).logits.shape == (5, 13, VOCABULARY)


@pytest.mark.parametrize(
    ("name", "behind"),
    [("Llama", Behind()), ("T5", Behind()), ("Gemma2", Behind(cap=3.0)), ("Cohere", Behind(scale=0.3)),
     ("Granite", Behind(scale=1 / 0.7))],
)  # fmt: skip
def test_what_stands_behind_the_head_is_found(name, behind):
    found = behind_head(MODELS[name]())
    assert isinstance(found, Behind)
    assert found.scale == pytest.approx(behind.scale, rel=1e-6)
    assert found.cap == pytest.approx(behind.cap)
    assert found.shift is None


def test_a_shift_is_found_again_for_another_vocabulary():
    model = bart()
    torch.testing.assert_close(behind_head(model).shift, model.final_logits_bias[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.resize_token_embeddings(VOCABULARY + 6, mean_resizing=False)
    assert len(behind_head(model).shift) == VOCABULARY + 6


class Squared(tf.LlamaForCausalLM):
    """Does with its logits what nobody has heard of."""

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits * out.logits.abs()
        return out


class Neighbours(tf.LlamaForCausalLM):
    """Mixes the logits of neighbouring tokens."""

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits + 0.1 * out.logits.roll(1, -1)
        return out


@pytest.mark.parametrize("cls", [Squared, Neighbours])
def test_t35_an_unknown_formula_behind_the_head_is_told_and_done_with_whole_logits(cls):
    torch.manual_seed(2)
    base = cls(tf.LlamaConfig(**SMALL, **WIDE))
    inputs, aim = task(base)
    logits = base(**inputs).logits[aim.rows, aim.places]
    expected = torch.nn.functional.cross_entropy(logits, aim.tokens, reduction="sum")
    model = afina.get_peft_model(base, afina.LoraConfig(r=3, task_type="CAUSAL_LM"))
    assert cls.__name__ in why_whole(model)
    torch.testing.assert_close(loss_sum(model, inputs, aim), expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(losses_and_hits(model, inputs, aim)[0].sum().float(), expected, rtol=1e-5, atol=1e-4)


def largest(function, *args):
    """Values of the largest tensor that comes to be."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):
        most = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else [out]:
                if isinstance(tensor, torch.Tensor):
                    self.most = max(self.most, tensor.numel())
            return out

    with Watch() as watch:
        made = function(*args)
        if made[0].requires_grad if isinstance(made, tuple) else made.requires_grad:
            made.backward()
    return watch.most


@pytest.mark.parametrize("method", ["lora", "head too", "tokens"])
def test_t32_whole_logits_are_never_there(method, whole):
    model = adapted("Llama", method)
    inputs, aim = task(model, rows=11, length=37)
    chunk, logits = 8 * VOCABULARY, 11 * 37 * VOCABULARY
    weights = max(p.numel() for p in model.parameters())
    activations = 11 * 37 * 37
    for function in (loss_sum, losses_and_hits):
        assert largest(function, model, inputs, aim) <= max(chunk, weights, activations) < logits
    assert largest(whole, loss_sum, model, inputs, aim) == logits


def test_it_runs_on_the_meta_device():
    with torch.device("meta"):
        base = llama()
    model = afina.get_peft_model(base, afina.LoraConfig(r=3, task_type="CAUSAL_LM"))
    labels = torch.zeros(3, 7, dtype=torch.long, device="meta")
    rows, places = supervised(labels)
    assert len(rows) == 21
    inputs = {"input_ids": labels, "attention_mask": torch.zeros(3, 1, 7, 7, device="meta")}
    loss_sum(model, inputs, Aim(rows, places, labels[rows, places], 7)).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
