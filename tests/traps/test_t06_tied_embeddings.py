"""T6: merging or training one side of tied embeddings breaks the other."""

import warnings

import pytest
import torch
from trap_models import gpt2, ids, llama, logits, stir, t5, trainable

from afina import LoraConfig, PeftModel, TrainableTokensConfig, get_peft_model
from afina.errors import TargetError

MODELS = {
    "llama": (lambda: llama(tie_word_embeddings=True), "embed_tokens", "lm_head", "q_proj"),
    "gpt2": (gpt2, "wte", "lm_head", "c_attn"),
    "t5": (t5, "shared", "lm_head", "q"),
}
WAYS = ["embedding", "head", "both", "tokens", "tokens beside LoRA", "saved both", "saved as one"]


def config(way, embedding, head, plain):
    options = {"r": 3, "target_modules": [plain]}
    return {
        "embedding": lambda: LoraConfig(r=3, target_modules=[embedding, plain]),
        "head": lambda: LoraConfig(r=3, target_modules=[head, plain]),
        "both": lambda: LoraConfig(r=3, target_modules=[embedding, head]),
        "tokens": lambda: TrainableTokensConfig(token_indices=[4, 11]),
        "tokens beside LoRA": lambda: LoraConfig(**options, trainable_token_indices=[4, 11]),
        "saved both": lambda: LoraConfig(**options, modules_to_save=[embedding, head]),
        "saved as one": lambda: LoraConfig(**options, modules_to_save=[embedding], ensure_weight_tying=True),
    }[way]()


def feed(name):
    inputs = {"input_ids": torch.cat([torch.tensor([[4, 11]]).expand(3, 2), ids()], 1)}
    return inputs | ({"decoder_input_ids": ids(3, 5, seed=8)} if name == "t5" else {})


def weights(model):
    return model.get_input_embeddings().weight, model.get_output_embeddings().weight


@pytest.mark.filterwarnings("ignore:The tied weights mapping")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MODELS)
def test_t06_merging_keeps_both_sides_right(name, way, tmp_path):
    make, *names = MODELS[name]
    if name == "t5" and way.startswith("saved"):
        names[0] = "shared"
    base = make()
    assert weights(base)[0] is weights(base)[1]
    inputs = feed(name)
    plain = logits(base, **inputs)
    if name == "t5" and way in ("embedding", "both", "saved both"):  # one table under three names is not adapted apart
        with pytest.raises(TargetError, match="ensure_weight_tying=True") as error:
            get_peft_model(base, config(way, *names))
        assert "encoder.embed_tokens" in str(error.value)
        return
    model = stir(get_peft_model(base, config(way, *names)))
    expected = logits(model, **inputs)
    assert (expected - plain).abs().max() > 1e-2
    model.save_pretrained(tmp_path / "adapter")

    model.merge_adapter()
    torch.testing.assert_close(logits(model, **inputs), expected, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model, **inputs), expected, rtol=0, atol=0)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model, **inputs), plain, rtol=0, atol=0)

    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged, **inputs), expected, rtol=1e-4, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    again = type(merged).from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(again, **inputs), logits(merged, **inputs), rtol=0, atol=0)
    one = way in ("tokens", "tokens beside LoRA", "saved as one")
    assert (weights(merged)[0] is weights(merged)[1]) == one
    if name != "t5":  # whose configuration means something else by it
        assert again.config.tie_word_embeddings == one
        again.tie_weights()  # the checkpoint stays right when transformers ties again, as resizing does
        torch.testing.assert_close(logits(again, **inputs), logits(merged, **inputs), rtol=0, atol=0)

    loaded = PeftModel.from_pretrained(make(), tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded, **inputs), expected, rtol=0, atol=0)


def test_t06_the_naive_way_is_wrong():
    """PEFT's merge of a LoRA on the embedding alone leaks into the tied head."""
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(llama(tie_word_embeddings=True), peft.LoraConfig(r=3, target_modules=["embed_tokens"]))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_embedding_A" in name:
                    parameter.normal_()
        before = logits(model)
        model.merge_adapter()
    assert not torch.allclose(logits(model), before, atol=1e-2)


@pytest.mark.parametrize("name", MODELS)
def test_t06_training_one_side_whole_is_an_error(name):
    make, embedding, head, plain = MODELS[name]
    for side, other in ((embedding, head), (head, embedding)):
        with pytest.raises(TargetError) as error:
            get_peft_model(make(), LoraConfig(r=3, target_modules=[plain], modules_to_save=[side]))
        text = str(error.value)
        assert "modules_to_save" in text
        assert side in text
        assert other in text
        assert "ensure_weight_tying=True" in text


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("side", [0, 1])
def test_t06_ensure_weight_tying_trains_one_matrix(name, side, tmp_path):
    make, *sides, plain = MODELS[name]
    options = LoraConfig(r=3, target_modules=[plain], modules_to_save=[sides[side]], ensure_weight_tying=True)
    model = get_peft_model(make(), options)
    model.train()
    inputs = feed(name)
    model(**inputs).logits.square().mean().backward()
    adapters = [
        layer.adapters["default"] for layer in model.adapters.layers.values() if hasattr(layer.adapters["default"], "inner")
    ]
    assert len(adapters) >= 2
    assert len({id(a.inner.weight) for a in adapters}) == 1
    assert adapters[0].inner.weight.grad is not None
    assert sum("inner" in n for n in trainable(model)) == 1
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    optimizer.step()
    expected = logits(model, **inputs)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make(), tmp_path)
    torch.testing.assert_close(logits(loaded, **inputs), expected, rtol=0, atol=0)


def test_t06_untied_models_are_left_alone(tmp_path):
    model = stir(get_peft_model(llama(), LoraConfig(r=3, target_modules=["q_proj"], modules_to_save=["lm_head"])))
    expected = logits(model)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, rtol=1e-5, atol=1e-5)
    merged.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(type(merged).from_pretrained(tmp_path)), logits(merged), rtol=0, atol=0)


def test_t06_different_tokens_on_each_side_cannot_be_tied():
    tokens = {"embed_tokens": [4], "lm_head": [5]}
    options = {"r": 3, "target_modules": ["q_proj"], "trainable_token_indices": tokens}
    with pytest.raises(TargetError, match="same trainable_token_indices"):
        get_peft_model(llama(tie_word_embeddings=True), LoraConfig(**options, ensure_weight_tying=True))
    model = stir(get_peft_model(llama(tie_word_embeddings=True), LoraConfig(**options)))
    expected = logits(model)
    torch.testing.assert_close(logits(model.merge_and_unload()), expected, rtol=1e-5, atol=1e-5)
