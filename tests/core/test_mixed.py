"""A batch whose rows use different adapters gives each row, and each adapter's parameters, what they get alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

import afina
from afina.core import mixed
from afina.core.injection import AdapterSet
from afina.core.runtime import BASE_ROW, Rows
from afina.errors import MergeError

IN, OUT, TOKENS = 7, 11, 3
RANKS = {"a": 2, "b": 3, "c": 5}
ORDERS = {
    "one each": ["a", "b", "c"],
    "runs of one length": ["a", "a", "c", "c", "b", "b"],
    "runs of several lengths": ["a", "a", "b", "c", "c", "c"],
    "in no order": ["c", "a", "c", BASE_ROW, "b", "a", "a"],
    "runs and the base": [BASE_ROW, "b", "b", BASE_ROW],
}
every_order = pytest.mark.parametrize("names", ORDERS.values(), ids=ORDERS)


class Net(nn.Module):
    """Two layers, of which adapter c has one."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(IN, OUT), nn.Linear(OUT, OUT, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(self.one(x).tanh())  # type: ignore[no-any-return]


def adapted(make: Callable[[str], Any], dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(0)
    model = afina.get_peft_model(Net().to(dtype), make("a"), "a")
    for name in ("b", "c"):
        model.add_adapter(name, make(name))
    for name in RANKS:
        for p in (p for adapter in model.adapters.adapters(name) for p in adapter.parameters()):
            nn.init.normal_(p, std=0.7)
        model.adapters.set_trainable(name, True)
    return model.train()


def lora(name: str, **options: Any) -> afina.LoraConfig:
    targets = ["one"] if name == "c" else ["one", "two"]
    return afina.LoraConfig(r=RANKS[name], lora_alpha=4, target_modules=targets, **options)


def own(model: Any, name: str) -> list[nn.Parameter]:
    return [p for adapter in model.adapters.adapters(name) for p in adapter.parameters()]


@contextmanager
def rows(model: Any, names: list[str] | None, **options: Any) -> Iterator[None]:
    model.adapters.set_rows(names, **options)
    try:
        yield
    finally:
        model.adapters.set_rows(None)


def alone(model: Any, x: torch.Tensor, names: list[str], copies: int = 1) -> torch.Tensor:
    parts = []
    for i, name in enumerate(names):
        part = x[i * copies : (i + 1) * copies]
        if name == BASE_ROW:
            with model.disable_adapter():
                parts.append(model(part))
        else:
            model.adapters.runtime.set(active=(name,))
            parts.append(model(part))
    return torch.cat(parts)


def one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise AssertionError("adapters go one by one")

    monkeypatch.setattr("afina.core.adapted._put", refuse)


@every_order
@pytest.mark.parametrize("copies", [1, 2])
@pytest.mark.parametrize("inner", [(), (TOKENS,)], ids=["flat", "tokens"])
def test_rows_and_gradients_are_those_of_each_adapter_alone(
    names: list[str], copies: int, inner: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    one_by_one(monkeypatch)
    model = adapted(lora)
    x = torch.randn(len(names) * copies, *inner, IN, dtype=torch.float64, requires_grad=True)
    g = torch.randn(len(names) * copies, *inner, OUT, dtype=torch.float64)
    trained = [p for name in names if name != BASE_ROW for p in own(model, name)]
    expected = alone(model, x, names, copies)
    wanted = torch.autograd.grad(expected, [x, *trained], g)
    for steady in (False, True):
        with rows(model, names, steady=steady):
            found = model(x)
            with torch.no_grad():
                inferred = [model(x), model(x)]  # the second reads what the first kept
        torch.testing.assert_close([found, *inferred], [expected] * 3)
        torch.testing.assert_close(torch.autograd.grad(found, [x, *trained], g), wanted)


def test_only_trained_adapters_get_gradients() -> None:
    model = adapted(lora)
    model.adapters.set_trainable("b", False)
    with rows(model, ["a", "b", "b"]):
        model(torch.randn(3, TOKENS, IN, dtype=torch.float64)).sum().backward()
    assert all(p.grad is not None for p in own(model, "a"))
    assert all(p.grad is None for name in "bc" for p in own(model, name))


@pytest.mark.parametrize("names", [["a", "b", "b"], ["a", "b", "c"]], ids=["two of a rank", "three"])
def test_under_autocast_it_is_close_and_masters_keep_their_type(names: list[str]) -> None:
    model = adapted(lora, torch.float32)
    x = torch.randn(3, TOKENS, IN, requires_grad=True)
    trained = [p for name in dict.fromkeys(names) for p in own(model, name)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = alone(model, x, names)
        with rows(model, names):
            found = model(x)
    assert found.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=0.04, atol=0.04)
    wanted, got = (torch.autograd.grad(y.float().square().sum(), [x, *trained]) for y in (expected, found))
    assert [t.dtype for t in got] == [torch.float32] * len(got)
    for one, other in zip(got, wanted, strict=True):
        assert float((one - other).norm() / other.norm()) < 0.05


def test_what_the_layer_returns_may_be_written_into() -> None:
    """As wav2vec2 does where padding is."""
    model, names = adapted(lora), ["c", "a", BASE_ROW]
    x, found = torch.randn(3, TOKENS, IN, dtype=torch.float64, requires_grad=True), []
    layer = model.base_model.model.one
    with rows(model, names):
        for own_tensor in (False, True):
            y = layer(x).clone() if own_tensor else layer(x)
            y[1, 1:] = 0.0
            found.append([y, *torch.autograd.grad(y.square().sum(), [x, *layer.adapters["a"].parameters()])])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_backward_within_autocast_has_the_type_of_forward(p: float) -> None:
    """Where autocast is off in a part of a model, and backward is called where it is on."""
    model, names = adapted(lambda name: lora(name, lora_dropout=p), torch.float32), ["c", "a", BASE_ROW]
    x, found = torch.randn(3, TOKENS, IN, requires_grad=True), []
    for autocast in (False, True):
        torch.manual_seed(0)
        with rows(model, names):
            y = model(x)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found.append(torch.autograd.grad(y, [x, *own(model, "a")], torch.ones_like(y)))
    torch.testing.assert_close(*found, rtol=0, atol=0)


@pytest.mark.parametrize("order", ["runs of several lengths", "in no order"])
def test_dropout_is_each_adapters_own(order: str) -> None:
    """The derivative of what was drawn, and rows of an adapter without dropout are as they are without."""
    names, chances = ORDERS[order], {"a": 0.0, "b": 0.4, "c": 0.9}
    model = adapted(lambda name: lora(name, lora_dropout=chances[name]))
    x = torch.randn(len(names), TOKENS, IN, dtype=torch.float64, requires_grad=True)
    trained = [p for name in RANKS for p in own(model, name)]

    def seeded(*_: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(0)
        with rows(model, names):
            return model(x)  # type: ignore[no-any-return]

    used = [p for name in dict.fromkeys(names) if name != BASE_ROW for p in own(model, name)]
    assert torch.autograd.gradcheck(seeded, (x, *used))
    dropped = seeded(x, *trained)
    still = model.eval()
    with rows(still, names):
        kept = still(x)
    same = [torch.allclose(one, other) for one, other in zip(dropped, kept, strict=True)]
    assert same == [name in ("a", BASE_ROW) for name in names]


def test_dropout_keeps_the_mean() -> None:
    model = adapted(lambda name: lora(name, lora_dropout=0.5, bias="none"), torch.float32)
    x = torch.ones(3, 4001, IN)
    with rows(model, ["a", "b", "c"]):
        layer = model.get_base_model().one
        drawn = layer(x).mean(1)
        model.eval()
        torch.testing.assert_close(drawn, layer(x).mean(1), rtol=0.1, atol=0.1)


@every_order
def test_where_the_layer_is_more_than_a_product(names: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    one_by_one(monkeypatch)
    model = adapted(lora)
    for layer in model.adapters.layers.values():
        layer.base_layer.register_forward_hook(lambda module, args, y: y * 1.5)
    x = torch.randn(len(names), TOKENS, IN, dtype=torch.float64, requires_grad=True)
    trained = [p for name in dict.fromkeys(names) if name != BASE_ROW for p in own(model, name)]
    expected = alone(model, x, names)
    with rows(model, names):
        found = model(x)
    torch.testing.assert_close(found, expected)
    wanted, got = (torch.autograd.grad(y.sum(), [x, *trained]) for y in (expected, found))
    torch.testing.assert_close(got, wanted)


@every_order
def test_scales(names: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    one_by_one(monkeypatch)
    inner = {"a": [], "b": ["two"], "c": ["one"]}
    model = adapted(lambda name: afina.IA3Config(target_modules=["one", "two"], feedforward_modules=inner[name]))
    x = torch.randn(len(names), TOKENS, IN, dtype=torch.float64, requires_grad=True)
    trained = [p for name in dict.fromkeys(names) if name != BASE_ROW for p in own(model, name)]
    expected = alone(model, x, names)
    with rows(model, names):
        found = model(x)
    torch.testing.assert_close(found, expected)
    wanted, got = (torch.autograd.grad(y.sum(), [x, *trained]) for y in (expected, found))
    torch.testing.assert_close(got, wanted)


@every_order
def test_other_methods_go_one_after_the_other(names: list[str]) -> None:
    model = adapted(lambda name: lora(name, use_dora=name == "b"))
    x = torch.randn(len(names), TOKENS, IN, dtype=torch.float64, requires_grad=True)
    trained = [p for name in dict.fromkeys(names) if name != BASE_ROW for p in own(model, name)]
    expected = alone(model, x, names)
    with rows(model, names):
        found = model(x)
    torch.testing.assert_close(found, expected)
    wanted, got = (torch.autograd.grad(y.sum(), [x, *trained]) for y in (expected, found))
    torch.testing.assert_close(got, wanted)


def test_t35_which_layers_take_which_way_is_told() -> None:
    model = adapted(lambda name: lora(name, use_dora=name == "c"))
    layers = model.adapters.layers
    assert mixed.told(layers, ["a", "b", BASE_ROW]) == "rows of different adapters: 2 layers compute all adapters at once"
    assert mixed.told(layers, ["a", "c"]) == (
        "rows of different adapters: 1 layers compute all adapters at once, 1 one adapter after the other (LoRA and DoRA)"
    )


def test_a_compiled_model_takes_any_mixture() -> None:
    model = adapted(lora, torch.float32).eval()
    compiled = torch.compile(model, backend="aot_eager")
    torch._dynamo.reset()
    for names in (ORDERS["one each"], ORDERS["in no order"]):
        x = torch.randn(len(names), TOKENS, IN)
        with rows(model, names), torch.no_grad():
            torch.testing.assert_close(compiled(x), model(x))
    with rows(model, ["a", "b", "b"]):
        x = torch.randn(3, TOKENS, IN, requires_grad=True)
        trained = [x, *own(model, "a"), *own(model, "b")]
        got, wanted = (torch.autograd.grad(f(x).sum(), trained) for f in (compiled, model))
    torch.testing.assert_close(got, wanted)
    torch._dynamo.reset()


def test_units_are_as_long_as_the_order_allows() -> None:
    made = {order: Rows(names) for order, names in ORDERS.items()}
    assert {order: made[order].units for order in made} == dict(zip(ORDERS, (3, 3, 6, 7, 4), strict=True))
    assert [order for order in made if made[order].whole] == ["one each", "runs of one length"]
    assert Rows(["a"] * 4 + ["b"] * 6).places == (0, 0, 1, 1, 1)


def test_an_output_that_is_not_of_rows_is_no_mixed_batch() -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(IN, OUT)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x).transpose(0, 1)

    holder = nn.Sequential(nn.Linear(IN, IN), Turned())
    model = afina.get_peft_model(holder, afina.LoraConfig(target_modules=["0"], modules_to_save=["1"]), "a")
    adapters: Any = AdapterSet.of(holder)
    adapters.set_rows(["a", BASE_ROW])
    with pytest.raises(MergeError, match=r"shape \[3, 2, 11\] for 2 rows"):
        model.get_base_model()(torch.randn(2, TOKENS, IN))
