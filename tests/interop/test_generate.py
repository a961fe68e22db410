"""Generation as PEFT's where PEFT is right; where PEFT is demonstrably wrong, the law that afina keeps instead."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import afina

from .cases import Case, assert_close, logits, loss_of, ours, peft_warnings, save, shake, theirs
from .models import VOCAB, batch, build

MODELS = ("gpt2", "llama", "t5")
METHODS = {
    "lora": Case("", options={"target_modules": "all-linear", "r": 5}),
    "dora": Case("", options={"target_modules": "all-linear", "use_dora": True}),
    "prompt": Case("", "PromptTuningConfig", {"num_virtual_tokens": 5}),
    "prefix": Case("", "PrefixTuningConfig", {"num_virtual_tokens": 5}),
    "p-tuning": Case("", "PromptEncoderConfig", {"num_virtual_tokens": 5, "encoder_hidden_size": 11}),
}
SEARCH: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "beams": {"do_sample": False, "num_beams": 3},
    "no cache": {"do_sample": False, "use_cache": False},
}


def case_of(method: str, model: str) -> Case:
    case = METHODS[method]
    return Case(model, case.config, case.options)


def question(model: str, *, padded: bool) -> dict[str, torch.Tensor]:
    """Token ids of two rows, the first padded on the left (on the right for an encoder)."""
    ids = torch.randint(3, VOCAB, (2, 6), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    if padded:
        place = slice(4, 6) if model == "t5" else slice(0, 2)
        ids[0, place] = mask[0, place] = 0
    return {"input_ids": ids, "attention_mask": mask}


def generate(model: Any, data: dict[str, torch.Tensor], **search: Any) -> torch.Tensor:
    model.eval()
    with peft_warnings():
        return model.generate(**data, min_new_tokens=7, max_new_tokens=7, pad_token_id=0, **search)


# PEFT drops position_ids for prompts, so that a row padded on the left gets other positions than the row alone
RIGHT_IN_PEFT = [
    (method, model, padded, search)
    for method in METHODS
    for model in MODELS
    for padded in (False, True)
    for search in SEARCH
    if not (padded and method in ("prompt", "p-tuning") and model != "t5")
    if (method, search) != ("prefix", "no cache")
    or model == "gpt2"  # PEFT raises for Llama, and for T5 uses the cache twice
]


@pytest.mark.parametrize(("method", "model", "padded", "search"), RIGHT_IN_PEFT)
def test_generate_gives_the_tokens_of_peft(method: str, model: str, padded: bool, search: str, tmp_path: Path) -> None:
    case = case_of(method, model)
    other = theirs(case)
    own = afina.PeftModel.from_pretrained(build(model), save(other, tmp_path))
    data = question(model, padded=padded)
    assert torch.equal(generate(own, data, **SEARCH[search]), generate(other, data, **SEARCH[search]))


@pytest.mark.parametrize("model", ["gpt2", "llama", "opt", "t5"])
@pytest.mark.parametrize("method", METHODS)
def test_generating_without_a_cache_gives_the_same_tokens(method: str, model: str) -> None:
    """With prefixes PEFT raises on Llama, and on T5 sees its tokens a second time in a cache that should not be there."""
    own, data = ours(case_of(method, model)), question(model, padded=True)
    assert torch.equal(generate(own, data, **SEARCH["no cache"]), generate(own, data, **SEARCH["greedy"]))


@pytest.mark.parametrize("search", SEARCH)
@pytest.mark.parametrize("model", ["gpt2", "llama", "opt"])
@pytest.mark.parametrize("method", METHODS)
def test_a_row_padded_on_the_left_answers_as_the_row_alone(method: str, model: str, search: str) -> None:
    """PEFT drops position_ids for prompts: GPT-2 answers a padded row otherwise than the row alone."""
    own = ours(case_of(method, model))
    data = question(model, padded=True)
    alone = {k: v[:1, 2:] for k, v in data.items()}
    together, single = generate(own, data, **SEARCH[search]), generate(own, alone, **SEARCH[search])
    assert torch.equal(together[0, 6:], single[0, 4:])


@pytest.mark.parametrize("method", ["prompt", "prefix", "p-tuning"])
@pytest.mark.parametrize("model", ["gpt2-cls", "llama-cls"])
def test_classification_at_the_last_token_ignores_padding(method: str, model: str) -> None:
    """PEFT hands embeddings over, in which transformers cannot see padding, and pools a padding position (T22)."""
    own = ours(case_of(method, model))
    data = batch(model)
    full = logits(own, model)
    with torch.no_grad():
        alone = own(input_ids=data["input_ids"][1:2, :-2], attention_mask=data["attention_mask"][1:2, :-2])["logits"]
    assert_close(full[1:2], alone, "output")


@pytest.mark.parametrize("config", ["PromptTuningConfig", "PromptEncoderConfig"])
def test_labels_of_tokens_move_with_the_prompt(config: str) -> None:
    """PEFT's loss raises here: labels are not extended by the virtual tokens."""
    case = Case("bert-tok", config, {"num_virtual_tokens": 5})
    with pytest.raises(ValueError, match="batch_size"):
        loss_of(theirs(case), case.model)
    own = ours(case)
    data = batch(case.model)
    with torch.no_grad():
        text = own.eval()(**data)["logits"][:, 5:]
    expected = nn.functional.cross_entropy(text.flatten(0, 1), data["labels"].flatten())
    assert_close(loss_of(own, case.model).detach(), expected, "output")


def test_answers_of_a_span_move_with_the_prompt() -> None:
    """PEFT leaves start and end positions where they were, which are positions within the prompt."""
    case = Case("bert-qa", "PromptTuningConfig", {"num_virtual_tokens": 5})
    own = ours(case)
    data = batch(case.model)
    with torch.no_grad():
        out = own.eval()(**batch(case.model))
    start, end = out["start_logits"], out["end_logits"]
    wanted = [data["start_positions"] + 5, data["end_positions"] + 5]
    expected = sum(nn.functional.cross_entropy(s, w) for s, w in zip((start, end), wanted, strict=True)) / 2
    assert_close(loss_of(own, case.model).detach(), expected, "output")


@pytest.mark.parametrize("options", [{}, {"use_dora": True}])
def test_a_grouped_convolution_merges(options: dict[str, Any]) -> None:
    """PEFT mixes the groups in A, so that its merge raises; afina's product is a grouped convolution again."""
    own = ours(Case("conv-grouped", options={"target_modules": ["conv2"], "r": 3, **options}))
    before = logits(own, "conv-grouped")
    assert_close(logits(own.merge_and_unload(), "conv-grouped"), before, "output")


class Holed(nn.Module):
    """A convolution with holes and mirrored edges."""

    def __init__(self, **options: Any):
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3, padding=2, **options)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)


@pytest.mark.parametrize("options", [{"dilation": 2}, {"padding_mode": "reflect"}], ids=str)
def test_dilation_and_padding_modes_reach_the_adapter(options: dict[str, Any]) -> None:
    """PEFT copies neither: a dilated layer raises, and a mirrored edge merges to something else."""
    own = shake(afina.get_peft_model(Holed(**options), afina.LoraConfig(target_modules=["conv"], r=2))).eval()
    x = torch.randn(2, 3, 11, 7)
    before = own(x).detach()
    assert_close(own.merge_and_unload()(x).detach(), before, "output")


TIES = [
    {"target_modules": ["embed_tokens"]},
    {"target_modules": ["lm_head"]},
    {"target_modules": ["embed_tokens", "lm_head"]},
    {"trainable_token_indices": [3, 5]},
    {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
]


@pytest.mark.parametrize("options", TIES, ids=str)
def test_merging_into_tied_embeddings_changes_nothing(options: dict[str, Any]) -> None:
    """PEFT's merge leaks the change of one side into the other (T6)."""
    own = ours(Case("llama-tied", options=options))
    before = logits(own, "llama-tied")
    own.merge_adapter()
    assert_close(logits(own, "llama-tied"), before, "output")
    own.unmerge_adapter()
    assert_close(logits(own, "llama-tied"), before, "output")
    assert_close(logits(own.merge_and_unload(), "llama-tied"), before, "output")


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens"])
def test_lora_on_both_sides_of_a_tie_trains_one_matrix(name: str, tmp_path: Path) -> None:
    case = Case("llama-tied", options={"target_modules": [name, "q_proj"], "ensure_weight_tying": True, "r": 3})
    other = theirs(case)
    own = afina.PeftModel.from_pretrained(build(case.model), save(other, tmp_path / "one"))
    expected = logits(other, case.model)
    assert_close(logits(own, case.model), expected, "output")
    assert_close(logits(copy.deepcopy(own).merge_and_unload(), case.model), expected, "output")
    own = ours(case)
    read = peft_read(case, save(own, tmp_path / "two"))
    assert_close(logits(read, case.model), logits(own, case.model), "output")


def peft_read(case: Case, folder: Path) -> Any:
    with peft_warnings():
        return peft.PeftModel.from_pretrained(build(case.model), folder)


def test_whisper_is_adapted_under_its_task(tmp_path: Path) -> None:
    """PEFT's class for SEQ_2_SEQ_LM hands Whisper token ids and raises; afina's forward is the base model's."""
    own = shake(afina.get_peft_model(build("whisper"), afina.LoraConfig(task_type="SEQ_2_SEQ_LM")))
    expected = logits(own, "whisper")
    read = afina.PeftModel.from_pretrained(build("whisper"), save(own, tmp_path))
    assert_close(logits(read, "whisper"), expected, "output")
    sound = batch("whisper")["input_features"]
    with peft_warnings():
        assert torch.equal(
            read.generate(sound, max_new_tokens=5, num_beams=2), own.eval().generate(sound, max_new_tokens=5, num_beams=2)
        )


def test_prompts_refuse_pictures_and_say_why() -> None:
    """PEFT: AttributeError."""
    with pytest.raises(ValueError, match="takes no token ids"):
        afina.get_peft_model(build("vit"), afina.PromptTuningConfig(num_virtual_tokens=5))


def test_prefixes_work_on_pictures(tmp_path: Path) -> None:
    """PEFT: AttributeError."""
    case = Case("vit", "PrefixTuningConfig", {"num_virtual_tokens": 5, "modules_to_save": ["classifier"]})
    own = ours(case)
    read = afina.PeftModel.from_pretrained(build("vit"), save(own, tmp_path))
    assert_close(logits(read, "vit"), logits(own, "vit"), "output")
    loss_of(own, "vit").backward()
    gradient = own.prompt_encoder["default"].table.grad
    assert bool((gradient.abs().sum(0) > 0).all())


@pytest.mark.parametrize("layers", [1, 3, 4])
def test_prefixes_of_an_encoder_decoder_lie_where_peft_reads_them(layers: int, tmp_path: Path) -> None:
    import transformers

    config = build("t5").config
    config.num_layers = config.num_decoder_layers = layers
    torch.manual_seed(2)
    base = transformers.T5ForConditionalGeneration(config)
    with peft_warnings():
        options = {"num_virtual_tokens": 3, "task_type": "SEQ_2_SEQ_LM"}
        other = shake(peft.get_peft_model(copy.deepcopy(base), peft.PrefixTuningConfig(**options)))
    own = afina.PeftModel.from_pretrained(base, save(other, tmp_path))
    assert_close(logits(own, "t5"), logits(other, "t5"), "output")
