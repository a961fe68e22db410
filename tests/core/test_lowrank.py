"""The fused node is the plain formula: same output, first and second derivatives; and it stands back where it must."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.functional import linear

import afina
from afina.core import lowrank
from afina.core.dropout import drop, keep_mask
from afina.core.lowrank import LowRank, low_rank_linear
from afina.core.report import passes

SHAPES = [(5,), (3, 5), (0, 5), (2, 3, 5), (0, 3, 5), (2, 0, 5)]


def tensors(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    torch.manual_seed(3)
    return [torch.randn(*shape, dtype=dtype, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("with_bias", [True, False])
def test_it_is_the_plain_formula(shape: tuple[int, ...], with_bias: bool) -> None:
    x, weight, down, up, bias = tensors(shape, (7, 5), (2, 5), (7, 2), (7,))
    weight, bias = weight.detach(), bias.detach() if with_bias else None
    plain = linear(x, weight, bias) + linear(linear(x, down), up) * 0.7
    fused = low_rank_linear(x, LowRank(weight, bias, down, up, None, 0.7))
    with torch.no_grad():
        torch.testing.assert_close(low_rank_linear(x, LowRank(weight, bias, down, up, None, 0.7)), plain)
    torch.testing.assert_close(fused, plain)
    g = torch.randn_like(plain)
    expected, found = (torch.autograd.grad(y, (x, down, up), g) for y in (plain, fused))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("few", [0, 2048])
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_second_derivatives(p: float, few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowrank, "_FEW_VALUES", few)
    x, weight, down, up = tensors((3, 5), (7, 5), (2, 5), (7, 2))
    weight = weight.detach()

    def seeded(x: torch.Tensor, down: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(0)
        return low_rank_linear(x, LowRank(weight, None, down, up, None, 0.7, p))

    assert torch.autograd.gradgradcheck(seeded, (x, down, up))


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (1, 2), (0, 2)], ids=str)
def test_only_what_needs_a_gradient_gets_one(needed: tuple[int, ...]) -> None:
    x, weight, down, up = tensors((3, 5), (7, 5), (2, 5), (7, 2))
    inputs = [x, down, up]
    for i, tensor in enumerate(inputs):
        tensor.requires_grad_(i in needed)
    low_rank_linear(x, LowRank(weight.detach(), None, down, up, None, 0.7)).sum().backward()
    assert [i for i, tensor in enumerate(inputs) if tensor.grad is not None] == list(needed)


@pytest.mark.parametrize("rows", [11, 701])  # few values and many
@pytest.mark.parametrize("grad", [True, False])
def test_dropout_acts_on_the_input_of_the_product_alone(grad: bool, rows: int) -> None:
    x, weight, down, up = tensors((rows, 5), (7, 5), (2, 5), (7, 2))
    weight = weight.detach()
    torch.manual_seed(0)
    kept, factor = keep_mask(x.detach(), 0.3)
    expected = linear(x, weight) + linear(linear(x * kept * factor, down), up) * 0.7
    torch.manual_seed(0)
    with torch.set_grad_enabled(grad):
        found = low_rank_linear(x, LowRank(weight, None, down, up, None, 0.7, 0.3))
    torch.testing.assert_close(found, expected)
    if grad:
        g = torch.randn_like(found)
        gradients = [torch.autograd.grad(y, (x, down, up), g) for y in (expected, found)]
        torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize("p", [1e-9, 0.1, 0.5, 1 - 1e-9, 1.0])
@pytest.mark.parametrize("shape", [(101, 1009), (101, 1012), (1,), (0,), (3, 1)], ids=str)
def test_dropout_keeps_the_mean_and_drops_the_share(p: float, shape: tuple[int, ...]) -> None:
    torch.manual_seed(1)
    x = torch.ones(shape)
    y = drop(x, p, True)
    assert y.shape == x.shape
    assert bool(torch.isfinite(y).all())
    if x.numel() > 1000 and 0.01 < p < 0.99:
        share = float((y == 0).float().mean())
        deviation = (p * (1 - p) / x.numel()) ** 0.5
        assert abs(share - p) < 4 * deviation + 2**-16
        assert float(y.max()) == pytest.approx(1 / (1 - p), rel=1e-4)
        places = y.flatten()[: x.numel() // 4 * 4].view(-1, 4) == 0  # each of the four values that share one draw
        assert float((places.float().mean(0) - p).abs().max()) < 8 * deviation
    assert drop(x, p, False) is x
    if p == 1.0:
        assert not y.any()


def test_bits_of_one_draw_are_independent() -> None:
    torch.manual_seed(2)
    kept, _ = keep_mask(torch.empty(1 << 18), 0.5)
    correlation = torch.corrcoef(kept.view(-1, 4).T.double())
    assert float((correlation - torch.eye(4)).abs().max()) < 0.02


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(5, 7)

    def forward(self, x: torch.Tensor) -> Any:
        return self.lin(x)


def adapted(**options: Any) -> tuple[Any, nn.Module]:
    torch.manual_seed(5)
    model = afina.get_peft_model(Model(), afina.LoraConfig(r=2, target_modules=["lin"], init_lora_weights=False, **options))
    return model, model.base_model.model.lin.base_layer


def base_of(model: Any) -> Any:
    return model.base_model.model.lin


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts the uses of the fused node."""
    made: list[int] = []
    apply = lowrank._apply

    def counted(*args: Any) -> torch.Tensor:
        made.append(1)
        return apply(*args)

    monkeypatch.setattr(lowrank, "_apply", counted)
    return made


def test_a_plain_layer_is_fused(calls: list[int]) -> None:
    model, _ = adapted()
    model(torch.randn(3, 5))
    assert calls


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_a_trained_bias_is_part_of_it(p: float, autocast: bool, calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """`bias="lora_only"`: the same output and gradients as one adapter after the other, and told as one operation."""
    model, _ = adapted(bias="lora_only", lora_dropout=p)
    assert passes(model.adapters) == {"lin": ""}
    x, weights = torch.randn(11, 5, requires_grad=True), [q for q in model.parameters() if q.requires_grad]
    assert [tuple(q.shape) for q in weights] == [(2, 5), (7, 2), (7,)]
    weights[2].data.normal_()
    found = []
    for way in ("fused", "plain"):
        if way == "plain":
            monkeypatch.setattr(type(base_of(model)), "_forward_fused", lambda *_: None)
            monkeypatch.setattr("afina.methods.lora.fused_dtype", lambda *_: None)
            calls.clear()
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = model(x)
        assert bool(calls) == (way == "fused")
        found.append([y.float(), *torch.autograd.grad(y.float().square().sum(), (x, *weights))])
    for one, other in zip(*found, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, **({"rtol": 3e-2, "atol": 3e-1} if autocast else {}))


def trained(base: nn.Module) -> None:
    base.weight.requires_grad_(True)  # type: ignore[union-attr]


def hooked(base: nn.Module) -> None:
    base.register_forward_hook(lambda module, args, out: out * 1)


def replaced(base: nn.Module) -> None:
    base.forward = lambda x: linear(x, base.weight, base.bias)  # type: ignore[method-assign,arg-type]


@pytest.mark.parametrize("change", [trained, hooked, replaced])
def test_a_layer_that_may_do_more_is_called(change: Any, calls: list[int]) -> None:
    model, base = adapted()
    x = torch.randn(3, 5)
    expected = model(x)
    calls.clear()
    change(base)
    torch.testing.assert_close(model(x), expected)
    assert not calls


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_under_autocast_it_is_the_plain_formula_in_the_type_of_autocast(
    stored: torch.dtype, given: torch.dtype, p: float, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, base = adapted(lora_dropout=p)
    base.to(stored)
    x = torch.randn(2, 3, 5).to(given).requires_grad_()
    found = []
    for _ in range(2):
        torch.manual_seed(0)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = model.train()(x)
        assert y.dtype == torch.bfloat16
        parameters = [q for q in model.parameters() if q.requires_grad]
        found.append((y.float(), *(g.float() for g in torch.autograd.grad(y.float().square().sum(), [x, *parameters]))))
        assert all(q.dtype == torch.float32 for q in parameters)
        monkeypatch.setattr(type(base_of(model)), "low_rank", lambda self, active: None)
        monkeypatch.setattr(type(base_of(model).adapters["default"]), "low_rank", lambda self: None)
    assert len(calls) == 1
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0.02, atol=0.03 * float(other.detach().abs().max()))


@pytest.mark.parametrize(("rows", "largest", "copied"), [(256, 35, True), (257, 35, False), (3, 34, False)])
def test_under_autocast_a_copy_of_the_weight_is_kept_where_it_is_small_and_rows_are_few(
    rows: int, largest: int, copied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lowrank, "_SMALL", largest)
    model, base = adapted()
    x, kept = torch.randn(rows, 5, requires_grad=True), []
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
    ):
        model.train()(x)
    copies = [t for t in kept if t is not None and t.shape == base.weight.shape and t.dtype == torch.bfloat16]
    assert len(copies) == copied
    assert not [t for t in kept if t is not None and t.shape == x.shape and t.dtype == x.dtype]  # x in the narrow type alone


def test_second_derivatives_go_through_what_autocast_makes_narrow() -> None:
    x, weight, down, up = tensors((3, 5), (7, 5), (2, 5), (7, 2), dtype=torch.float32)
    weight, found = weight.detach(), []
    with torch.autocast("cpu", torch.bfloat16):
        plain = linear(x, weight) + linear(linear(x, down), up) * 0.7
        fused = low_rank_linear(x, LowRank(weight, None, down, up, None, 0.7), torch.bfloat16)
        for y in (plain, fused):
            first = torch.autograd.grad(y.float().sin().sum(), (x, down, up), create_graph=True)
            found.append(torch.autograd.grad(sum(g.square().sum() for g in first), (x, down, up)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(other, one, rtol=0.05, atol=0.05 * float(one.abs().max()))


def test_layers_that_read_one_input_share_its_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    casts = []

    class Watched(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, f: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if f is torch.Tensor.to and args[0].shape == (17, 5) and args[1:] == (torch.bfloat16,):
                casts.append(args[0])
            return f(*args, **(kwargs or {}))

    x, weight, down, up = tensors((17, 5), (7, 5), (2, 5), (7, 2), dtype=torch.float32)
    x, factors = x * 1.0, (down, down.detach().clone().requires_grad_())
    layers = [LowRank(weight.detach(), None, factor, up, None, 0.7) for factor in factors]
    with torch.autocast("cpu", torch.bfloat16), Watched():
        first, second = (low_rank_linear(x, layer, torch.bfloat16) for layer in layers)
        assert len(casts) == 1
        with torch.no_grad():
            x.mul_(2.0)  # the copy is of what x was
        third = low_rank_linear(x, layers[1], torch.bfloat16)
        assert len(casts) == 2
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    torch.testing.assert_close(third, 2 * first, rtol=0.02, atol=0.02)
    casts.clear()
    del x, first, second, third
    assert lowrank._last is None  # nothing is held for it


@pytest.mark.parametrize("way", ["data", "numpy"])
def test_a_buffer_that_is_filled_anew_past_its_version_is_read_anew(way: str) -> None:
    """A pass reads what is there, also where one tensor is used for all batches."""
    model, _ = adapted()
    x = torch.randn(3, 5)
    version = x._version
    with torch.autocast("cpu", torch.bfloat16):
        model(x)
        if way == "data":
            x.data.mul_(3.0)
        else:
            x.numpy()[:] *= 3.0
        assert x._version == version
        torch.testing.assert_close(model(x), model(x.clone()), rtol=0, atol=0)


def test_under_autocast_an_input_may_come_from_inference_mode() -> None:
    """As it may for a plain layer: what is kept is the copy."""
    model, _ = adapted()
    with torch.inference_mode():
        x = torch.randn(3, 5)
    found = []
    for given in (x, x.clone()):
        with torch.autocast("cpu", torch.bfloat16):
            y = model(given)
        found.append(torch.autograd.grad(y.float().square().sum(), [p for p in model.parameters() if p.requires_grad]))
    torch.testing.assert_close(*found, rtol=0, atol=0)


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("second", [False, True])
def test_backward_within_autocast_has_the_type_of_forward(second: bool, p: float) -> None:
    """Where autocast is off in a part of a model, and backward is called where it is on."""
    x, weight, down, up = tensors((2, 3, 5), (7, 5), (2, 5), (7, 2), dtype=torch.float32)
    inputs, found = (x, down, up), []
    for autocast in (False, True):
        torch.manual_seed(0)
        y = low_rank_linear(x, LowRank(weight.detach(), None, down, up, None, 0.7, p))
        g = torch.ones_like(y)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found.append(torch.autograd.grad(y, inputs, g, create_graph=second))
    torch.testing.assert_close(*found, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:.torch.jit.script.:DeprecationWarning")  # torch's own, when it first derives forward
def test_forward_derivatives_are_those_of_the_plain_formula() -> None:
    model, base = adapted()
    x, direction, adapter = torch.randn(3, 5), torch.randn(3, 5), base_of(model).adapters["default"]
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(model(forward_ad.make_dual(x, direction))).tangent
    torch.testing.assert_close(found, direction @ (base.weight + adapter.delta_weight()).t())


def test_a_thread_may_draw_first_in_inference_mode() -> None:
    model, _ = adapted(lora_dropout=0.4)

    def drawn() -> torch.Tensor:
        with torch.inference_mode():
            model.train()(torch.randn(3, 5))
        torch.manual_seed(0)
        return model(torch.ones(3, 5))  # type: ignore[no-any-return]

    with ThreadPoolExecutor(1) as other:
        torch.testing.assert_close(other.submit(drawn).result(), drawn(), rtol=0, atol=0)


def test_a_transposed_layer_is_fused_too(calls: list[int]) -> None:
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(5)
    base = nn.Sequential(Conv1D(7, 5))
    config = afina.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    model = afina.get_peft_model(base, config)
    x = torch.randn(2, 3, 5)
    y = model(x)
    assert calls
    model.merge_adapter()
    torch.testing.assert_close(model(x), y)


def test_under_functorch_it_stands_back(calls: list[int]) -> None:
    model, _ = adapted()
    x = torch.randn(3, 5)
    whole = model(x)
    calls.clear()
    torch.testing.assert_close(torch.func.vmap(model)(x), whole)
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    gradients = torch.func.grad(lambda p: torch.func.functional_call(model, p, (x,)).sum())(parameters)
    assert not calls
    model(x).sum().backward()
    for name, parameter in parameters.items():
        torch.testing.assert_close(gradients[name], parameter.grad)


def test_a_method_built_on_lora_that_adds_something_else_is_not_fused(calls: list[int], monkeypatch: Any) -> None:
    from afina.methods.lora import LoRA

    class Other(LoRA):
        def delta_weight(self) -> torch.Tensor:
            return super().delta_weight() * 2

    model, _ = adapted()
    model.base_model.model.lin.adapters["default"].__class__ = Other
    model(torch.randn(3, 5))
    assert not calls


def test_no_tensor_of_the_size_of_the_output_is_kept() -> None:
    model, _ = adapted(lora_dropout=0.25)
    x, kept = torch.randn(64, 5, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model.train()(x)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()} | {x.untyped_storage().data_ptr()}
    extra = [t for t in kept if t is not None and t.untyped_storage().data_ptr() not in own]
    assert sum(t.untyped_storage().nbytes() for t in extra) <= 64 * (2 * 4 + 5)  # A x, and one byte a value of x


def test_it_needs_one_dtype_or_autocast() -> None:
    full, half = torch.randn(2, 3), torch.randn(2, 3).bfloat16()
    assert lowrank.fused_dtype(full, full) == torch.float32
    assert lowrank.fused_dtype(half, full) is None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert lowrank.fused_dtype(half, full) == lowrank.fused_dtype(full, half) == torch.bfloat16
        assert lowrank.fused_dtype(full.double(), full) is None


# --- a trained bias beside the product


def test_a_trained_bias_is_part_of_the_node(calls: list[int]) -> None:
    model, _ = adapted(lora_bias=True)
    x = torch.randn(3, 5)
    with torch.no_grad():
        model.base_model.model.lin.adapters["default"].lora_bias.normal_()
    y = model(x)
    assert len(calls) == 1
    model.merge_adapter()
    torch.testing.assert_close(model(x), y)


@pytest.mark.parametrize("with_bias", [True, False])
def test_the_derivatives_of_a_trained_bias(with_bias: bool) -> None:
    x, weight, down, up, bias, shift = tensors((2, 3, 5), (7, 5), (2, 5), (7, 2), (7,), (7,))
    weight, bias = weight.detach(), bias.detach() if with_bias else None

    def node(*inputs: torch.Tensor) -> torch.Tensor:
        x, down, up, shift = inputs
        return low_rank_linear(x, LowRank(weight, bias, down, up, shift, 0.7))

    plain = linear(x, weight, bias) + (linear(linear(x, down), up) + shift) * 0.7
    torch.testing.assert_close(node(x, down, up, shift), plain)
    assert torch.autograd.gradcheck(node, (x, down, up, shift))


# --- what is told


def test_hooks_on_the_adapted_layer_see_one_call() -> None:
    model, _ = adapted()
    seen: list[torch.Size] = []
    model.base_model.model.lin.register_forward_hook(lambda module, args, y: seen.append(y.shape))
    model(torch.randn(3, 5))
    assert seen == [(3, 7)]


def test_t35_each_layer_tells_which_way_it_is_computed() -> None:
    model, base = adapted()
    assert passes(model.adapters) == {"lin": ""}
    model.add_adapter("other", afina.LoraConfig(r=2, target_modules=["lin"]))
    model.adapters.set_active(["default", "other"])
    assert passes(model.adapters) == {"lin": "2 adapters act on it"}
    model.set_adapter("default")
    hooked(base)
    assert passes(model.adapters) == {"lin": "Linear computes in its own way"}
    model.add_adapter("third", afina.HRAConfig(r=2, target_modules=["lin"]))
    model.set_adapter("third")
    assert passes(model.adapters) == {"lin": "HRA on a layer of kind linear has no such form"}


def test_what_the_layer_returns_may_be_written_into() -> None:
    """As wav2vec2 does where padding is."""
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 3, 5, requires_grad=True), torch.randn(7, 5), torch.randn(7)
    down, up = torch.randn(2, 5, requires_grad=True), torch.randn(7, 2, requires_grad=True)
    padding = torch.tensor([[False, False, True], [False, True, True]])
    found = []
    for y in (low_rank_linear(x, LowRank(weight, bias, down, up)), linear(x, weight, bias) + x @ down.t() @ up.t()):
        y[padding] = 0.0
        found.append([y, *torch.autograd.grad(y.square().sum(), (x, down, up))])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
