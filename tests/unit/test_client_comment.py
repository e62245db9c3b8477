"""What a producer is told about a comment before it is sent."""

from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest

from api_client.messages import InvalidComment, SubmissionIds, message_form


def complaint(comment: Any) -> str:
    with pytest.raises(InvalidComment) as raised:
        message_form(comment)
    return str(raised.value)


class TestTaken:
    def test_a_text_alone(self) -> None:
        assert message_form("hello") == {"text": "hello"}

    def test_every_field_in_the_form_it_travels_in(self) -> None:
        # Given a comment with numbers for ids and a time in another zone
        comment = {
            "text": "hello",
            "id": 7,
            "author": 42,
            "community": "news",
            "language": "en",
            "created_at": datetime(2026, 1, 2, 3, tzinfo=timezone(timedelta(hours=1))),
            "expires_at": "2026-01-02T03:04:05Z",
            "context": {"thread": [1, None]},
            "idempotency_key": "news-7",
            "store_text": False,
            "v": 1,
        }
        # Then only JSON types are sent
        assert message_form(comment) == comment | {
            "id": "7",
            "author": "42",
            "created_at": "2026-01-02T03:00:00+01:00",
            "expires_at": "2026-01-02T03:04:05Z",
        }

    def test_a_field_that_is_none_is_left_out(self) -> None:
        assert message_form({"text": "hello", "author": None}) == {"text": "hello"}

    def test_the_longest_text(self) -> None:
        assert message_form("é" * 10_240) == {"text": "é" * 10_240}


class TestRefused:
    @pytest.mark.parametrize(
        ("comment", "said"),
        [
            (7, "a comment is a string or a mapping, not int"),
            ({}, "'text' is required"),
            ({"text": 7}, "'text' Input should be a valid string"),
            ("  \n", "'text' is empty, or holds nothing that can be seen; a comment needs text to be scored"),
            ("é" * 10_241, "'text' has 20,482 bytes of UTF-8, more than the 20,480 allowed; shorten it"),
            ("a\0b", "'text' holds a NUL character, which databases cannot store; remove it"),
            ("a\ud800b", "'text' holds a lone surrogate, which is no Unicode text; remove it"),
            ({"text": "a", "id": ""}, "'id' String should have at least 1 character"),
            ({"text": "a", "id": True}, "'id' Input should be a valid string"),
            ({"text": "a", "author": "x" * 201}, "'author' String should have at most 200 characters"),
            ({"text": "a", "language": "x" * 36}, "'language' String should have at most 35 characters"),
            ({"text": "a", "idempotency_key": 1.5}, "'idempotency_key' Input should be a valid string"),
            ({"text": "a", "store_text": 0}, "'store_text' Input should be a valid boolean"),
            ({"text": "a", "context": [1]}, "'context' Input should be a valid dictionary"),
            (
                {"text": "a", "context": {"a": "x" * 4_096}},
                "'context' has 4,105 bytes as JSON, more than the 4,096 allowed",
            ),
            (
                {"text": "a", "context": {"a": "\0"}},
                "'context' holds a NUL character, which databases cannot store; remove it",
            ),
            (
                {"text": "a", "v": 2, "later": 1},
                "'v' names a version of the contract that is not known here: this release knows 1; upgrade the workers",
            ),
        ],
    )
    def test_what_breaks_a_bound(self, comment: Any, said: str) -> None:
        assert complaint(comment) == said

    def test_an_unknown_field_is_named_with_what_is_allowed(self) -> None:
        assert complaint({"text": "a", "comunity": "news"}).startswith(
            "'comunity' is not a field of a comment; allowed: text, id"
        )

    @pytest.mark.parametrize("time", [datetime(2026, 1, 1), "2026-01-01T00:00:00", "yesterday"])
    def test_a_time_needs_its_zone(self, time: Any) -> None:
        assert complaint({"text": "a", "created_at": time}).startswith("'created_at' Input should")

    @pytest.mark.parametrize("value", [{"\0": 1}, [["\0"]], {"a": {"b": "\ud800"}}])
    def test_context_holds_what_databases_can_store(self, value: Any) -> None:
        assert complaint({"text": "a", "context": {"a": value}}).startswith("'context' holds ")
        # But what only looks like it, such as JSON within a text, is as good as any
        sound = {"text": "a", "context": {"a": r"\u0000", r"\u0000": r'{"b": "\\u0000"}'}}
        assert message_form(sound)["context"] == sound["context"]

    @pytest.mark.parametrize("value", [float("nan"), object(), datetime(2026, 1, 1, tzinfo=UTC)])
    def test_context_must_be_json(self, value: Any) -> None:
        assert complaint({"text": "a", "context": {"a": value}}).startswith("'context' cannot be written as JSON: ")


class TestSubmissionIds:
    def test_are_a_sequence_over_all_messages(self) -> None:
        # Given two messages, one of whose comments has a key of its own
        ids = SubmissionIds()
        ids.add("first", [{"text": "a"}, {"text": "b", "idempotency_key": "mine"}])
        ids.add("second", [{"text": "c"}])
        # Then they read as one list
        assert list(ids) == ["first:0", "mine", "second:0"]
        assert (len(ids), ids[-1], ids[1:]) == (3, "second:0", ["mine", "second:0"])
        with pytest.raises(IndexError):
            ids[3]
