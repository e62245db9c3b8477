"""The chaos run's pure parts: the plan is the seed's, and the account notices whatever broke."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from bench.chaos.account import Account, Leftovers, Letter, Row, compare, recoveries
from bench.chaos.monkey import Strike
from bench.chaos.plan import KINDS, Fault, draw_plan
from bench.chaos.producer import Journal, MutatedJournal, read_journal

NOTHING_LEFT = Leftovers({}, [])


def test_a_seed_always_draws_the_same_plan_with_every_kind_in_it() -> None:
    plan = draw_plan(7, 600, list(KINDS))
    assert plan == draw_plan(7, 600, list(KINDS)) != draw_plan(8, 600, list(KINDS))
    assert {fault.kind for fault in plan} == set(KINDS)
    assert all(fault.at_s + fault.lasts_s <= 600 for fault in plan)


def row(submission_id: str, comment_id: str, sha: str = "sha") -> Row:
    return Row(submission_id, comment_id, sha, "sound", 1.0, 2.0)


class Case:
    """A run in which all went well: one comment decided, one dead, one unknown and decided, one mutated message."""

    def __init__(self) -> None:
        self.journals = {
            "p": Journal(
                returned={"a:0": "sha", "b:0": "sha"}, returned_at={"a:0": 1.0, "b:0": 1.0}, tried={"c": "sha"}
            )
        }
        self.mutated = MutatedJournal(pushed=[["m"]], unknown=[["n"]])
        self.rows = [row("a:0", "a"), row("x:0", "c"), row("m", "?")]
        self.letters = {"b": Letter("worker_died", None)}
        self.left = NOTHING_LEFT

    def account(self) -> Account:
        return compare(self.journals, self.mutated, self.rows, self.letters, self.left)


def test_a_kept_promise_is_counted() -> None:
    account = Case().account()
    assert account.broken == {}
    assert (account.submitted, account.decided, account.dead) == (2, 1, {"worker_died": 1})
    assert (account.unknown, account.unknown_decided) == (1, 1)
    assert (account.mutated, account.mutated_decided, account.mutated_dead) == (1, 1, {})


def lose(case: Case) -> None:
    del case.rows[0]


def decide_and_set_aside(case: Case) -> None:
    case.letters["a:0"] = Letter("scoring_failed", "a")


def decide_twice(case: Case) -> None:
    case.rows.append(row("y:0", "c"))


def confuse(case: Case) -> None:
    case.rows[0] = replace(case.rows[0], text_sha256="another")


def lose_mutated(case: Case) -> None:
    del case.rows[2]


def invent_decision(case: Case) -> None:
    case.rows.append(row("z:0", "z"))


def invent_letter(case: Case) -> None:
    case.letters["z:0"] = Letter("invalid_comment", "z")


def leave_in_redis(case: Case) -> None:
    case.left = Leftovers({"toxicity": 1}, [])


def leave_pending(case: Case) -> None:
    case.left = Leftovers({}, ["a:0"])


@pytest.mark.parametrize(
    ("break_it", "promise"),
    [
        (lose, "every comment that submit returned for is decided or a dead letter"),
        (decide_and_set_aside, "no submission is both decided and a dead letter"),
        (decide_twice, "no comment is decided twice"),
        (confuse, "every decision is of the text that was submitted"),
        (lose_mutated, "every mutated message is decided or a dead letter"),
        (invent_decision, "no decision without a submission"),
        (invent_letter, "no dead letter without a submission"),
        (leave_in_redis, "nothing is left in Redis"),
        (leave_pending, "no submission is left pending"),
    ],
)
def test_a_broken_promise_is_noticed(break_it: Callable[[Case], None], promise: str) -> None:
    case = Case()
    break_it(case)
    assert list(case.account().broken) == [promise]


def test_a_journal_tells_what_was_returned_from_what_is_unknown(tmp_path: Path) -> None:
    # Given a journal whose producer died twice: before submit returned, and in the middle of a line
    journal = tmp_path / "p.journal"
    notes = [
        {"tries": {"p-1": "sha-1", "p-2": "sha-2"}, "at": 1.0},
        {"returned": ["id:0", "id:1"], "at": 2.0},
        {"tries": {"p-3": "sha-3"}, "at": 3.0},
        {"raised": "BrokerUnavailable", "at": 4.0},
        {"tries": {"p-4": "sha-4"}, "at": 5.0},
    ]
    journal.write_text("\n".join(map(json.dumps, notes)) + '\n{"tries": {"p-5"')
    # Then
    read = read_journal(journal)
    assert read.returned == {"id:0": "sha-1", "id:1": "sha-2"}
    assert read.tried == {"p-3": "sha-3", "p-4": "sha-4"}
    assert read.failures == {"BrokerUnavailable": 1}


def test_recovery_is_the_next_commit_of_a_comment_submitted_after_the_fault() -> None:
    strikes = [Strike(Fault("kill-redis", 0, 0, 0), 10.0, 10.0), Strike(Fault("freeze-redis", 0, 5, 0), 30.0, 35.0)]
    rows = [
        Row("a", "a", "", "v", submitted_at=9.0, committed_at=11.0),
        Row("b", "b", "", "v", submitted_at=12.0, committed_at=16.0),
        Row("c", "c", "", "v", submitted_at=13.0, committed_at=14.5),
        Row("d", "d", "", "v", submitted_at=36.0, committed_at=37.0),
    ]
    every, alone = recoveries(strikes, rows)
    assert every == alone == {"kill-redis": [4.5], "freeze-redis": [2.0]}
    overlapping = [*strikes, Strike(Fault("swap", 0, 0, 0), 12.0, 12.0)]
    assert "kill-redis" not in recoveries(overlapping, rows)[1]
