"""The part of the client that looks at the system: which processes answer, what waits, and how the database stands."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from api_client.connecting import BrokerUnavailable, Connections, mailbox
from api_client.pipeline_stats import PipelineStats
from config.names import (
    MODERATE_QUEUES,
    PIPELINE_STATS,
    TRAINER_CONTROL_EXCHANGE,
    WORKER_CONTROL_EXCHANGE,
    WORKER_UNACKED_KEY,
)
from config.queues import PRIORITIES, priority_lists
from config.settings import without_password
from db import policies, queries, trials
from db.drift import Drift, measure_drift
from db.durable import database_time
from db.session import DatabaseProblem

ANSWER_TIMEOUT_S = 1.0


@dataclass(kw_only=True)
class Activity:
    """What the broker and the workers say now. What could not be asked is None or empty, and `problems` says why."""

    problems: list[str] = field(default_factory=list)
    workers: list[str] = field(default_factory=list)
    """Node names of those that answer; one of two processes stands twice."""
    trainers: list[str] = field(default_factory=list)
    queue_depths: dict[str, int] = field(default_factory=dict)
    """Messages that wait for a worker, by queue."""
    held_messages: int | None = None
    """Taken by a worker and not yet decided, or left by one that died."""
    pipelines: dict[str, PipelineStats] = field(default_factory=dict)
    """By node name of the worker; `pipeline_rates` says what two of them mean."""

    @property
    def queues_without_worker(self) -> list[str]:
        """Queues where messages wait and no worker takes from; none where some worker did not say which are its own."""
        told = [self.pipelines[worker].queues if worker in self.pipelines else None for worker in self.workers]
        taken: set[str] = set()
        for queues in told:
            if queues is None:
                return []
            taken.update(queues)
        return [queue for queue, messages in self.queue_depths.items() if messages and queue not in taken]


@dataclass(kw_only=True)
class Status(Activity):
    """The state of the system: its activity, and what the database knows."""

    broker_url: str
    """Without its password, as the next."""
    database_url: str
    active: queries.ActivationRow | None = None
    loads: list[queries.LoadRow] = field(default_factory=list)
    """Each worker's newest word on the active version."""
    totals: queries.Totals | None = None
    last_run: queries.RunRow | None = None
    trial: trials.TrialRow | None = None
    """That runs now."""
    policy: policies.PolicyActivationRow | None = None
    """The active one; None where each worker decides by its own policy file."""
    drift: Drift | None = None
    """None before any version was active."""


class Watcher(Connections):
    """Asks, and changes nothing."""

    def nodes(self) -> tuple[list[str], list[str]]:
        """Node names of the workers and of the trainers that answer within a second."""
        return self._with_broker(self._ping_all, "no worker could be asked")

    def activity(self) -> Activity:
        """What waits and what the workers do, without the database: as cheap for a large system as for a small one.

        A broker that cannot be reached is a line in `problems`, never an exception.
        """
        activity = Activity()
        self._look_at_broker(activity)
        return activity

    def status(self) -> Status:
        """How the system is. A part that cannot be reached is a line in `problems`, never an exception."""
        status = Status(
            broker_url=without_password(self._broker_url), database_url=without_password(self._database_url)
        )
        self._look_at_broker(status)
        try:
            with self._reading() as connection:
                status.active = queries.active(connection)
                status.loads = queries.loads(connection, status.active.activation_id) if status.active else []
                status.totals = queries.totals(connection)
                status.trial = trials.live_trial(connection)
                status.policy = policies.active(connection)
                status.last_run = next(iter(queries.runs(connection, limit=1)), None)
                status.drift = measure_drift(connection, now=database_time(connection))
        except DatabaseProblem as problem:
            status.problems.append(str(problem))
        return status

    def _look_at_broker(self, activity: Activity) -> None:
        nothing = "nothing was asked"
        try:
            activity.queue_depths, activity.held_messages = self._with_broker(self._count_messages, nothing)
            (activity.workers, activity.trainers), activity.pipelines = self._with_broker(self._ask_all, nothing)
        except BrokerUnavailable as unavailable:
            activity.problems.append(str(unavailable))

    def _count_messages(self) -> tuple[dict[str, int], int]:
        with self._connections.acquire(block=True) as broker:
            channel = broker.default_channel
            with channel.client.pipeline(transaction=False) as asked:
                for queue in MODERATE_QUEUES:
                    for key in priority_lists(queue):
                        asked.llen(key)
                *lengths, held = asked.hlen(WORKER_UNACKED_KEY).execute()
        remaining = iter(lengths)
        return {queue: sum(islice(remaining, len(PRIORITIES))) for queue in MODERATE_QUEUES}, held

    def _ask_all(self) -> tuple[tuple[list[str], list[str]], dict[str, PipelineStats]]:
        with ThreadPoolExecutor(1) as pool:
            answers = pool.submit(self._ask, WORKER_CONTROL_EXCHANGE, PIPELINE_STATS)
            nodes = self._ping_all()
        stats = {node: PipelineStats.from_reply(answer) for node, answer in answers.result()}
        return nodes, {node: told for node, told in sorted(stats.items()) if told is not None}

    def _ping_all(self) -> tuple[list[str], list[str]]:
        with ThreadPoolExecutor(2) as pool:
            exchanges = (WORKER_CONTROL_EXCHANGE, TRAINER_CONTROL_EXCHANGE)
            workers, trainers = pool.map(
                lambda exchange: sorted(node for node, _ in self._ask(exchange, "ping")), exchanges
            )
        return workers, trainers

    def _ask(self, exchange: str, command: str) -> list[tuple[str, Any]]:
        """Node names, and what each node on this exchange answers to a remote-control command."""
        with self._asking_connections.acquire(block=True) as broker:
            replies = mailbox(exchange, broker).multi_call(command, timeout=ANSWER_TIMEOUT_S)
        return [answer for reply in replies for answer in reply.items()]
