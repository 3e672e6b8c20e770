"""Of equal documents the first in the corpus stays, whatever the units and buckets."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hybridlm.data.preparing.duplicates import dropped_of, mark_duplicates, write_digests
from hybridlm.data.reading.documents import Bad, Document, Turn


@dataclass(frozen=True)
class Given:
    """A unit of these texts; None is what cannot be a document."""

    texts: tuple[str | None, ...]
    size: int = 0

    def documents(self):
        return (Bad("x", "bad") if text is None else Document(f"x:{i}", text) for i, text in enumerate(self.texts))


def dropped(folder, units, bucket=1000):
    for number, unit in enumerate(units):
        write_digests(folder, number, unit)
    mark_duplicates(folder, len(units), bucket)
    return [dropped_of(folder, number).tolist() for number in range(len(units))]


def expected(units):
    seen, marks = set(), []
    for unit in units:
        marks.append([])
        for text in unit.texts:
            if text is not None:
                marks[-1].append(text in seen)
                seen.add(text)
    return marks


units = st.lists(
    st.lists(st.none() | st.integers(0, 9).map(str) | st.text(max_size=2), max_size=12).map(tuple).map(Given),
    max_size=6,
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(corpus=units, bucket=st.integers(1, 30))
def test_the_same_as_a_plain_set_finds(tmp_path, corpus, bucket):
    try:
        assert dropped(tmp_path, corpus, bucket) == expected(corpus)
    finally:
        for path in tmp_path.iterdir():
            path.unlink()


@pytest.mark.parametrize("bucket", [40, 100, 10_000])
def test_many_documents_in_many_buckets(tmp_path, bucket):
    numbers = np.random.default_rng(0).integers(0, 1500, (8, 400))
    corpus = [Given(tuple(str(number) for number in unit)) for unit in numbers]
    assert dropped(tmp_path, corpus, bucket) == expected(corpus)


def test_the_first_in_the_corpus_stays_in_whatever_order_the_units_are_read(tmp_path):
    corpus = [Given(("a", "b", "a")), Given(()), Given((None, "b", "c")), Given(("c", None, "a"))]
    for number in (3, 1, 0, 2):
        write_digests(tmp_path, number, corpus[number])
    mark_duplicates(tmp_path, 4)
    # What cannot be a document has no place among them.
    assert [dropped_of(tmp_path, number).tolist() for number in range(4)] == [
        [False, False, True],
        [],
        [True, False],
        [True, True],
    ]


def test_conversations_are_equal_if_all_their_messages_are(tmp_path):
    def conversation(*contents):
        turns = tuple(Turn(role, content) for role, content in zip(("user", "assistant"), contents, strict=True))
        return Document("x", "", turns=turns)

    class Conversations:
        size = 0

        def documents(self):
            return iter(
                [conversation("a", "b"), conversation("a", "c"), conversation("a", "b"), conversation("ab", "")]
            )

    assert dropped(tmp_path, [Conversations()]) == [[False, False, True, False]]


def test_a_unit_whose_digests_are_there_is_not_read_again(tmp_path):
    class Unreadable:
        size = 0

        def documents(self):
            raise AssertionError

    sizes = []
    write_digests(tmp_path, 0, Given(("abc", None, "de")), sizes.append)
    assert sizes == [3, 2]
    write_digests(tmp_path, 0, Unreadable())
    mark_duplicates(tmp_path, 1)
    assert dropped_of(tmp_path, 0).tolist() == [False, False]


def test_work_that_was_killed_is_redone(tmp_path):
    class Killed:
        size = 0

        def documents(self):
            yield Document("x:1", "a")
            raise KeyboardInterrupt

    corpus = [Given(("a", "b")), Given(("b", "c", "a"))]
    write_digests(tmp_path, 0, corpus[0])
    with pytest.raises(KeyboardInterrupt):
        write_digests(tmp_path, 1, Killed())
    assert dropped(tmp_path, corpus) == [[False, False], [True, False, True]]
    # Marks of a pass that did not finish.
    np.ones(3, dtype=np.bool_).tofile(tmp_path / "unit-000000.dropped")
    assert dropped(tmp_path, corpus) == [[False, False], [True, False, True]]


def test_a_folder_that_cannot_be_written_is_an_error_of_the_system(tmp_path):
    write_digests(tmp_path, 0, Given(("a", "a")))
    (tmp_path / "unit-000000.dropped").mkdir()
    with pytest.raises(IsADirectoryError):
        mark_duplicates(tmp_path, 1)
