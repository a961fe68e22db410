"""Allocators played through: they hold what is taken at least, and glibc's heap keeps holes."""

from __future__ import annotations

import itertools
import random

import pytest

from afina.memory.allocators import Heap, Pools

MIB = 1 << 20


@pytest.mark.parametrize("make", [lambda: Heap(MIB, MIB), lambda: Heap(MIB), Pools, lambda: Heap(MIB, slack=0)])
def test_what_is_held_covers_what_is_taken_and_blocks_do_not_overlap(make):
    allocator, chance, taken, alive = make(), random.Random(0), {}, 0
    for _ in range(3000):
        if taken and chance.random() < 0.5:
            block = chance.choice(sorted(taken))
            alive -= taken.pop(block)
            allocator.give(block)
        else:
            size = int(2 ** chance.uniform(3, 24))
            block = allocator.take(size)
            assert block not in taken
            taken[block], alive = size, alive + size
        assert allocator.held >= alive
    sizes = getattr(allocator, "sizes", None) or {b: s for b, (_, s) in allocator.blocks.items()}
    inside = sorted((b, s) for b, s in sizes.items() if b >= 0)
    assert all(a + s <= b for (a, s), (b, _) in itertools.pairwise(inside))


def test_large_blocks_go_back_at_once_and_the_end_of_a_heap_where_it_is_trimmed():
    for heap in (Heap(MIB), Heap(MIB, MIB)):
        for _ in range(3):
            block = heap.take(5 * MIB)
            assert heap.held >= 5 * MIB
            heap.give(block)
            assert heap.held < MIB

    def held(heap):
        for block in [heap.take(MIB // 2) for _ in range(6)]:
            heap.give(block)
        return heap.held

    assert held(Heap(MIB, MIB)) < 2 * MIB < 3 * MIB <= held(Heap(MIB))


def test_an_old_glibc_does_not_put_a_block_where_one_of_its_size_was():
    def held(slack):
        heap = Heap(32 * MIB, slack=slack)
        one, two = heap.take(3 * MIB), heap.take(3 * MIB)
        heap.give(one)
        heap.take(3 * MIB)
        assert two >= 0
        return heap.held

    assert held(0) < 7 * MIB < 9 * MIB < held(112)


def test_a_gpu_keeps_what_it_was_given():
    pools = Pools()
    small, large = pools.take(100), pools.take(11 * MIB)
    assert pools.held == 2 * MIB + 12 * MIB
    pools.give(large)
    pools.give(small)
    assert pools.held == 14 * MIB
    pools.take(10 * MIB)
    pools.take(513)
    assert pools.held == 14 * MIB
