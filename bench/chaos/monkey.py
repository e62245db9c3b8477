"""Strikes: carries out the faults of a plan on a running system, and ends each of them in time."""

import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from redis.exceptions import RedisError
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from api_client.client import BrokerUnavailable
from bench.chaos.plan import Fault
from bench.chaos.system import PRODUCERS, WAL_SEGMENT_MIB, WORKERS, ChaosSystem
from db.session import DatabaseProblem, reading, writing

End = Callable[[], None]

MIN_FILE_BYTES = WAL_SEGMENT_MIB * 2**20
AWAY = (BrokerUnavailable, DatabaseProblem, RedisError, SQLAlchemyError, OSError)
"""What the monkey itself meets where another fault lasts."""


@dataclass(slots=True)
class Strike:
    """A fault as it came to pass. Times in seconds since the epoch."""

    fault: Fault
    began_at: float
    ended_at: float
    note: str = ""


class Monkey:
    """Begins faults and ends them. Never waits: what Redis or the database must be asked for is done beside."""

    def __init__(self, system: ChaosSystem) -> None:
        self.strikes: list[Strike] = []
        self._system = system
        self._lasting: list[tuple[float, Strike, End]] = []
        # One thread for each, so that what is begun is ended afterwards, however long the beginning took.
        self._to_redis = ThreadPoolExecutor(1)
        self._to_database = ThreadPoolExecutor(1)
        self._to_lock = ThreadPoolExecutor(4)

    def strike(self, fault: Fault) -> None:
        begin: Callable[[Fault, Strike], End | None] = getattr(self, "_" + fault.kind.replace("-", "_"))
        strike = Strike(fault, time.time(), time.time())
        self.strikes.append(strike)
        if (end := begin(fault, strike)) is not None:
            self._lasting.append((time.monotonic() + fault.lasts_s, strike, end))

    def end_what_is_over(self, *, all_of_it: bool = False) -> None:
        now = time.monotonic()
        for lasting in [entry for entry in self._lasting if all_of_it or entry[0] <= now]:
            _, strike, end = lasting
            end()
            strike.ended_at = time.time()
            self._lasting.remove(lasting)

    def retrain(self) -> None:
        """Not a fault: what a trainer is there for."""
        self._to_database.submit(self._guarded, None, lambda: self._system.client.retrain(requested_by="chaos"))

    def close(self) -> None:
        """End every fault, and wait until what was begun beside is done."""
        self.end_what_is_over(all_of_it=True)
        for hand in (self._to_lock, self._to_redis, self._to_database):
            hand.shutdown()

    def _guarded(self, strike: Strike | None, work: Callable[[], object]) -> None:
        try:
            work()
        except AWAY as error:
            if strike is not None:
                strike.note = f"not done: {type(error).__name__}"

    # --- Processes ---

    def _kill_worker(self, fault: Fault, _strike: Strike) -> None:
        self._system.processes[WORKERS[fault.pick % len(WORKERS)]].kill()

    def _kill_workers(self, _fault: Fault, _strike: Strike) -> None:
        for name in WORKERS:
            self._system.processes[name].kill()

    def _freeze_worker(self, fault: Fault, _strike: Strike) -> End:
        return self._system.processes[WORKERS[fault.pick % len(WORKERS)]].freeze()

    def _freeze_workers(self, _fault: Fault, _strike: Strike) -> End:
        ends = [self._system.processes[name].freeze() for name in WORKERS]

        def end() -> None:
            for each in ends:
                each()

        return end

    def _kill_trainer(self, _fault: Fault, _strike: Strike) -> None:
        self._system.processes["trainer"].kill()

    def _freeze_trainer(self, _fault: Fault, _strike: Strike) -> End:
        return self._system.processes["trainer"].freeze()

    def _kill_producer(self, fault: Fault, strike: Strike) -> None:
        name = list(PRODUCERS)[fault.pick % len(PRODUCERS)]
        strike.note = name
        self._system.processes[name].kill()

    def _kill_redis(self, _fault: Fault, _strike: Strike) -> None:
        self._system.processes["redis"].kill()

    def _freeze_redis(self, _fault: Fault, _strike: Strike) -> End:
        return self._system.processes["redis"].freeze()

    def _kill_postgres(self, _fault: Fault, _strike: Strike) -> None:
        self._system.processes["postgres"].kill()

    def _freeze_postgres(self, _fault: Fault, _strike: Strike) -> End:
        return self._system.processes["postgres"].freeze()

    # --- Redis ---

    def _full_redis(self, _fault: Fault, strike: Strike) -> End:
        redis = self._system.redis

        def fill() -> None:
            redis.config_set("maxmemory", int(redis.info("memory")["used_memory"]))

        self._to_redis.submit(self._guarded, strike, fill)
        # One that was started anew meanwhile has no bound.
        return lambda: self._later(self._to_redis, lambda: redis.config_set("maxmemory", 0))

    def _cut_redis(self, _fault: Fault, strike: Strike) -> None:
        redis = self._system.redis
        self._to_redis.submit(self._guarded, strike, lambda: redis.execute_command("CLIENT", "KILL", "TYPE", "normal"))

    def _lose_redis(self, fault: Fault, strike: Strike) -> None:
        if fault.pick % 2:
            strike.note = "FLUSHALL"
            self._to_redis.submit(self._guarded, strike, self._system.redis.flushall)
            return
        strike.note = "files"
        self._system.processes["redis"].kill()
        for held in self._system.redis_folder.iterdir():
            if held.is_dir():
                shutil.rmtree(held)
            else:
                held.unlink()

    # --- The database ---

    def _cut_postgres(self, _fault: Fault, strike: Strike) -> None:
        def cut() -> None:
            with reading(self._system.engine) as connection:
                connection.execute(
                    text("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()")
                )

        self._to_database.submit(self._guarded, strike, cut)

    def _full_database(self, _fault: Fault, _strike: Strike) -> End:
        # Of PostgreSQL its own processes, and with the postmaster all that it makes; of SQLite those that write.
        system = self._system
        names = ("postgres",) if system.postgres is not None else WORKERS
        bound = max(MIN_FILE_BYTES, system.growing_file.stat().st_size)
        self._bound_files(names, str(bound))
        # Children that were made meanwhile have the bound too.
        return lambda: self._bound_files(names, "unlimited")

    def _bound_files(self, names: Sequence[str], most_bytes: str) -> None:
        # As the processes' own user: another one's limits are not even root's to set in a container.
        user = self._system.postgres.user if self._system.postgres is not None else None
        for name in names:
            for member in self._system.processes[name].process.family():
                # One that has ended meanwhile is no concern.
                command = ["prlimit", f"--pid={member.pid}", f"--fsize={most_bytes}:"]
                subprocess.run(command, user=user, cwd="/", capture_output=True, check=False)

    def _locked_database(self, _fault: Fault, strike: Strike) -> End:
        over = threading.Event()

        def hold() -> None:
            with writing(self._system.engine) as connection:  # of SQLite this is the lock already
                if self._system.postgres is not None:
                    connection.execute(text("LOCK TABLE submissions IN ACCESS EXCLUSIVE MODE"))
                over.wait()

        self._to_lock.submit(self._guarded, strike, hold)
        return over.set

    def _swap(self, fault: Fault, strike: Strike) -> None:
        choice = self._system.damaged_versions if fault.pick % 2 else self._system.sound_versions
        version = strike.note = choice[fault.pick // 2 % len(choice)]
        self._to_database.submit(
            self._guarded,
            strike,
            lambda: self._system.client.activate(
                version, instead_of=self._system.client.active(), by="chaos", reason="chaos"
            ),
        )

    def _later(self, hand: ThreadPoolExecutor, work: Callable[[], object]) -> None:
        """Until it is done: an end must come to pass."""

        def insist() -> None:
            while True:
                try:
                    work()
                    return
                except AWAY:
                    time.sleep(0.2)

        hand.submit(insist)
