"""Batches that are made ahead: the same ones, from any place on."""

import contextlib
import itertools
import json
import threading

import pytest

from walt_jax.data.packing import Item, Packed
from walt_jax.errors import UserError
from walt_jax.training.loop import made_ahead


class Items:
    """Clips of 1 to 7 tokens; one of them may be bad."""

    def __init__(self, bad: int = -1):
        self.bad = bad

    def __getitem__(self, number: int) -> Item:
        if number == self.bad:
            raise UserError("a sentence")
        return Item(number, number % 7 + 1, number)


def packs(items: Items) -> Packed:
    return Packed(items, batch_size=2, tokens=12, clips=4, buffer=8)


@pytest.mark.parametrize("taken", range(5))
def test_a_batch_that_was_made_and_not_taken_is_not_lost(taken):
    in_turn = list(itertools.islice(packs(Items()), taken + 6))
    with contextlib.closing(made_ahead(packs(Items()), None)) as iterator:
        batches = [next(iterator) for _ in range(taken)]
        position = json.loads(json.dumps(iterator.get_state()))
    with contextlib.closing(made_ahead(packs(Items()), position)) as iterator:
        batches += [next(iterator) for _ in range(6)]
    assert batches == in_turn


def test_a_mistake_is_told_where_its_batch_is_asked_for():
    with contextlib.closing(made_ahead(packs(Items(bad=30)), None)) as iterator:
        next(iterator)
        with pytest.raises(UserError) as raised:
            list(iterator)
    assert str(raised.value) == "a sentence"


def test_no_thread_stays():
    before = set(threading.enumerate())
    with contextlib.closing(made_ahead(packs(Items()), None)) as iterator:
        next(iterator)
        started = set(threading.enumerate()) - before
    assert started
    for thread in started:
        thread.join(10)
    assert not any(thread.is_alive() for thread in started)
