"""A short run of `make chaos`: everything breaks once, and every comment is accounted for."""

from pathlib import Path

from bench.chaos.plan import LEASE_S, Fault
from bench.chaos.run import run

SECONDS = 26
DAMAGED = 1
PLAN = [
    Fault("freeze-worker", 2, LEASE_S + 4, 0),
    Fault("kill-worker", 4, 0, 1),
    Fault("swap", 5, 0, DAMAGED),
    Fault("kill-redis", 7, 0, 0),
    Fault("kill-producer", 9, 0, 2),
    Fault("kill-postgres", 11, 0, 0),
    Fault("swap", 13, 0, 2),
    Fault("full-redis", 15, 3, 0),
    Fault("freeze-postgres", 16, 3, 0),
    Fault("cut-redis", 20, 0, 0),
    Fault("locked-database", 20.5, 3, 0),
    Fault("cut-postgres", 22, 0, 0),
    Fault("kill-workers", 25, 0, 0),
]


def test_nothing_is_lost_and_nothing_is_decided_twice(tiny_version: Path, tmp_path: Path) -> None:
    # Given Redis, PostgreSQL, two workers, a trainer and five producers
    # When the one after the other is killed, frozen, cut off and refused, and sent nonsense all the while
    account, strikes = run(
        PLAN,
        seconds=SECONDS,
        seed=1,
        database="postgres",
        version=tiny_version,
        folder=tmp_path / "chaos",
    )
    # Then every comment that submit returned for has one decision or one dead letter
    assert account.broken == {}
    assert account.decided + sum(account.dead.values()) == account.submitted
    # And the system had something to do, and everything struck
    assert account.submitted > 0
    assert account.mutated > 0
    assert len(strikes) == len(PLAN)
    assert {account.starts[name] > 1 for name in ("redis", "postgres", "worker-1", "worker-2")} == {True}
