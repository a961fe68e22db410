"""What is not kept for backward is computed again, with the same bits; what is kept is less."""

from __future__ import annotations

import contextlib

import pytest
import torch
import transformers as tf
from torch import nn

import afina
from afina.core import lowrank
from afina.core.registry import methods
from afina.memory import keeping, offload
from afina.memory.activations import use_fused_activations
from afina.memory.keeping import keep_less
from afina.memory.offload import activation_mover
from afina.memory.step import lean_step, slower_layers

WIDE = {"vocab_size": 61, "hidden_size": 20, "intermediate_size": 29, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 10, "max_position_embeddings": 61}  # fmt: skip


def llama():
    return tf.LlamaForCausalLM(tf.LlamaConfig(**WIDE))


def gpt2():
    return tf.GPT2LMHeadModel(
        tf.GPT2Config(vocab_size=61, n_embd=20, n_layer=2, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    )


def bloom():
    return tf.BloomForCausalLM(
        tf.BloomConfig(vocab_size=61, hidden_size=20, n_layer=2, n_head=2, hidden_dropout=0.0, attention_dropout=0.0)
    )


def t5():
    return tf.T5ForConditionalGeneration(
        tf.T5Config(vocab_size=61, d_model=20, d_kv=10, d_ff=29, num_layers=2, num_heads=2, dropout_rate=0.0,
                    feed_forward_proj="gated-gelu", decoder_start_token_id=0)
    )  # fmt: skip


MODELS = {"llama": llama, "gpt2": gpt2, "bloom": bloom, "t5": t5}
TOKENS = {"trainable_tokens": {"token_indices": [1, 2]}, "prompt_tuning": {"num_virtual_tokens": 3},
          "p_tuning": {"num_virtual_tokens": 3}, "prefix_tuning": {"num_virtual_tokens": 3}}  # fmt: skip


@pytest.fixture(autouse=True)
def everything_counts(monkeypatch):
    """Tensors of any size."""
    monkeypatch.setattr(keeping, "_SMALLEST", 1)
    monkeypatch.setattr(offload, "_SMALLEST", 1)


def adapted(name, method="lora", dtype=torch.float32, **options):
    torch.manual_seed(3)
    base = MODELS[name]().to(dtype)
    kind = "SEQ_2_SEQ_LM" if base.config.is_encoder_decoder else "CAUSAL_LM"
    given = {"lora": {"r": 3, "init_lora_weights": False}} | TOKENS
    config = methods()[method].make_config(task_type=kind, **given.get(method, {}), **options)
    return afina.get_peft_model(base, config).train()


def gradients(model, autocast=False):
    ids = torch.randint(0, 61, (3, 11), generator=torch.Generator().manual_seed(1))
    model.zero_grad()
    torch.manual_seed(5)
    with torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext():
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def equal(found, wanted, **tolerance):
    assert found.keys() == wanted.keys()
    assert wanted
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, **(tolerance or {"rtol": 0, "atol": 0}), msg=name)


@pytest.mark.parametrize("arithmetic", ["fp32", "bf16", "bf16 over fp32 weights"])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_the_same(name, arithmetic):
    model = adapted(name, dtype=torch.bfloat16 if arithmetic == "bf16" else torch.float32)
    wanted = gradients(model, autocast=arithmetic != "fp32")
    keep_less(model)
    exact = name in ("llama", "t5")  # a layer norm is the same to rounding alone
    tolerance = {} if exact else {"rtol": 1e-4, "atol": 1e-5} if arithmetic == "fp32" else {"rtol": 0.1, "atol": 0.02}
    equal(gradients(model, autocast=arithmetic != "fp32"), wanted, **tolerance)


@pytest.mark.parametrize("method", methods())
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_gradients_are_the_same_for_every_method(name, method):
    name = "gpt2" if method == "bitfit" else name  # the other has no biases
    model = adapted(name, method)
    wanted = gradients(model)
    lean_step(model, torch.device("cpu"))
    equal(gradients(model), wanted, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("options", [{"lora_dropout": 0.3}, {"lora_bias": True, "target_modules": ["c_attn", "c_proj"]},
                                     {"use_dora": True}])  # fmt: skip
def test_gradients_are_the_same_beside_dropout_bias_and_dora(options):
    model = adapted("gpt2", **options)
    wanted = gradients(model)
    keep_less(model)
    equal(gradients(model), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["lora", "last_layers", "prefix_tuning"])
def test_checkpointed_blocks_too(method):
    model = adapted("llama", method)
    wanted = gradients(model)
    lean_step(model, torch.device("cpu"), gradient_checkpointing=True)
    equal(gradients(model), wanted, rtol=1e-4, atol=1e-6)


def kept(model, autocast=False):
    """Bytes kept for backward beside the parameters."""
    live, held = {}, []
    inner = torch.autograd.graph.saved_tensors_hooks

    class Watched(inner):
        def __init__(self, pack, unpack):
            def watched(tensor):
                made = pack(tensor)
                for one in (made, getattr(made, "kept", None)):
                    if isinstance(one, torch.Tensor):
                        held.append(one)
                        live[one.untyped_storage().data_ptr()] = one.untyped_storage().nbytes()
                return made

            super().__init__(watched, unpack)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keeping, "saved_tensors_hooks", Watched)
        lean_step(model, torch.device("cpu"))
        gradients(model, autocast)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    return sum(size for place, size in live.items() if place not in own)


class Everything(keeping._Keeping):
    """Keeps what autograd would."""

    def pack(self, tensor):
        return tensor.detach()


@pytest.mark.parametrize(("name", "autocast", "most"), [("llama", False, 0.75), ("llama", True, 0.8), ("gpt2", False, 0.7),
                                                        ("bloom", False, 0.8), ("t5", False, 0.75)])  # fmt: skip
def test_less_is_kept(name, autocast, most, monkeypatch):
    monkeypatch.setattr(lowrank, "_FEW", 0)  # which keeps narrow copies of small weights for few rows
    less = kept(adapted(name, target_modules="all-linear"), autocast)
    monkeypatch.setattr(keeping, "_Keeping", Everything)
    monkeypatch.setattr("afina.memory.step.use_fused_activations", lambda model: 0)
    assert less < most * kept(adapted(name, target_modules="all-linear"), autocast)


def test_a_narrow_source_is_kept_once():
    keep, x = keeping._Keeping(None, again=True), torch.randn(5, 7).bfloat16().requires_grad_()
    wide = (x + 1).float()
    first, second = keep.pack(wide), keep.pack(wide)
    assert first is second
    assert first.kept.dtype == torch.bfloat16
    assert torch.equal(keep.unpack(first), wide)


def test_what_several_layers_read_is_computed_again_once(monkeypatch):
    computed = []
    plain = keeping._OF_SAVED["NativeLayerNormBackward0"]
    monkeypatch.setitem(keeping._OF_SAVED, "NativeLayerNormBackward0", lambda node: computed.append(node) or plain(node))
    model = tf.BertForSequenceClassification(
        tf.BertConfig(vocab_size=61, hidden_size=20, num_hidden_layers=2, num_attention_heads=2, intermediate_size=29)
    )
    model = afina.get_peft_model(model, afina.LoraConfig(r=3, target_modules="all-linear")).train()
    keep_less(model)
    for _ in range(2):
        computed.clear()
        loss = model(input_ids=torch.arange(33).view(3, 11)).logits.sum()
        loss.backward()
        # the norm before each feed-forward part, and the one that query, key and value of the second block read
        assert len(computed) == len(set(map(id, computed))) == 3


def test_a_second_derivative_is_the_same():
    def second(model):
        x = torch.randn(3, 5, generator=torch.Generator().manual_seed(1)).requires_grad_()
        y = model(x)
        (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0]

    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(5, 7), nn.Linear(5, 7)

        def forward(self, x):
            return nn.functional.silu(self.one(x)) * self.two(x)

    model = Gated()
    wanted = second(model)
    keep_less(model)
    torch.testing.assert_close(second(model), wanted)


def test_what_is_computed_again_may_lie_otherwise_in_memory():
    """As in Whisper, whose first norm reads the channels of a convolution."""

    class Turned(nn.Module):
        def __init__(self):
            super().__init__()
            self.front, self.norm, self.after = nn.Conv1d(5, 7, 3), nn.LayerNorm(7), nn.Linear(7, 11)

        def forward(self, x):
            normed = self.norm(self.front(x).permute(0, 2, 1))
            return self.after(normed.view(-1, 7)).square().sum()

    model, x = Turned(), torch.randn(2, 5, 13)
    parameters = list(model.parameters())
    wanted = torch.autograd.grad(model(x), parameters)
    keep_less(model)
    for one, other in zip(torch.autograd.grad(model(x), parameters), wanted, strict=True):
        torch.testing.assert_close(one, other)


# --- activation functions


@pytest.mark.parametrize("name", ["NewGELUActivation", "FastGELUActivation", "AccurateGELUActivation", "BloomGelu"])
def test_one_operation_is_the_formula(name):
    from transformers.models.bloom.modeling_bloom import BloomGelu

    theirs = BloomGelu() if name == "BloomGelu" else getattr(tf.activations, name)()
    holder = nn.Sequential(theirs.train())
    assert use_fused_activations(holder) == 1
    x, other = (torch.linspace(-9, 9, 101).requires_grad_() for _ in range(2))
    torch.testing.assert_close(holder(x), theirs(other), rtol=1e-5, atol=1e-6)
    holder(x).sum().backward()
    theirs(other).sum().backward()
    torch.testing.assert_close(x.grad, other.grad, rtol=1e-4, atol=1e-5)


def test_other_activations_stay():
    holder = nn.Sequential(nn.GELU(), nn.SiLU(), tf.activations.QuickGELUActivation())
    assert use_fused_activations(holder) == 0


# --- offload


@pytest.mark.parametrize("name", MODELS)
def test_offloaded_tensors_come_back_as_they_were(name):
    """The same code, on a device whose memory is the host's: what is moved out is a copy, and the copy is used."""
    model = adapted(name)
    wanted = gradients(model)
    mover, out = offload._Mover(torch.device("cpu")), []
    pack = mover.pack

    def watched(tensor):
        made = pack(tensor)
        if isinstance(made, offload._Away):
            assert made.host.data_ptr() != tensor.data_ptr()
            out.append(made)
        return made

    mover.pack = watched
    keep_less(model, mover)
    equal(gradients(model), wanted, rtol=1e-4, atol=1e-5)
    assert out
    own = {tuple(p.shape) for p in model.parameters() if p.dim() == 2}
    assert not [away for away in out if tuple(away.host.shape) in own]


def test_on_a_cpu_it_is_refused_with_the_reason():
    with pytest.raises(afina.errors.ConfigError, match="the option: this run computes on the CPU"):
        activation_mover(torch.device("cpu"), "the option")


# --- which way a layer goes


def test_t35_layers_that_go_the_slower_way_are_told():
    assert slower_layers(adapted("llama", target_modules="all-linear")) == []
    assert slower_layers(adapted("gpt2")) == []
    model = adapted("gpt2", lora_bias=True)
    assert slower_layers(model) == []
    model.add_adapter("other", afina.LoraConfig(r=2))
    model.adapters.set_active(["default", "other"])
    assert slower_layers(model) == [
        "2 of 2 LoRA layers take the slower path, not fused with their layer (2: 2 adapters act on it)"
    ]
    model = adapted("llama", target_modules=["q_proj", "v_proj"])
    layer = model.get_base_model().model.layers[0].self_attn.q_proj.base_layer
    layer.register_forward_hook(lambda module, args, output: output)
    assert slower_layers(model)[0].startswith("1 of 4 LoRA layers")
