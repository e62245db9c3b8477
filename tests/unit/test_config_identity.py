"""What an id means: one for each name of a community, as an older release had it wherever that is possible."""

import pickle

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from config.identity import (
    ENDS_LIKE_A_LETTER,
    SubmissionId,
    community_and_name,
    id_of_text,
    refused_id,
    refused_name,
    submission_id,
)
from config.names import DEFAULT_COMMUNITY, MAX_ID_CHARS

SHA256 = "0123456789abcdef" * 4
# Few letters, and all that mean something here, so that what is different looks alike
PIECES = st.sampled_from(
    ["a", "%", "/", "%/", "%2F", "%25", "#", ":0", "default", f"#{SHA256[:16]}", "#refused", SHA256]
)
NAMES = st.lists(PIECES, min_size=1, max_size=5).map(lambda some: "".join(some)[:MAX_ID_CHARS])
PAIRS = st.tuples(st.just(DEFAULT_COMMUNITY) | NAMES, NAMES)


@given(PAIRS, PAIRS)
@example(("default", "news/1"), ("news", "1"))
@example(("a/b", "c"), ("a", "b/c"))
@example(("a%2Fb", "c"), ("a/b", "c"))
@example(("default", "default/a/b"), ("default", "a/b"))
@example(("%", SHA256), ("default", f"%/{SHA256}"))
def test_no_two_submissions_share_an_id(one: tuple[str, str], other: tuple[str, str]) -> None:
    assert (submission_id(*one) == submission_id(*other)) == (one == other)


@given(PAIRS)
def test_an_id_is_one_of_a_submission_alone(pair: tuple[str, str]) -> None:
    made = submission_id(*pair)
    # It may be an idempotency key
    assert 0 < len(made) <= MAX_ID_CHARS
    # And is no dead letter's of something else
    assert not ENDS_LIKE_A_LETTER.search(made)
    assert ENDS_LIKE_A_LETTER.search(refused_id(made))
    assert refused_name(refused_id(made)) == made
    assert len(id_of_text(made, SHA256)) <= MAX_ID_CHARS
    # And says whose it is, where it is no hash
    assert community_and_name(made) in (None, pair)


@pytest.mark.parametrize(
    ("community", "name", "expected"),
    [
        ("default", "42", "42"),
        ("default", "0d8f9a52:0", "0d8f9a52:0"),
        ("default", "a/b", "default/a/b"),
        ("news", "42", "news/42"),
        ("50% off/today", "42", "50%25 off%2Ftoday/42"),
    ],
)
def test_an_id_can_be_read(community: str, name: str, expected: str) -> None:
    assert submission_id(community, name) == expected


def test_what_submit_returns_is_a_string_that_knows_its_text() -> None:
    made = pickle.loads(pickle.dumps(SubmissionId("news/42", "news", "0" * 16)))  # noqa: S301
    assert made == "news/42"
    assert (made.community, made.text_hash) == ("news", "0" * 16)
