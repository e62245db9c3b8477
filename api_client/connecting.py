"""How producers connect to Redis and the database: soon or not at all; and what is said of one that is away."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any, Self, TypeVar

from celery import Celery
from kombu import Connection as BrokerConnection
from kombu.pidbox import Mailbox
from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError

from api_client.listening import BROKER_ERRORS, AnswerLines, prompt_options
from config.broker import transport_options
from config.logs import briefly
from config.names import ACTIVATION_CHANGED, WORKER_CONTROL_EXCHANGE
from config.settings import Settings, SettingsError, embedded_directory, settings, without_password
from config.urls import check_broker_url, parse_database_url
from db.session import DatabaseProblem, lacks_file, open_database, reading, sqlite_file, without_rows, writing

MAX_CONNECTIONS = 10
RESEND_PAUSES_S = (0.2, 1.0)
"""Before each further attempt to send. The same message twice is one submission: its task id stays."""

Answer = TypeVar("Answer")


class BrokerUnavailable(Exception):
    """Redis did not take or answer something; the message names its URL without the password."""


def connect(settings: Settings) -> BrokerConnection:
    """A connection to the broker in the settings; it connects when it is first used."""
    return BrokerConnection(
        settings.broker_url, transport_options=transport_options(settings.broker_options.for_celery())
    )


def mailbox(exchange: str, broker: BrokerConnection) -> Any:
    """Remote control of the nodes on this exchange: workers', or trainers'."""
    return Mailbox(exchange, type="fanout", accept=["json"], serializer="json")(broker)


def _checked(argument: str, check: Callable[[str], Answer], url: str) -> Answer:
    try:
        return check(url)
    except ValueError as error:
        raise SettingsError(f"{argument} is wrong: {error}") from None


class Connections:
    """What every part of the client speaks through: its settings, Redis and the database."""

    def __init__(
        self,
        broker_url: str | None = None,
        database_url: str | None = None,
        broker_options: Mapping[str, Any] | None = None,
    ) -> None:
        """Prepare, connecting to nothing.

        Args:
            broker_url: as Celery writes it; from the settings where it is not given.
            database_url: SQLite or PostgreSQL; from the settings where it is not given.
            broker_options: of Celery's `broker_transport_options`, such as `global_keyprefix`, or `master_name` of a
                Sentinel's broker; from the settings where the broker is.

        Raises:
            SettingsError: they cannot be read, or a URL is none that can be used.
        """
        if broker_options is None:
            broker_options = {} if broker_url else settings().broker_options.for_celery()
        if broker_url:
            _checked("broker_url", check_broker_url, broker_url)
        self._broker_url = broker_url or settings().broker_url
        if database_url:
            parsed = _checked("database_url", parse_database_url, database_url)
            database_url = parsed.render_as_string(hide_password=False)
        self._database_url = database_url or settings().database_url
        self._settings = settings().client
        self._engine = open_database(self._database_url)
        self._app = Celery("moderato", broker=self._broker_url, set_as_current=False)
        self._app.conf.update(
            task_serializer="json",
            accept_content=["json"],
            task_ignore_result=True,
            task_publish_retry=False,  # `_with_broker` sends again
            broker_transport_options=transport_options(broker_options),
        )
        # Our own pools: Celery's are shared by every app with the same URL in the process, and are not ours to close.
        self._connections = self._app.connection_for_write().Pool(MAX_CONNECTIONS)
        # Waiting for answers leaves a BRPOP in flight, whose reply the next command there would take for its own.
        self._asking_connections = self._app.connection_for_write().Pool(MAX_CONNECTIONS)
        self._prompt_connections = self._app.connection_for_write(transport_options=prompt_options()).Pool(
            MAX_CONNECTIONS
        )
        self._answer_lines = AnswerLines(self._app.connection_for_write)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close every connection."""
        self._answer_lines.close()
        self._prompt_connections.force_close_all()
        self._asking_connections.force_close_all()
        self._connections.force_close_all()
        self._app.close()
        self._engine.dispose()

    def _with_broker(
        self,
        act: Callable[[], Answer],
        consequence: str | Callable[[], str],
        pauses_s: Sequence[float] = RESEND_PAUSES_S,
    ) -> Answer:
        """Do something with Redis, again after a pause where it fails.

        Args:
            consequence: of having failed, for the message; a function is asked after the last attempt.

        Raises:
            BrokerUnavailable: it failed each time.
        """
        for pause_s in (*pauses_s, None):
            try:
                return act()
            except BROKER_ERRORS as error:
                if pause_s is None:
                    url = without_password(self._broker_url)
                    what = consequence if isinstance(consequence, str) else consequence()
                    is_embedded = str(embedded_directory()) in url
                    hint = "`moderato up` starts it" if is_embedded else "`moderato doctor` looks for the reason"
                    raise BrokerUnavailable(
                        f"the broker {url} cannot be used: {briefly(error).rstrip('.')}; {what}; {hint}"
                    ) from error
                time.sleep(pause_s)
        raise AssertionError("unreachable")

    @contextmanager
    def _reading(self) -> Iterator[Connection]:
        with self._explaining(), reading(self._engine) as connection:
            yield connection

    @contextmanager
    def _writing(self) -> Iterator[Connection]:
        with self._explaining(), writing(self._engine) as connection:
            yield connection

    @contextmanager
    def _explaining(self) -> Iterator[None]:
        """Turn what the driver says into what happened: most often a database without, or with older, tables."""
        if lacks_file(self._database_url):  # asking would make it
            from db.migrate import SchemaMismatch

            file = sqlite_file(self._database_url)
            raise SchemaMismatch(f"there is no database {file}: `moderato up` makes it, or run `moderato db upgrade`")
        try:
            yield
        except DBAPIError as error:
            from db.migrate import require_current

            with suppress(DBAPIError):
                require_current(self._engine)
            url = without_password(self._database_url)
            # Not from the error: whoever logs the chain would log what the driver quotes.
            raise DatabaseProblem(f"the database {url} cannot be used: {without_rows(error)}") from None

    def _tell_workers(self) -> None:
        # The row is the truth and workers look for it every few seconds; this only makes it faster.
        with suppress(*BROKER_ERRORS), self._connections.acquire(block=True) as broker:
            mailbox(WORKER_CONTROL_EXCHANGE, broker).abcast(ACTIVATION_CHANGED)
