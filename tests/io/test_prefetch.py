"""Prefetching: order, exceptions, early ends, and how far it runs ahead."""

import itertools
import threading
import time

import pytest

from diffkd.io.prefetch import prefetch


@pytest.fixture
def in_time():
    """in_time(function) -> its result; fails where it takes more than ten seconds."""

    def run(function):
        found = []
        thread = threading.Thread(target=lambda: found.append(function()), daemon=True)
        thread.start()
        thread.join(10)
        assert not thread.is_alive(), "it hangs"
        return found[0]

    return run


@pytest.mark.parametrize("depth", [0, 1, 2, 5])
@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_the_same_items_in_the_same_order(in_time, depth, count):
    assert in_time(lambda: list(prefetch(iter(range(count)), depth))) == list(range(count))
    falsy = [None, 0, "", [], False]
    assert in_time(lambda: list(prefetch(iter(falsy), depth))) == falsy


@pytest.mark.parametrize("place", [0, 1, 4])
def test_an_exception_comes_where_it_belongs(in_time, place):
    def items():
        yield from range(place)
        raise KeyError(place)

    def consume():
        found = []
        try:
            for item in prefetch(items()):
                time.sleep(0.01)  # the producer is past it by now
                found.append(item)
        except KeyError as error:
            return found, error.args
        return found, None

    assert in_time(consume) == (list(range(place)), (place,))


def test_a_consumer_that_stops_early_ends(in_time):
    before = threading.active_count()

    def consume():
        items = prefetch(itertools.count())
        found = [next(items), next(items)]
        items.close()
        for item in prefetch(itertools.count()):
            if item == 3:
                break
        return found

    assert in_time(consume) == [0, 1]
    end = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < end:
        time.sleep(0.01)
    assert threading.active_count() <= before


@pytest.mark.parametrize("depth", [1, 3])
def test_items_are_prepared_while_one_is_used(in_time, depth):
    made, enough = [], threading.Event()

    def items():
        for item in range(50):
            made.append(item)
            if len(made) == 1 + depth:
                enough.set()
            yield item

    def consume():
        found = prefetch(items(), depth)
        first = next(found)
        early = enough.wait(5)
        time.sleep(0.05)
        count = len(made)
        found.close()
        return first, early, count

    first, early, count = in_time(consume)
    assert first == 0 and early and count <= depth + 2  # ahead, but not without end
