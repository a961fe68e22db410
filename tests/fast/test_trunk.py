"""What is passed over equals what is computed: losses, gradients and the numbers drawn by chance."""

from __future__ import annotations

import shutil

import pytest
import torch
from bases import BASES, LAYERS, made, rows

from afina import LoraConfig, get_peft_model
from afina.fast.blocks import find_stack
from afina.fast.states import States
from afina.fast.trunk import Trunk

GENEROUS = 2**30


def trained_from(name, block):
    """The last blocks from `block` on, and the head, with their dropout."""
    model = made(name)
    stack = find_stack(model, lambda: model.eval()(**rows()))
    assert not isinstance(stack, str), stack
    for part in stack.blocks[block:]:
        part.requires_grad_(True)
    head = getattr(model, "classifier", None) or getattr(model, "score", None) or model.classification_head
    head.requires_grad_(True)
    return model, find_stack(model, lambda: model.eval()(**rows()))


def steps(model, trunk, batches):
    losses = []
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    torch.manual_seed(3)
    with trunk.used():
        for batch in batches:
            model.train()
            loss = model(**batch).logits.logsumexp(-1).sum()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return losses, [p.detach().clone() for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("block", [1, LAYERS - 1])
@pytest.mark.parametrize("name", BASES)
def test_passing_over_the_trunk_changes_no_loss_and_no_weight(tmp_path, name, block):
    """With the dropout of what is trained: the same numbers are drawn for it."""
    order = torch.randperm(5, generator=torch.Generator().manual_seed(1))
    whole = rows()
    batches = [whole, {k: v[order] for k, v in whole.items()}, {k: v[order[:3]] for k, v in whole.items()}, whole]
    model, stack = trained_from(name, LAYERS if name in ("t5", "bart") else block)
    assert stack.depth == (LAYERS if name in ("t5", "bart") else block)
    expected, weights = steps(model, Trunk(stack, None), batches)
    model, stack = trained_from(name, LAYERS if name in ("t5", "bart") else block)
    trunk = Trunk(stack, States(tmp_path, GENEROUS))
    with trunk.used():
        assert trunk.fits(lambda: model.eval()(**rows()).logits)
    computed = trunk.computed
    found, same = steps(model, trunk, batches)
    assert trunk.computed == computed
    assert trunk.passed_over >= len(batches)
    assert found == pytest.approx(expected, rel=1e-5)
    for one, other in zip(same, weights, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["bert", "gpt2", "bart"])
def test_nothing_in_the_trunk_is_drawn_by_chance_and_what_is_above_is(name):
    model, stack = trained_from(name, LAYERS if name == "bart" else LAYERS - 1)
    entering, leaving = [], []
    stack.blocks[stack.depth - 1].register_forward_hook(
        lambda m, a, out: entering.append(out[0] if isinstance(out, tuple) else out)
    )
    with Trunk(stack, None).used():
        for _ in range(2):
            model.train()
            leaving.append(model(**rows()).logits)
    torch.testing.assert_close(entering[0], entering[1], rtol=0, atol=0)
    assert not torch.equal(leaving[0], leaving[1])
    model.eval()
    plain = model(**rows()).logits
    with Trunk(stack, None).used():
        torch.testing.assert_close(model(**rows()).logits, plain, rtol=0, atol=0)
    torch.testing.assert_close(model(**rows()).logits, plain, rtol=0, atol=0)


def test_states_are_there_for_the_next_run_and_for_nobody_who_was_killed(tmp_path):
    model, stack = trained_from("bert", LAYERS - 1)
    first = Trunk(stack, States(tmp_path, GENEROUS))
    with first.used():
        first.fill([lambda: model(**rows()), lambda: model(**rows(seed=1))])
    killed = States(tmp_path, GENEROUS)  # before `keep`
    assert killed.rows == {}
    first.states.keep()
    again = Trunk(stack, States(tmp_path, GENEROUS))
    assert len(again.states.rows) == 10
    model.eval()
    expected = model(**rows(seed=1)).logits
    with again.used():
        assert again.fits(lambda: model(**rows()).logits)
        assert torch.equal(model(**rows(seed=1)).logits, expected)
    assert again.computed == 0


def test_padding_belongs_to_no_row(tmp_path):
    """The same rows in longer batches are known, and their answers stay what they are."""
    model, stack = trained_from("bert", 2)
    trunk = Trunk(stack, States(tmp_path, GENEROUS))
    batch = rows()
    wider = {k: torch.nn.functional.pad(v, (0, 6)) for k, v in batch.items()}
    model.eval()
    with trunk.used():
        trunk.fill([lambda: model(**batch)])
        expected = model(**batch).logits
        torch.testing.assert_close(model(**wider).logits, expected, rtol=1e-4, atol=1e-5)
    assert trunk.computed == 1


def test_another_second_sentence_is_another_row(tmp_path):
    model, stack = trained_from("bert", 2)
    trunk = Trunk(stack, States(tmp_path, GENEROUS))
    batch = {**rows(), "token_type_ids": torch.zeros(5, 13, dtype=torch.long)}
    other = {**batch, "token_type_ids": torch.ones(5, 13, dtype=torch.long)}
    model.eval()
    expected = [model(**batch).logits, model(**other).logits]
    with trunk.used():
        for _ in range(2):
            for one, logits in zip((batch, other), expected, strict=True):
                torch.testing.assert_close(model(**one).logits, logits, rtol=0, atol=0)
    assert len(trunk.states.rows) == 10


def test_what_is_over_the_limit_is_computed_as_ever(tmp_path):
    model, stack = trained_from("bert", 2)
    trunk = Trunk(stack, States(tmp_path, 20 * 24 * 4))  # twenty tokens
    model.eval()
    expected = model(**rows()).logits
    with trunk.used():
        for _ in range(3):
            torch.testing.assert_close(model(**rows()).logits, expected, rtol=0, atol=0)
    assert (trunk.computed, trunk.passed_over) == (3, 0)
    assert trunk.states.size <= 20 * 24 * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_come_back_bit_for_bit(tmp_path, dtype):
    states = States(tmp_path, GENEROUS)
    made_rows = {f"{n}": torch.randn(n, 7).to(dtype) for n in (3, 1, 11)}
    for digest, row in made_rows.items():
        assert states.add(digest, row)
    states.keep()
    for read in (states, States(tmp_path, GENEROUS)):
        for digest, row in made_rows.items():
            assert torch.equal(read.get(digest), row)
    (tmp_path / "states.bin").write_bytes(b"cut off")
    assert States(tmp_path, GENEROUS).rows == {}


def test_several_who_add_at_once_read_what_each_has_added(tmp_path):
    """Whoever is first adds for all; a third sees those rows, and none of the others, who end up with rows at the same
    place of the file."""
    published = States(tmp_path, GENEROUS)
    made_rows = {f"{n}": torch.randn(n, 7) for n in range(1, 10)}
    published.add("1", made_rows["1"])
    published.keep()
    del published  # it is over
    one, other = States(tmp_path, GENEROUS), States(tmp_path, GENEROUS)
    for digests in (("2", "3"), ("4", "2")), (("5",), ("6", "7")):
        for states, own in zip((one, other), digests, strict=True):
            assert all(states.add(digest, made_rows[digest]) for digest in own)
    for states in (one, other):
        states.keep()
    third = States(tmp_path, GENEROUS)
    for states, there in ((one, "1235"), (other, "12467"), (third, "1235")):
        assert set(states.rows) == set(there)
        assert all(torch.equal(states.get(digest), made_rows[digest]) for digest in there)
    del one
    assert third.add("8", made_rows["8"])
    third.keep()
    last = States(tmp_path, GENEROUS)
    assert set(last.rows) == set("12358")
    assert all(torch.equal(last.get(digest), made_rows[digest]) for digest in last.rows)


def test_who_adds_later_has_what_others_have_added_meanwhile(tmp_path):
    early, made_rows = States(tmp_path, GENEROUS), {f"{n}": torch.randn(n, 3, 5) for n in range(1, 4)}
    other = States(tmp_path, GENEROUS)
    other.add("1", made_rows["1"])
    other.keep()
    del other
    for digest in "231":
        assert early.add(digest, made_rows[digest])
    early.keep()
    for states in (early, States(tmp_path, GENEROUS)):
        assert all(torch.equal(states.get(digest), made_rows[digest]) for digest in "123")


@pytest.mark.parametrize("anew", [False, True])
def test_a_folder_that_others_remove_is_read_on(tmp_path, anew):
    """To make room, while runs still read it; what one of them adds then is not taken for what a new folder holds."""
    folder, made_rows = tmp_path / "trunk", {f"{n}": torch.randn(n, 7) for n in range(1, 5)}
    writer = States(folder, GENEROUS)
    for digest in "12":
        writer.add(digest, made_rows[digest])
    writer.keep()
    reader = States(folder, GENEROUS)
    shutil.rmtree(folder)
    new = States(folder, GENEROUS) if anew else None
    assert writer.add("3", made_rows["3"])
    assert reader.add("4", made_rows["4"]) == anew
    for states in (writer, reader):
        states.keep()
    for states, there in ((writer, "123"), (reader, "124" if anew else "12")):
        assert all(torch.equal(states.get(digest), made_rows[digest]) for digest in there)
    assert States(folder, GENEROUS).rows == {}
    if new is not None:
        assert all(new.add(digest, made_rows["1"] + 1) for digest in "1234")
        assert torch.equal(new.get("1"), made_rows["1"] + 1)
        writer.keep()
        assert States(folder, GENEROUS).rows == {}


@pytest.mark.parametrize(
    ("options", "depth"),
    [
        ({"target_modules": "all-linear"}, 0),
        ({"target_modules": ["query"], "layers_to_transform": [2]}, 2),
        ({"target_modules": ["word_embeddings"]}, 0),
        ({"target_modules": ["classifier"]}, LAYERS),
        ({"target_modules": ["dense"], "layers_to_transform": [1, 2]}, 1),
    ],
)
def test_the_trunk_ends_where_something_is_trained(options, depth):
    model = made("bert")
    get_peft_model(model, LoraConfig(r=2, task_type="SEQ_CLS", **options))
    stack = find_stack(model, lambda: model.eval()(**rows()))
    assert stack.depth == depth


def test_what_is_adapted_above_the_trunk_is_drawn_as_ever():
    """The module around the whole model holds the trunk and is no part of it."""
    config = LoraConfig(r=2, task_type="SEQ_CLS", target_modules=["dense"], layers_to_transform=[2], lora_dropout=0.3)
    model = get_peft_model(made("bert"), config)
    stack = find_stack(model, lambda: model.eval()(**rows()))
    assert stack.depth == 2
    assert model not in stack.before
    with Trunk(stack, None).used():
        model.train()
        assert model.training
        assert not any(m.training for block in stack.blocks[:2] for m in block.modules())
        assert all(m.training for m in stack.blocks[2].modules())
        assert not torch.equal(model(**rows()).logits, model(**rows()).logits)


@pytest.mark.parametrize("method", ["prompt_tuning", "prefix_tuning", "p_tuning"])
def test_what_acts_on_all_blocks_leaves_no_trunk(method):
    from afina.core.registry import get_method

    model = made("bert")
    config = get_method(method).make_config(num_virtual_tokens=3, task_type="SEQ_CLS")
    adapted = get_peft_model(model, config)
    stack = find_stack(adapted, lambda: adapted.eval()(**rows()))
    assert isinstance(stack, str) or stack.depth == 0
