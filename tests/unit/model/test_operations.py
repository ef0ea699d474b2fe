"""Operation counters: sums of all writers, and the newest of what is no sum."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from savings_exporter.model.operations import OperationCounts, decode, encode

names = st.sampled_from("abc")
operations = st.builds(
    OperationCounts,
    counts=st.dictionaries(names, st.integers(1, 9).map(float)),
    latest=st.dictionaries(names, st.tuples(st.integers(0, 9).map(float), st.integers(0, 9).map(float))),
)


def test_plus() -> None:
    one = OperationCounts(counts={"commits": 2.0, "saves": 1.0}, latest={"saved": (5.0, 1.0), "x": (1.0, 1.0)})
    other = OperationCounts(counts={"commits": 3.0}, latest={"saved": (4.0, 2.0), "y": (1.0, 1.0)})
    both = OperationCounts(
        counts={"commits": 5.0, "saves": 1.0}, latest={"saved": (5.0, 1.0), "x": (1.0, 1.0), "y": (1.0, 1.0)}
    )
    assert one.plus(other) == both


def test_zeros_are_left_out() -> None:
    assert OperationCounts(counts={"a": 0.0}).plus(OperationCounts(counts={"b": 0.0})).counts == {}


@given(operations, operations, operations)
def test_any_order(one: OperationCounts, two: OperationCounts, three: OperationCounts) -> None:
    assert one.plus(two.plus(three)) == three.plus(one).plus(two)
    assert one.plus(OperationCounts()) == one


@given(operations)
def test_encode_and_decode(one: OperationCounts) -> None:
    assert decode(encode(one)) == one


@pytest.mark.parametrize("data", [b"", b"[]", b'{"counts": {"a": "many"}}', b"\xff"])
def test_what_is_no_counters(data: bytes) -> None:
    with pytest.raises(ValueError, match="operation counters"):
        decode(data)
