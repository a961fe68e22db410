"""T4: the same model under another class has other module prefixes; the adapter is found there, and that is said."""

import logging
import warnings

import pytest
import torch
import transformers as tf
from trap_models import bert, gpt2, hidden, ids, llama, llava, logits, stir

from afina import IA3Config, LoraConfig, PeftModel, TrainableTokensConfig, get_peft_model
from afina.errors import CheckpointError


def same_body(source, target):
    """Put the weights of one model's body into another's."""
    state = {n.replace(".base_layer", ""): p for n, p in source.base_model.named_parameters()}
    for name, parameter in target.base_model.named_parameters():
        parameter.data.copy_(state[name])
    return target


CASES = {
    "bert": (bert, tf.BertModel, tf.BertForSequenceClassification, "bert."),
    "gpt2": (gpt2, tf.GPT2Model, tf.GPT2LMHeadModel, "transformer."),
    "llama": (llama, tf.LlamaModel, tf.LlamaForSequenceClassification, "model."),
}
TARGETS = {
    "bert": (["query", "value"], "all-linear", ["encoder.layer.1.attention.self.query", "encoder.layer.0.output.dense"]),
    "gpt2": (["c_attn"], "all-linear", ["h.1.attn.c_attn", "h.0.mlp.c_fc"]),
    "llama": (["q_proj"], "all-linear", ["layers.1.self_attn.q_proj", "layers.0.mlp.up_proj"]),
}


@pytest.mark.parametrize("which", [0, 1, 2], ids=["suffix", "all-linear", "whole names"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("outward", [True, False], ids=["body to head", "head to body"])
def test_t04_the_adapter_is_found_under_another_class(case, which, outward, tmp_path, caplog):
    make, body, headed, prefix = CASES[case]
    targets = TARGETS[case][which]
    first, second = (make(body), make(headed)) if outward else (make(headed), make(body))
    second = same_body(first, second)
    if not outward and which == 2:
        targets = [prefix + t for t in targets]
    if not outward and which == 1:
        targets = [
            f"{prefix}{n}"
            for n, m in make(body).named_modules()
            if "weight" in m._parameters
            and m.weight.dim() == 2
            and not isinstance(m, torch.nn.Embedding)
            and "pooler" not in n
        ]
    model = stir(get_peft_model(first, LoraConfig(r=3, target_modules=targets)))
    if not outward and which == 0:
        assert not model.peft_config["default"].modules_to_save
    model.save_pretrained(tmp_path)
    expected = hidden(model.get_base_model().base_model)
    plain = hidden(make(body))
    with caplog.at_level(logging.WARNING, logger="afina"):
        loaded = PeftModel.from_pretrained(second, tmp_path)
    torch.testing.assert_close(hidden(loaded.get_base_model().base_model), expected, rtol=0, atol=0)
    assert not torch.allclose(expected, plain)
    assert "adapter keys renamed" in caplog.text
    assert prefix in caplog.text
    # and back again, from what is saved now
    loaded.save_pretrained(tmp_path / "again")
    back = (
        PeftModel.from_pretrained(same_body(model.get_base_model(), make(body if outward else headed)), tmp_path / "again")
        if which == 0
        else None
    )
    if back is not None:
        torch.testing.assert_close(hidden(back.get_base_model().base_model), expected, rtol=0, atol=0)


def test_t04_patterns_and_feedforward_names_are_renamed_too(tmp_path):
    base = llama(tf.LlamaModel)
    pattern = {r"layers\.1\.self_attn\.q_proj": 5}
    model = get_peft_model(
        base,
        LoraConfig(
            r=3,
            target_modules=["layers.1.self_attn.q_proj", "layers.0.self_attn.q_proj"],
            rank_pattern=pattern,
            alpha_pattern={r"layers\.1\.self_attn\.q_proj": 30},
        ),
    )
    stir(model).save_pretrained(tmp_path / "lora")
    loaded = PeftModel.from_pretrained(same_body(base, llama()), tmp_path / "lora")
    torch.testing.assert_close(hidden(loaded.get_base_model().base_model), hidden(model), rtol=0, atol=0)

    base = llama()
    names = [f"model.layers.{i}.{n}" for i in range(2) for n in ("self_attn.k_proj", "mlp.down_proj")]
    options = {"target_modules": names, "feedforward_modules": [n for n in names if "down" in n]}
    model = stir(get_peft_model(base, IA3Config(**options)))
    model.save_pretrained(tmp_path / "ia3")
    expected = hidden(model.get_base_model().base_model)
    loaded = PeftModel.from_pretrained(same_body(base, llama(tf.LlamaModel)), tmp_path / "ia3")
    torch.testing.assert_close(hidden(loaded), expected, rtol=0, atol=0)

    base = llama()
    options = {"target_modules": names[:2], "rank_pattern": {r"model\.layers\.0\.mlp\.down_proj": 5}}
    model = stir(get_peft_model(base, LoraConfig(r=3, **options)))
    model.save_pretrained(tmp_path / "down")
    expected = hidden(model.get_base_model().base_model)
    loaded = PeftModel.from_pretrained(same_body(base, llama(tf.LlamaModel)), tmp_path / "down")
    torch.testing.assert_close(hidden(loaded), expected, rtol=0, atol=0)


def test_t04_a_whole_name_in_a_string_is_renamed(tmp_path):
    """PEFT writes the embedding of trainable tokens so."""
    import peft

    base = llama()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(llama(), peft.TrainableTokensConfig(token_indices=[4, 9]))
    with torch.no_grad():
        theirs.base_model.model.model.embed_tokens.trainable_tokens_delta["default"].add_(1.0)
    theirs.save_pretrained(tmp_path)
    rows = torch.tensor([[4, 9, 11]])
    loaded = PeftModel.from_pretrained(same_body(base, llama(tf.LlamaModel)), tmp_path)
    assert isinstance(loaded.peft_config["default"], TrainableTokensConfig)
    with torch.no_grad():
        torch.testing.assert_close(
            hidden(loaded, input_ids=rows), theirs.base_model.model.model(input_ids=rows).last_hidden_state
        )


@pytest.mark.parametrize("tower", [1, 2, 5], ids=["small tower", "equal tower", "large tower"])
@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "all-linear", ["model.layers.1.self_attn.q_proj"]], ids=str)
def test_t04_a_language_model_within_a_multimodal_one(targets, tower, tmp_path):
    text, whole = llama(), llava(vision_layers=tower)
    same_body(text, whole.model.language_model)
    whole.lm_head.load_state_dict(text.lm_head.state_dict())
    torch.testing.assert_close(logits(whole), logits(text))
    model = stir(get_peft_model(text, LoraConfig(r=3, target_modules=targets)))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(whole, tmp_path)
    torch.testing.assert_close(logits(loaded), logits(model))
    assert not any("vision_tower" in n for n, _ in loaded.named_parameters() if ".adapters." in n)


def test_t04_from_a_multimodal_model_to_its_language_model(tmp_path):
    whole, text = llava(), llama(tf.LlamaModel)
    same_body(whole.model.language_model, text)
    model = stir(get_peft_model(whole, LoraConfig(r=3)))
    model.save_pretrained(tmp_path)
    expected = hidden(model.get_base_model().model.language_model)
    loaded = PeftModel.from_pretrained(text, tmp_path)
    torch.testing.assert_close(hidden(loaded), expected, rtol=0, atol=0)


def test_t04_a_head_that_the_class_has_not_is_named(tmp_path):
    base = bert()
    stir(get_peft_model(base, LoraConfig(r=3, task_type="SEQ_CLS"))).save_pretrained(tmp_path)
    other = same_body(base, bert(tf.BertModel))
    with pytest.raises(CheckpointError) as error:
        PeftModel.from_pretrained(other, tmp_path)
    assert "classifier.weight" in str(error.value)
    loaded = PeftModel.from_pretrained(other, tmp_path, strict=False)
    assert hidden(loaded, input_ids=ids()).shape == (3, 7, 24)
