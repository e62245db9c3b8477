"""What a message may hold, and what is said of everything else."""

import base64
import hashlib
import json
import random
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.mutate import change_value, mutated, real_messages
from config.comment import MAX_CONTEXT_NESTING, Comment
from config.identity import refused_id, refused_name
from config.names import MAX_COMMENTS_PER_MESSAGE, MAX_TEXT_BYTES, MODERATE_TASK, Reason
from worker.envelope import (
    MALFORMED_BYTES_HEADER,
    MALFORMED_HEADER,
    MalformedMessage,
    malformed_envelope,
    read_envelope,
)
from worker.message import (
    MAX_NESTING,
    MAX_PAYLOAD_BYTES,
    Parsed,
    Refused,
    parse_message,
    refuse_comment,
)

NOW = datetime(2026, 11, 22, 12, 0, tzinfo=UTC)
HEADERS = {"task": MODERATE_TASK, "id": "m"}
MARKER = "quoted-from-the-comment"
OF_THE_WHOLE_MESSAGE = {
    Reason.UNREADABLE_MESSAGE,
    Reason.UNKNOWN_TASK,
    Reason.NOT_A_LIST,
    Reason.TOO_MANY_COMMENTS,
}


def parse(*comments: object, **headers: object) -> Parsed:
    """A message with these comments."""
    return parse_body(json.dumps([[list(comments)], {}, {}]).encode(), **headers)


def parse_body(body: bytes, **headers: object) -> Parsed:
    return parse_message(HEADERS | headers, body, now=NOW)


def only_refusal(parsed: Parsed) -> Refused:
    assert not parsed.submitted
    (refused,) = parsed.refused
    return refused


def nested(levels: int) -> Any:
    return [nested(levels - 1)] if levels else 1


# --- Sound messages ---


def test_a_comment_needs_nothing_but_its_text() -> None:
    (submitted,) = parse({"text": "hello"}).submitted
    assert submitted.submission_id == "m:0"
    assert submitted.comment == Comment(text="hello", community="default", store_text=True, v=1)


def test_every_field_comes_through() -> None:
    # Given a comment with all of them, its id a number as many sites have it
    whole = {
        "text": " Ünïcode 🙂\n",
        "id": 7,
        "community": "news",
        "author": "a\u202eb",
        "language": "pt-BR",
        "created_at": "2026-11-22T12:00:00+02:00",
        "expires_at": "2026-11-22T12:00:01Z",
        "context": {"thread": [1, 2.5, None, True], "é": {"deep": "\\u0041"}},
        "idempotency_key": "mine",
        "store_text": False,
        "v": 1,
    }
    (submitted,) = parse(whole).submitted
    # Then the key names the submission in its community, and the rest is as it was sent
    assert (submitted.submission_id, submitted.name) == ("news/mine", "mine")
    assert submitted.comment.id == "7"
    assert submitted.comment.created_at == datetime(2026, 11, 22, 10, 0, tzinfo=UTC)
    as_sent = {name: whole[name] for name in whole if name not in ("id", "created_at", "expires_at")}
    assert submitted.comment.model_dump(include=set(as_sent)) == as_sent


def test_protocol_1_has_everything_in_the_body() -> None:
    body = {"task": MODERATE_TASK, "id": "old", "args": [[{"text": "hello"}]], "kwargs": {}}
    (submitted,) = parse_message({}, json.dumps(body).encode(), now=NOW).submitted
    assert submitted.submission_id == "old:0"


@pytest.mark.parametrize("task_id", [None, "", 5, ["m"], "x" * 201, "line\nbreak", "nul\x00", "ä"])
def test_a_message_without_a_usable_id_is_known_by_its_hash(task_id: object) -> None:
    # Given the same message twice
    ids = {parse({"text": "hello"}, id=task_id).submitted[0].submission_id for _ in range(2)}
    # Then a redelivery has the same identity, and another message has not
    assert len(ids) == 1
    assert ids.pop().startswith("sha256:")
    assert parse({"text": "a"}, id=task_id).submitted != parse({"text": "b"}, id=task_id).submitted


@pytest.mark.parametrize(
    "comment",
    [
        pytest.param({"text": "é" * (MAX_TEXT_BYTES // 2)}, id="longest text"),
        pytest.param({"text": "a", "id": "i" * 200}, id="longest id"),
        pytest.param({"text": "a", "context": {"a": "x" * (4_096 - len('{"a": ""}'))}}, id="largest context"),
        pytest.param({"text": "a", "context": {"a": nested(MAX_CONTEXT_NESTING - 1)}}, id="deepest context"),
        pytest.param({"text": "\u202eyas ot ro\u200bder\u202c"}, id="backwards and cut by nothing"),
        pytest.param({"text": "\u202e."}, id="one character that can be seen"),
        pytest.param({"text": "\U0001fae8"}, id="one newer than Python's Unicode"),
        pytest.param({"text": "Z" + "\u0301" * 5_000}, id="5,000 accents on one letter"),
        pytest.param({"text": "".join(chr(plane << 16 | 0xABC) for plane in range(17))}, id="every plane"),
        pytest.param({"text": "a", "community": 5, "author": 0}, id="numbers for names"),
        pytest.param({"text": "a", "expires_at": "2026-11-22T12:00:00.000001Z"}, id="expires right after"),
    ],
)
def test_the_bounds_themselves_are_allowed(comment: dict[str, Any]) -> None:
    parsed = parse(comment)
    assert not parsed.refused
    assert len(parsed.submitted) == 1


def test_256_comments_are_one_message() -> None:
    assert len(parse(*[{"text": "a"}] * MAX_COMMENTS_PER_MESSAGE).submitted) == MAX_COMMENTS_PER_MESSAGE


# --- Bad comments ---

BAD_COMMENTS: dict[str, tuple[object, str]] = {
    "no text": ({}, "'text' is required"),
    "empty text": ({"text": ""}, "'text' is empty"),
    "blank text": ({"text": " \n\t\u3000"}, "'text' is empty"),
    "one byte over": ({"text": "é" * (MAX_TEXT_BYTES // 2) + "e"}, "20,481 bytes of UTF-8, more than the 20,480"),
    "unseen text": ({"text": "\u200b\ufeff\u202e\u2060\x07\u2028\U000e0041"}, "'text' is empty, or holds nothing that"),
    "text of another type": ({"text": 5}, "'text' Input should be a valid string"),
    "null text": ({"text": None}, "'text' Input should be a valid string"),
    "NUL": ({"text": "a\x00b"}, "'text' holds a NUL"),
    "NUL in the id": ({"text": "a", "id": "\x00"}, "'id' holds a NUL"),
    "lone surrogate": ({"text": "a\ud800"}, "'text'"),
    "lone surrogate in the context": ({"text": "a", "context": {"a": ["\udfff"]}}, "'context'"),
    "NUL in the context": ({"text": "a", "context": {"a\x00": 1}}, "'context' holds a NUL"),
    "text alone": ("hello", "a comment is an object"),
    "list for a comment": ([{"text": "a"}], "a comment is an object"),
    "null for a comment": (None, "a comment is an object"),
    "unknown field": (
        {"text": "a", "colour": 1},
        "a name of 6 characters is not a field of a comment; allowed: text, id",
    ),
    "other contract": ({"text": "a", "v": 2, "later": 1}, "this release knows 1"),
    "empty id": ({"text": "a", "id": ""}, "'id'"),
    "long id": ({"text": "a", "id": "i" * 201}, "'id' String should have at most 200 characters"),
    "endless number for an id": ({"text": "a", "id": 10**3_000}, "'id' String should have at most 200"),
    "true for an id": ({"text": "a", "id": True}, "'id' Input should be a valid string"),
    "fraction for an id": ({"text": "a", "id": 1.5}, "'id' Input should be a valid string"),
    "long key": ({"text": "a", "idempotency_key": "k" * 201}, "'idempotency_key' String should have at most 200"),
    "long language": ({"text": "a", "language": "x" * 36}, "'language' String should have at most 35"),
    "naive time": ({"text": "a", "created_at": "2026-11-22T12:00:00"}, "'created_at' Input should have timezone info"),
    "no time": ({"text": "a", "created_at": "yesterday"}, "'created_at' Input should be a valid datetime"),
    "ancient": ({"text": "a", "created_at": "0001-01-01T00:00:00+14:00"}, "'created_at' must lie between the years"),
    "endless number for a time": ({"text": "a", "expires_at": 10**3_000}, "'expires_at'"),
    "list for a context": ({"text": "a", "context": [1]}, "'context' Input should be a valid dictionary"),
    "large context": ({"text": "a", "context": {"a": "é" * 2_048}}, "4,105 bytes as JSON, more than the 4,096"),
    "deep context": ({"text": "a", "context": {"a": nested(32)}}, "'context' is nested more than 32 levels deep"),
}
BAD_COMMENTS_IN_JSON: dict[str, tuple[str, str]] = {
    "nested": (json.dumps({"text": nested(MAX_NESTING)}), "64 levels are allowed"),
    "nested much too deep": (f'{{"text": {"[" * 500}1{"]" * 500}}}', "64 levels are allowed"),
    "infinite context": ('{"text": "a", "context": {"a": 1e999}}', "'context' cannot be written as JSON"),
    "infinite": ('{"text": "a", "context": {"a": -Infinity}}', "'context' cannot be written as JSON"),
    "NaN in the context": ('{"text": "a", "context": {"a": [NaN]}}', "'context' cannot be written as JSON"),
    "NaN for a text": ('{"text": NaN}', "'text' Input should be a valid string"),
    "NaN for a comment": ("NaN", "a comment is an object"),
    "NaN for a time": ('{"text": "a", "created_at": NaN}', "'created_at'"),
    "endless number for a text": ('{"text": %s}' % ("1" * 10_000), "'text' Input should be a valid string"),
    "endless number in the context": (
        '{"text": "a", "context": {"a": -%s}}' % ("1" * 10_000),
        "'context' cannot be written as JSON",
    ),
    "text twice": ('{"text": "a", "text": "a"}', "'text' stands twice"),
    "text twice, once in disguise": (r'{"text": "a", "\u0074ext": "b"}', "'text' stands twice"),
    "name twice and apart": ('{"id": 1, "text": "\\": ", "id"  : 2}', "'id' stands twice"),
    "name twice beside one that ends in a backslash": (
        r'{"text": "a", "text": "b", "context": {"a\\\\": 1}}',
        "'text'",
    ),
    "twice in the context": ('{"text": "a", "context": {"a": [{"b": 1, "b": 1}]}}', "a name stands twice"),
}


@pytest.mark.parametrize(
    ("comment", "said"),
    [
        *(pytest.param(json.dumps(comment), said, id=what) for what, (comment, said) in BAD_COMMENTS.items()),
        *(pytest.param(comment, said, id=what) for what, (comment, said) in BAD_COMMENTS_IN_JSON.items()),
    ],
)
def test_a_bad_comment_is_refused_and_its_neighbours_are_not(comment: str, said: str) -> None:
    # Given a bad comment between two good ones
    body = f'[[[{{"text": "first"}}, {comment}, {{"text": "last"}}]], {{}}, {{}}]'
    # When the message is read
    parsed = parse_body(body.encode())
    # Then the good ones keep their places
    assert [(one.submission_id, one.comment.text) for one in parsed.submitted] == [("m:0", "first"), ("m:2", "last")]
    # And the producer hears what is wrong with the other
    (refused,) = parsed.refused
    assert (refused.dead_letter_id, refused.reason) == (refused_id("m:1"), Reason.INVALID_COMMENT)
    assert said in refused.detail
    # And what it sent is kept, as far as it is long, and is as wrong as it was
    assert 0 < len(refused.payload) <= MAX_PAYLOAD_BYTES
    assert refused.payload_bytes >= len(refused.payload)
    if refused.payload_bytes == len(refused.payload):
        assert only_refusal(parse_body(b"[[[%s]], {}, {}]" % refused.payload)).reason is Reason.INVALID_COMMENT


def test_a_text_may_look_like_a_repeated_name() -> None:
    text = '{"text": "a", "text" : "b"}'
    (submitted,) = parse({"text": text, "context": {"text": text}}).submitted
    assert submitted.comment.text == text


def test_a_bad_comment_is_found_by_its_author() -> None:
    refused = only_refusal(parse({"text": "", "id": 7, "author": "ann", "community": [1], "store_text": False}))
    assert (refused.author, refused.comment_id, refused.community) == ("ann", "7", None)
    assert refused.payload == b""


def test_a_truth_must_be_one() -> None:
    refused = only_refusal(parse({"text": "a", "store_text": "no"}))
    assert refused.detail == "'store_text' Input should be a valid boolean"


def test_every_problem_of_a_comment_is_named() -> None:
    detail = only_refusal(parse({"text": "", "id": "", "comunity": 1})).detail
    assert all(word in detail for word in ("'text'", "'id'", "'comunity'"))


def test_an_expired_comment_is_refused_under_its_key() -> None:
    refused = only_refusal(parse({"text": "late", "expires_at": NOW.isoformat(), "idempotency_key": "k"}))
    assert (refused.dead_letter_id, refused.reason) == ("k", Reason.EXPIRED)
    assert "2026-11-22T12:00:00+00:00" in refused.detail
    assert json.loads(refused.payload)["text"] == "late"


@pytest.mark.parametrize("store_text", [False, "false", 0, None])
@pytest.mark.parametrize("trouble", [{"id": ""}, {"expires_at": (NOW - timedelta(days=1)).isoformat()}])
def test_what_must_not_be_stored_is_not_kept(trouble: dict[str, object], store_text: object) -> None:
    # Given a comment that is refused, and whose producer said more or less clearly not to store it
    refused = only_refusal(parse({"text": MARKER, "store_text": store_text} | trouble))
    # Then only its length is known
    assert refused.payload == b""
    assert refused.payload_bytes > len(MARKER)


@pytest.mark.parametrize("wrapped", [json.dumps, lambda comment: [comment], lambda comment: {"text": comment}])
def test_what_must_not_be_stored_is_not_kept_where_it_stands_too_deep(wrapped: Callable[[Any], object]) -> None:
    assert only_refusal(parse(wrapped({"text": MARKER}))).payload
    assert not only_refusal(parse(wrapped({"text": MARKER, "store_text": False}))).payload


def test_one_comment_not_to_be_stored_keeps_too_long_a_message_out() -> None:
    comments = [{"text": "a"}] * MAX_COMMENTS_PER_MESSAGE
    assert only_refusal(parse(*comments, {"text": "b"})).payload
    assert not only_refusal(parse(*comments, {"text": MARKER, "store_text": False})).payload


# --- Bad messages ---


def in_protocol_2(arguments: object, **keywords: object) -> bytes:
    return json.dumps([arguments, keywords, {}]).encode()


BAD_BODIES: dict[str, tuple[bytes, Reason, str]] = {
    "nothing": (b"", Reason.UNREADABLE_MESSAGE, "not JSON in UTF-8 at character 0"),
    "not JSON": (b'[[[{"text": hello}]]]', Reason.UNREADABLE_MESSAGE, "not JSON in UTF-8 at character 12"),
    "not UTF-8": (b'[[[{"text": "\xff"}]], {}, {}]', Reason.UNREADABLE_MESSAGE, "not JSON in UTF-8"),
    "nested too deep to read": (b"[" * 100_000 + b"]" * 100_000, Reason.UNREADABLE_MESSAGE, "nested too deeply"),
    "not a list": (in_protocol_2([{"text": "a"}]), Reason.NOT_A_LIST, 'args=[[{"text": …}, …]]'),
    "comments as arguments": (in_protocol_2([{"text": "a"}, {"text": "b"}]), Reason.NOT_A_LIST, "one positional"),
    "no arguments": (in_protocol_2([]), Reason.NOT_A_LIST, "one positional"),
    "keywords only": (in_protocol_2([], comments=[{"text": "a"}]), Reason.NOT_A_LIST, "one positional"),
    "two lists": (in_protocol_2([[{"text": "a"}], [{"text": "b"}]]), Reason.NOT_A_LIST, "one positional"),
    "object for a body": (b'{"args": [[{"text": "a"}]]}', Reason.NOT_A_LIST, "one positional"),
    "empty body": (b"[]", Reason.NOT_A_LIST, "one positional"),
    "no comments": (in_protocol_2([[]]), Reason.NOT_A_LIST, "the list of comments is empty"),
    "one too many": (in_protocol_2([[{"text": "a"}] * 257]), Reason.TOO_MANY_COMMENTS, "257 comments in one message"),
}


@pytest.mark.parametrize(("body", "reason", "said"), BAD_BODIES.values(), ids=BAD_BODIES.keys())
def test_a_bad_message_is_refused_whole(body: bytes, reason: Reason, said: str) -> None:
    refused = only_refusal(parse_body(body))
    assert refused.reason is reason
    assert said in refused.detail
    assert refused.payload == body[:MAX_PAYLOAD_BYTES]
    assert refused.payload_bytes == len(body)


@pytest.mark.parametrize(
    ("headers", "body", "reason", "said"),
    [
        pytest.param({"task": "tasks.add"}, b"[[[]], {}, {}]", Reason.UNKNOWN_TASK, "'tasks.add'", id="another task"),
        pytest.param({"task": None}, b"[[[]], {}, {}]", Reason.UNKNOWN_TASK, "null", id="null task"),
        pytest.param({}, b'{"task": "\\u0000", "args": []}', Reason.UNKNOWN_TASK, "1 characters", id="odd task"),
        pytest.param({}, b'{"task": ["a"], "args": []}', Reason.UNKNOWN_TASK, "a list", id="list for a task"),
        pytest.param({}, b"[[[]], {}, {}]", Reason.UNREADABLE_MESSAGE, "no task is named", id="no task"),
        pytest.param({}, b'{"args": [[]]}', Reason.UNREADABLE_MESSAGE, "no task is named", id="no task in protocol 1"),
        pytest.param(
            {}, b'{"task": "worker.moderate", "kwargs": {"comments": []}}', Reason.NOT_A_LIST, "one", id="no args"
        ),
    ],
)
def test_a_message_for_somebody_else_is_refused(
    headers: dict[str, Any], body: bytes, reason: Reason, said: str
) -> None:
    refused = only_refusal(parse_message(headers, body, now=NOW))
    assert refused.reason is reason
    assert said in refused.detail


def test_what_is_no_celery_message_is_refused_with_its_beginning() -> None:
    envelope = malformed_envelope(b"hello", "the message is not JSON")
    refused = only_refusal(parse_message(envelope["headers"], envelope["body"], now=NOW))
    assert refused.reason is Reason.UNREADABLE_MESSAGE
    assert refused.detail == "not a Celery message: the message is not JSON"
    assert (refused.payload, refused.payload_bytes) == (b"hello", 5)
    assert refused.dead_letter_id == refused_id(hashlib.sha256(b"hello").hexdigest())


# --- Whatever a producer writes ---

ANY_TEXT = st.text(st.characters())  # lone surrogates too
ANY_TEXT_MARKED = ANY_TEXT.map(lambda text: MARKER + text)
NUMBERS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
FIELDS = st.sampled_from([name for name in Comment.model_fields if name != "idempotency_key"])


def any_json(texts: st.SearchStrategy[str]) -> st.SearchStrategy[Any]:
    return st.recursive(
        NUMBERS | texts,
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(FIELDS, inner, max_size=4),
        max_leaves=8,
    )


def any_comment(texts: st.SearchStrategy[str]) -> st.SearchStrategy[Any]:
    """Sometimes sound, often nearly so."""
    times = st.datetimes(timezones=st.just(UTC)).map(datetime.isoformat)
    likely = {
        "id": texts | st.integers(),
        "created_at": times,
        "expires_at": times,
        "context": st.dictionaries(ANY_TEXT, any_json(texts), max_size=3),
        "store_text": st.booleans(),
        "v": st.just(1),
    }
    sound = st.fixed_dictionaries({"text": texts}, optional=likely | {"author": texts, "language": texts})
    return sound | st.dictionaries(FIELDS, any_json(texts), max_size=4) | any_json(texts)


@given(st.lists(any_comment(ANY_TEXT), min_size=1, max_size=5))
def test_each_comment_is_submitted_or_refused_once(comments: list[Any]) -> None:
    parsed = parse(*comments)
    seen = [one.submission_id for one in parsed.submitted] + [one.dead_letter_id for one in parsed.refused]
    assert sorted(map(refused_name, seen)) == [f"m:{index}" for index in range(len(comments))]


@given(st.lists(any_comment(ANY_TEXT), min_size=1, max_size=5))
def test_a_comment_is_the_same_in_an_unusual_message(comments: list[Any]) -> None:
    # Given one that is read step by step, as a callback is set, and not in one pass
    unusual = json.dumps([[comments], {}, {"callbacks": []}]).encode()
    # Then what came of it is the same, to the last type
    assert repr(parse(*comments)) == repr(parse_body(unusual))


@pytest.mark.parametrize(
    "body",
    [
        b'[[[{"text": "a", "store_text": true, "store_text": false}]], {}, {}]',
        b'[[[{"text": "a", "text": "b"}]], {}, {}]',
        b'[[[{"text": "a", "context": {"a": 1, "a": 2}}]], {}, {}]',
        b'[[[{"text": "a", "context": {"a": 123456789012345678901234567890, "b": -0, "c": 1E5, "d": 0.1}}]], {}, {}]',
        b'[[[{"text": "a", "id": 123456789012345678901234567890}]], {}, {}]',
        b'[[[{"text": "a", "id": ' + b"1" * 10_000 + b"}]], {}, {}]",
        b'[[[{"text": "a", "context": {"a": 1e999}}]], {}, {}]',
        b'[[[{"text": "a", "context": {"a": Infinity}}]], {}, {}]',
        b'[[[{"text": "a", "v": 1.0}]], {}, {}]',
        b'[[[{"text": "a", "created_at": 1763812800}]], {}, {}]',
        b'[[[{"text": "\\ud83d\\ude42\\/"}]], {}, {}]',
        b'[[[{"text": "\\ud83d"}, {"text": "a"}]], {}, {}]',
        b'[[[{"text": "a\tb"}]], {}, {}]',
        b' [ [[{"text":"a"}]],{},{} ]\r\n',
        b'\xef\xbb\xbf[[[{"text": "a"}]], {}, {}]',
    ],
)
def test_json_s_odd_corners_are_the_same_too(body: bytes) -> None:
    usual, unusual = parse_body(body), parse_body(body.replace(b"{}, {}]", b'{}, {"chain": []}]'))
    assert repr(usual.submitted) == repr(unusual.submitted)
    assert [(one.reason, one.detail) for one in usual.refused] == [(one.reason, one.detail) for one in unusual.refused]


@given(st.lists(any_comment(ANY_TEXT_MARKED), min_size=1, max_size=5))
def test_no_detail_quotes_a_comment(comments: list[Any]) -> None:
    for refused in parse(*comments).refused:
        assert refused.detail
        assert MARKER not in refused.detail


@pytest.mark.parametrize(
    ("headers", "body"),
    [
        ({"task": MODERATE_TASK}, b'[[[{"%s": "text"}]], {}, {}]'),
        ({"task": MODERATE_TASK}, b'[[[{"text": "a", "%s": 1, "%s": 2}]], {}, {}]'),
        ({"task": MODERATE_TASK}, b'[[[{"text": "a", "context": {"%s": "\\u0000"}}]], {}, {}]'),
        ({"task": MARKER}, b"[[[]], {}, {}]"),
        ({}, b'{"task": "%s", "args": [[]]}'),
        ({}, b'{"task": "a", "%s": 1, "%s": 2}'),
    ],
)
def test_no_detail_quotes_what_stands_in_the_place_of_a_name(headers: dict[str, Any], body: bytes) -> None:
    refused = only_refusal(parse_message(headers, body.replace(b"%s", MARKER.encode()), now=NOW))
    assert MARKER not in refused.detail


@given(st.lists(any_comment(ANY_TEXT), min_size=1, max_size=5))
def test_whatever_is_submitted_can_be_set_aside_later(comments: list[Any]) -> None:
    for one in parse(*comments).submitted:
        refused = refuse_comment(one, Reason.SCORING_FAILED, "because")
        # As the producer sent it, without what it left out
        assert not one.comment.store_text or Comment.model_validate_json(refused.payload) == one.comment


@given(any_json(ANY_TEXT))
def test_any_json_is_answered(body: Any) -> None:
    raw = json.dumps(body).encode()
    for headers in ({}, HEADERS):
        assert_answered(parse_message(headers, raw, now=NOW))


@given(st.binary(max_size=200) | any_json(ANY_TEXT).map(lambda body: json.dumps(body).encode()[:-1]))
def test_any_bytes_are_answered(body: bytes) -> None:
    assert_answered(parse_body(body))


@given(
    st.dictionaries(
        st.sampled_from(["task", "id", "compression", MALFORMED_HEADER, MALFORMED_BYTES_HEADER]),
        any_json(ANY_TEXT) | st.just(MODERATE_TASK),
    ),
    any_json(ANY_TEXT) | st.lists(any_comment(ANY_TEXT), max_size=3).map(lambda comments: [[comments], {}, {}]),
)
def test_any_headers_are_answered(headers: dict[str, Any], body: Any) -> None:
    # Given an envelope with headers that a producer made up, our own for malformed messages among them
    raw = json.dumps(
        {
            "body": base64.b64encode(json.dumps(body).encode()).decode(),
            "content-type": "application/json",
            "headers": headers,
            "properties": {"body_encoding": "base64"},
        }
    ).encode()
    # When it comes the way that messages come, then there is an answer
    assert_answered(parse_raw(raw))


def assert_answered(parsed: Parsed) -> None:
    """Something came of it, and all of it can be stored."""
    assert parsed.submitted or parsed.refused
    whole = [refused for refused in parsed.refused if refused.reason in OF_THE_WHOLE_MESSAGE]
    assert not whole or (len(parsed.refused), len(parsed.submitted)) == (1, 0)
    for refused in parsed.refused:
        assert "\x00" not in refused.dead_letter_id + refused.detail
        assert len(refused.dead_letter_id) <= 255
        (refused.dead_letter_id + refused.detail).encode()
        assert len(refused.payload) <= min(MAX_PAYLOAD_BYTES, refused.payload_bytes)


def test_mutated_messages_are_answered() -> None:
    sound = base64.b64encode(json.dumps([[[{"text": "fine"}]], {}, {}]).encode()).decode()
    neighbour = json.dumps(json.loads(real_messages()[0]) | {"body": sound, "headers": HEADERS}).encode()
    expected = parse_raw(neighbour)
    assert len(expected.submitted) == 1
    for raw in mutated(20261122, 2_000):
        assert_answered(parse_raw(raw))
        assert parse_raw(neighbour) == expected


def parse_raw(raw: bytes) -> Parsed:
    """As the transport and the intake do."""
    try:
        envelope = read_envelope(raw)
    except MalformedMessage as reason:
        envelope = malformed_envelope(raw, str(reason))
    return parse_message(envelope["headers"], envelope["body"], now=NOW)


@given(st.integers(0), st.integers(0, 3))
def test_one_mutated_comment_leaves_its_neighbours_as_they_were(seed: int, place: int) -> None:
    comments: list[Any] = [{"text": f"{number}", "id": number} for number in range(4)]
    changed = change_value(random.Random(seed), {"text": "a", "author": "b", "context": {"c": [1]}})
    parsed = parse(*comments[:place], changed, *comments[place + 1 :])
    others = [one for one in parsed.submitted if one.submission_id != f"m:{place}"]
    assert others == [one for one in parse(*comments).submitted if one.submission_id != f"m:{place}"]
    assert len(parsed.submitted) + len(parsed.refused) == 4
