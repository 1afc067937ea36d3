import itertools

import datasets
import pytest

from trl_ray.config.sections import MixtureStopping
from trl_ray.data.sources.mixed_streams import drawn_rows
from trl_ray.data.sources.mixtures import MixedRow, Source, mix
from trl_ray.errors import DataError

SHORT = Source(name="short", rows=[{"prompt": f"s{i}"} for i in range(3)], weight=1.0)
# Rows of another shape, which Arrow could not hold in one column with the others.
LONG = Source(name="long", rows=[{"prompt": [{"role": "user", "content": f"l{i}"}]} for i in range(40)], weight=3.0)


def places(mixture):
    return [(mixed.source, mixed.number) for mixed in mixture]


@pytest.mark.parametrize("stopping", MixtureStopping)
def test_the_order_is_that_of_interleave_datasets(stopping):
    columns = [
        datasets.Dataset.from_list([{"place": f"{s.name}{i}"} for i in range(len(s.rows))]) for s in (SHORT, LONG)
    ]
    want = datasets.interleave_datasets(columns, probabilities=[0.25, 0.75], seed=5, stopping_strategy=str(stopping))
    got = mix([SHORT, LONG], seed=5, stopping=stopping)
    assert [f"{name}{number}" for name, number in places(got)] == want["place"][:]
    assert len(got) == len(want)


@pytest.mark.parametrize("stopping", MixtureStopping)
def test_streams_are_drawn_as_datasets_are_and_read_no_further_than_is_asked(stopping):
    reads = [lambda start, rows=source.rows: iter(rows[start:]) for source in (SHORT, LONG)]
    drawn = drawn_rows(reads, ["short", "long"], weights=[1.0, 3.0], seed=5, stopping=stopping)
    want = mix([SHORT, LONG], seed=5, stopping=stopping)
    assert [(("short", "long")[each.source], each.number) for each in drawn] == places(want)
    endless = drawn_rows([lambda start: itertools.count(start)] * 2, ["a", "b"], weights=[1, 1], seed=0)
    assert sorted(each.row for each in itertools.islice(endless, 6) if each.source)[0] == 0
    with pytest.raises(DataError, match="at least one row, b has none"):
        next(drawn_rows([lambda start: iter([{}]), lambda start: iter([])], ["a", "b"], weights=[1, 1], seed=0))


def test_a_row_comes_as_it_was_with_its_number_in_its_source():
    mixture = mix([SHORT, LONG], seed=0, stopping=MixtureStopping.ALL_EXHAUSTED_WITHOUT_REPLACEMENT)
    assert sorted(places(mixture)) == sorted([*(("short", i) for i in range(3)), *(("long", i) for i in range(40))])
    for mixed in mixture:
        source = {"short": SHORT, "long": LONG}[mixed.source]
        assert mixed == MixedRow(source=source.name, number=mixed.number, row=source.rows[mixed.number])


def test_the_stopping_rules_end_with_the_first_source_or_with_the_last():
    first, every = (mix([SHORT, LONG], seed=2, stopping=rule) for rule in list(MixtureStopping)[:2])
    assert len(first) < 43
    assert {number for name, number in places(every) if name == "long"} == set(range(40))
    assert len(every) > 43  # the short one began again


def test_the_same_seed_gives_the_same_order_and_another_seed_another():
    assert places(mix([SHORT, LONG], seed=1)) == places(mix([SHORT, LONG], seed=1))
    every = MixtureStopping.ALL_EXHAUSTED
    assert places(mix([SHORT, LONG], seed=1, stopping=every)) != places(mix([SHORT, LONG], seed=2, stopping=every))


def test_weights_are_relative_and_are_kept():
    one, two = (
        Source(name=name, rows=[{"text": "t"}] * 4000, weight=weight) for name, weight in (("a", 10), ("b", 30))
    )
    drawn = [name for name, _ in places(mix([one, two], seed=0))]
    assert 0.72 < drawn.count("b") / len(drawn) < 0.78


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ([], "A mixture must have at least one dataset"),
        ([SHORT, SHORT], "must have names of their own, got 'short' twice"),
        ([Source(name="none", rows=[])], "none has none"),
        ([Source(name="x", rows=[{}], weight=0.0)], "The weight of x must be a number above 0, got float 0.0"),
        ([Source(name="x", rows=[{}], weight=float("nan"))], "The weight of x must be a number above 0, got float nan"),
    ],
)
def test_a_mixture_that_cannot_be_is_refused(sources, message):
    with pytest.raises(DataError, match=message):
        mix(sources, seed=0)
