"""The contract every method meets on every kind of layer, by being registered. Numbers are those of the design."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path

import pytest
import torch
from cases import CASES, LAYERS, MERGEABLE, Case, adapted, lora_for, perturb

import afina
from afina.core.adapter import Adapter
from afina.core.injection import AdapterSet
from afina.core.runtime import BASE_ROW
from afina.errors import MergeError

TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 0.06, torch.float16: 0.01}

every_case = pytest.mark.parametrize("case", CASES, ids=str)
every_mergeable_case = pytest.mark.parametrize("case", MERGEABLE, ids=str)


def close(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype = torch.float32) -> bool:
    a, b = a.detach(), b.detach()
    limit = TOLERANCE[dtype] * max(1.0, float(b.abs().max()))
    return bool((a.double() - b.double()).abs().max() <= limit)


@every_case
def test_1_identity_at_init(case: Case) -> None:
    holder, x = case.holder(), case.input()
    before = holder(x)
    adapters = AdapterSet(holder)
    adapters.add("one", case.config())
    adapters.set_active("one")
    assert case.method.adapter.identity_at_init
    assert close(holder(x), before)


@every_case
def test_1_noise_changes_the_output(case: Case) -> None:
    """The companion of all that follows: the adapters these tests compare do something."""
    holder, adapters = adapted(case)
    with adapters.disabled():
        before = holder(case.input())
    assert not close(holder(case.input()), before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@every_mergeable_case
def test_2_forward_equals_merged(case: Case, dtype: torch.dtype) -> None:
    holder, adapters = adapted(case, dtype=dtype)
    x = case.input(dtype)
    before = holder(x)
    adapters.merge()
    assert adapters.merged == ("one",)
    assert close(holder(x), before, dtype)


@every_mergeable_case
def test_3_unmerge_is_bit_exact(case: Case) -> None:
    holder, adapters = adapted(case)
    stored = {n: p for n, p in holder.named_parameters() if ".adapters." not in n}
    values = {n: p.clone() for n, p in stored.items()}
    for _ in range(2):
        adapters.merge()
        adapters.unmerge()
    after = {n: p for n, p in holder.named_parameters() if ".adapters." not in n}
    assert all(after[n] is p and torch.equal(p, values[n]) for n, p in stored.items())
    assert after.keys() == stored.keys()


@every_case
def test_3_merge_of_what_cannot_be_merged_is_an_error(case: Case) -> None:
    if case.method.adapter.mergeable:
        return
    holder, adapters = adapted(case)
    before = holder(case.input())
    with pytest.raises(MergeError, match="cannot be merged"):
        adapters.merge()
    assert torch.equal(holder(case.input()), before)


@every_case
def test_4_disabled_is_the_base_bit_for_bit(case: Case) -> None:
    base = case.holder()(case.input())
    holder, adapters = adapted(case)
    changed = holder(case.input())
    with adapters.disabled():
        assert torch.equal(holder(case.input()), base)
    assert torch.equal(holder(case.input()), changed)
    if case.method.adapter.mergeable:
        adapters.merge()
        with adapters.disabled():
            assert torch.equal(holder(case.input()), base)
        assert close(holder(case.input()), changed)


@every_case
def test_5_a_mixed_batch_equals_row_by_row(case: Case) -> None:
    holder, adapters = adapted(case, "a")
    adapters.add("b", case.config())
    perturb(adapters, "b")
    names = ["a", "b", BASE_ROW, "a", "b"]
    x = case.input()
    if case.layer == "experts":
        with pytest.raises(MergeError, match="adapter_names"):
            adapters.set_rows(names)
        return
    for copies in (1, 3):
        adapters.set_rows(names)
        mixed = holder(x.repeat_interleave(copies, 0))
        adapters.set_rows(None)
        for row, name in enumerate(names):
            if name == BASE_ROW:
                with adapters.disabled():
                    alone = holder(x[row : row + 1])
            else:
                adapters.set_active(name)
                alone = holder(x[row : row + 1])
            for i in range(copies):
                assert close(mixed[row * copies + i], alone[0])


@every_case
def test_6_save_load_same_output(case: Case, tmp_path: Path) -> None:
    model = afina.get_peft_model(case.holder(), case.config())
    perturb(model.adapters, "default")
    model.save_pretrained(tmp_path)
    again = afina.PeftModel.from_pretrained(case.holder(), tmp_path)
    assert torch.equal(again(case.input()), model.eval()(case.input()))


@every_case
def test_7_exactly_the_adapters_parameters_get_gradients(case: Case) -> None:
    holder, _ = adapted(case)
    holder.train()
    holder(case.input()).square().sum().backward()
    for name, parameter in holder.named_parameters():
        assert (parameter.grad is not None) == (".adapters." in name), name
        if parameter.grad is not None:
            assert torch.isfinite(parameter.grad).all()
            assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("first", [True, False], ids=["below", "above"])
@every_case
def test_8_stacks_with_lora_in_both_orders(case: Case, first: bool) -> None:
    config = lora_for(case)
    if config is None:
        return
    holder, adapters = adapted(case)
    alone = holder(case.input())
    adapters.add("lora", config)
    adapters.set_active(["one", "lora"] if first else ["lora", "one"])
    assert torch.allclose(holder(case.input()), alone, atol=1e-5) or case.method.name == "last_layers"
    perturb(adapters, "lora")
    stacked = holder(case.input())
    if not case.method.adapter.mergeable:
        with pytest.raises(MergeError):
            adapters.merge()
        assert torch.equal(holder(case.input()), stacked)
        return
    adapters.merge()
    assert close(holder(case.input()), stacked)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@every_case
def test_9_output_dtype_is_the_bases_and_masters_are_float32(case: Case, dtype: torch.dtype) -> None:
    holder, adapters = adapted(case, dtype=dtype)
    with adapters.disabled():
        expected = holder(case.input(dtype)).dtype
    assert holder(case.input(dtype)).dtype == expected
    assert {p.dtype for a in adapters.adapters("one") for p in a.parameters()} == {torch.float32}


@every_case
def test_10_compiles_as_one_graph(case: Case) -> None:
    torch._dynamo.reset()
    holder, _ = adapted(case)
    compiled = torch.compile(holder, fullgraph=True, backend="aot_eager")
    assert close(compiled(case.input()), holder(case.input()))
    holder.train()
    compiled(case.input()).square().sum().backward()
    grads = [p.grad.clone() for p in holder.parameters() if p.grad is not None]
    holder.zero_grad()
    holder(case.input()).square().sum().backward()
    assert grads
    assert all(close(a, p.grad) for a, p in zip(grads, [p for p in holder.parameters() if p.grad is not None], strict=True))


@every_case
def test_14_what_is_kept_for_backward_stays_under_the_declared_bound(case: Case) -> None:
    if case.layer == "experts" or case.method.name in ("last_layers", "ln_tuning"):
        return  # a bare parameter is used through its full weight; the replaced layer keeps what the layer keeps
    holder, adapters = adapted(case)
    holder.train()
    x = case.input()
    x = x.requires_grad_() if x.dtype.is_floating_point else x
    rows = holder(x).numel() // next(adapters.adapters("one")).view.out_features
    with adapters.disabled():
        base = kept_values(holder, x)
    more = kept_values(holder, x) - base
    bound = next(adapters.adapters("one")).values_kept(
        max(rows, x.numel() // next(adapters.adapters("one")).view.in_features)
    )
    groups = getattr(holder.layer.base_layer, "groups", 1)
    if case.layer == "conv2d-circular":
        groups = 2  # the padded picture is kept in the place of the picture
    assert more <= bound * groups, f"keeps {more}, declares {bound}"


def kept_values(module: torch.nn.Module, x: torch.Tensor) -> int:
    """Values kept for backward in tensors other than parameters, each storage once."""
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in own and tensor.numel() > 1:
            kept[place] = tensor.untyped_storage().nbytes() // 4
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = module(x)
    del y
    return sum(kept.values())


@every_case
def test_15_deepcopy_pickle_and_the_meta_device(case: Case, tmp_path: Path) -> None:
    model = afina.get_peft_model(case.holder(), case.config()).eval()
    perturb(model.adapters, "default")
    expected = model(case.input())
    twin = copy.deepcopy(model)
    assert torch.equal(twin(case.input()), expected)
    perturb(twin.adapters, "default")
    assert torch.equal(model(case.input()), expected)
    file = io.BytesIO()
    pickle.dump(model, file)
    file.seek(0)
    assert torch.equal(pickle.load(file)(case.input()), expected)
    model.save_pretrained(tmp_path)
    with torch.device("meta"):
        empty = LAYERS[case.layer][0]()
    holder = case.holder()
    holder.layer = empty
    loaded = afina.PeftModel.from_pretrained(holder, tmp_path)
    stored = afina.get_peft_model_state_dict(loaded)
    original = afina.get_peft_model_state_dict(model)
    assert stored.keys() == original.keys()
    assert all(not t.is_meta and torch.equal(t, original[k]) for k, t in stored.items())


def test_every_method_is_tested_and_documented() -> None:
    from afina.core.registry import methods

    tested = {case.method.name for case in CASES}
    for name, method in methods().items():
        assert method.paper.startswith("https://")
        assert method.trains
        assert method.cost
        if method.kind == "layer":
            assert name in tested
            assert issubclass(method.adapter, Adapter)
