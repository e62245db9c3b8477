"""What `moderato doctor` looks at: each check says what it found and what to do about it, and changes nothing."""

import errno
import json
import os
import re
import shutil
import socket
import sqlite3
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from config.logs import briefly
from config.names import MODERATE_QUEUE, MODERATE_QUEUES, RETRAIN_QUEUE, STARTER_VERSION, SUBMITTED_AT_HEADER
from config.queues import priority_lists
from config.settings import CONFIG_FILE_VARIABLE, ROOT, Settings, secret_files, without_password

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from api_client.client import ModerationClient

MIN_REDIS_VERSION = (6, 2)
MIN_POSTGRESQL_VERSION = 13
"""The oldest that its makers still mended when this was written; the tests run on newer ones."""
ANSWER_S = 3.0
"""For a server to take a connection, or to answer."""
SKEW_S = 5.0
"""Between two clocks, from which on times in the rows are misleading."""
QUEUE_AGE_S = 60.0
FULL_SHARE = 0.9
LOW_BYTES, LEAST_BYTES = 2 << 30, 200 << 20
"""Free on a disk: below the first it will soon be full, below the second it is as good as full."""
CONTAINER_SECRETS = Path("/run/secrets")
"""Where Docker, Podman and Kubernetes mount them."""
NETWORK_FILE_SYSTEMS = ("nfs", "cifs", "smb", "9p", "ceph", "glusterfs", "lustre", "afs", "fuse.sshfs", "fuse.s3fs")

Level = Literal["ok", "warning", "problem", "unknown"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the doctor's."""

    part: str
    level: Level
    said: str
    advice: str = ""
    """What to do about it; empty where there is nothing to do."""


Check = Callable[[Settings], Iterable[Finding]]


# --- The broker --------------------------------------------------------------------------------------------------


def check_broker(settings: Settings) -> Iterator[Finding]:
    """Whether Redis answers, is new enough, keeps what it holds, and lets this user do its work."""
    from redis.exceptions import AuthenticationError, NoPermissionError, ResponseError

    url = without_password(settings.broker_url)
    try:
        with _redis(settings) as redis:
            started = time.perf_counter()
            redis.ping()
            took_ms = 1000 * (time.perf_counter() - started)
            yield Finding("broker", "ok", f"{url} answers in {took_ms:.1f} ms")
            yield _skew("broker", "Redis", _redis_time_s(redis), "producers' clocks stand in submitted_at")
            try:
                info = redis.info()
            except NoPermissionError:
                said = "this user may not ask how Redis keeps what it holds (INFO)"
                yield Finding("broker", "unknown", said, "run the doctor as Redis' administrator to see it")
            except ResponseError as error:
                if not _is_unknown_command(error):
                    raise
                said = "this Redis has no INFO, so nobody can ask how it keeps what it holds"
                yield Finding("broker", "unknown", said, "redis.conf: rename-command hides it")
            else:
                yield from _persistence(info)
            yield from _rights(redis)
    except AuthenticationError as error:
        advice = "set MODERATO_BROKER_URL (or …_FILE) with a user and password that Redis knows"
        yield Finding("broker", "problem", f"{url} does not let this user in: {_first_line(error)}", advice)
    except ResponseError as error:
        advice = "docs/operations.md: a disk that is full"
        if _is_unknown_command(error):
            advice = "redis.conf: take out the rename-command of the command it names, which moderato needs"
        yield Finding("broker", "problem", f"it refuses to work: {_first_line(error)}", advice)
    except _broker_errors() as error:
        if settings.broker_url.startswith("redis+socket:"):
            advice = "`moderato up` starts the embedded Redis; for one of yours set MODERATO_BROKER_URL=redis://…"
        elif "auth:" in str(error):  # of a Sentinel, none of which named a master
            advice = (
                "the Sentinels have a password of their own: set MODERATO_BROKER_OPTIONS__SENTINEL_PASSWORD (or …_FILE)"
            )
        else:
            advice = "start it, or set MODERATO_BROKER_URL; is its port open to this host?"
        yield Finding("broker", "problem", f"{url} does not answer: {_first_line(error)}", advice)


def _is_unknown_command(error: Exception) -> bool:
    """Whether Redis lacks the command, as where its configuration renames it."""
    return "unknown command" in str(error)


def _persistence(info: dict[str, Any]) -> Iterator[Finding]:
    said = str(info["redis_version"])
    version = tuple(map(int, re.findall(r"\d+", said)[:2]))
    if version < MIN_REDIS_VERSION:
        yield Finding("broker", "problem", f"Redis {said} is too old", "upgrade it to 6.2 or newer")
    else:
        yield Finding("broker", "ok", f"Redis {said}")
    if info.get("role") == "slave":
        advice = "set MODERATO_BROKER_URL to the master, or to its Sentinels (sentinel://)"
        yield Finding("broker", "problem", "this Redis is a read-only replica", advice)
    if not info.get("aof_enabled"):
        advice = "redis.conf: appendonly yes; or submit with durable=True"
        yield Finding("broker", "warning", "no append-only file: what is queued is lost when Redis ends", advice)
    elif info.get("aof_last_write_status") != "ok" or info.get("aof_last_bgrewrite_status") != "ok":
        yield Finding("broker", "problem", "the append-only file could not be written", "is its disk full?")
    else:
        yield Finding("broker", "ok", "its append-only file is written")
    used, most, policy = info["used_memory"], info.get("maxmemory", 0), info.get("maxmemory_policy")
    holds = f"{_bytes(used)} of memory used, {f'{_bytes(most)} allowed' if most else 'without a limit'}, {policy}"
    if policy != "noeviction":
        advice = "redis.conf: maxmemory-policy noeviction"
        level: Level = "problem" if most else "warning"
        yield Finding("broker", level, f"{holds}: at its limit it would drop what is queued", advice)
    elif most and used > FULL_SHARE * most:
        advice = "more workers, or more memory: producers are refused when it is full"
        yield Finding("broker", "warning", holds, advice)
    else:
        yield Finding("broker", "ok", holds)


def _rights(redis: Any) -> Iterator[Finding]:
    from redis.exceptions import NoPermissionError

    def may(act: Callable[[], object]) -> bool:
        try:
            act()
        except NoPermissionError:
            return False
        return True

    missing = [queue for queue in MODERATE_QUEUES if not may(partial(redis.llen, queue))]
    if missing:
        said = f"this user may not use {', '.join(missing)}"
    elif not may(lambda: redis.eval("return redis.call('LLEN', KEYS[1])", 1, MODERATE_QUEUE)):
        said = "this user may not run scripts (EVAL)"
    else:
        yield Finding("broker", "ok", "this user may use the queues")
        return
    yield Finding("broker", "problem", said, "give it the rights of deploy/redis/users.acl")


def check_queues(settings: Settings) -> Iterator[Finding]:
    """How many messages wait, and for how long the next of them has."""
    from redis.exceptions import NoPermissionError

    try:
        with _redis(settings) as redis:
            now_s = _redis_time_s(redis)
            for queue in MODERATE_QUEUES:
                lists = priority_lists(queue)
                try:
                    depth = sum(map(redis.llen, lists))
                except NoPermissionError:
                    continue  # said by the broker's check
                try:
                    ages_s = [_age_s(redis.lindex(key, -1), now_s) for key in lists if depth]
                except NoPermissionError:  # a producer sees no message
                    ages_s = []
                age_s = max((age_s for age_s in ages_s if age_s is not None), default=None)
                for_s = "" if age_s is None else f", the oldest for {age_s:,.0f} s"
                said = f"{queue}: {depth:,} messages wait{for_s}"
                if (age_s or 0) > QUEUE_AGE_S:
                    advice = "does a worker take from it (-Q)? `moderato status` shows their rates; docs/operations.md"
                    yield Finding("queues", "warning", said, advice)
                else:
                    yield Finding("queues", "ok", said)
    except _broker_errors():
        return  # said by the broker's check


def _age_s(message: bytes | None, now_s: float) -> float | None:
    """Since it was submitted; None where the message does not say."""
    try:
        return now_s - float(json.loads(message or b"")["headers"][SUBMITTED_AT_HEADER])
    except (ValueError, TypeError, LookupError, RecursionError):
        return None


@contextmanager
def _redis(settings: Settings) -> Iterator[Any]:
    """The Redis client that kombu makes for this broker, TLS, Sentinels and key prefix included."""
    from kombu import Connection
    from kombu.exceptions import KombuError

    options = {
        "socket_connect_timeout": ANSWER_S,
        "socket_timeout": ANSWER_S,
        "max_retries": 1,
        "interval_start": 0.1,
        **settings.broker_options.for_celery(),
    }
    with Connection(settings.broker_url, transport_options=options) as broker:
        try:
            client = broker.default_channel.client
        except KombuError as error:
            raise error.__cause__ or error from None
        yield client


def _broker_errors() -> tuple[type[Exception], ...]:
    from api_client.listening import BROKER_ERRORS

    return BROKER_ERRORS


def _redis_time_s(redis: Any) -> float:
    seconds, microseconds = redis.time()
    return float(seconds) + microseconds / 1e6


# --- The database ------------------------------------------------------------------------------------------------


def check_database(settings: Settings) -> Iterator[Finding]:
    """Whether the database answers, has this release's tables, and takes writes."""
    from sqlalchemy.exc import DBAPIError

    from db.migrate import require_current
    from db.session import DatabaseProblem, open_database, reading, sqlite_file, without_rows

    url = without_password(settings.database_url)
    if file := sqlite_file(settings.database_url):
        yield from (found := list(_check_sqlite(file)))
        if any(finding.level == "problem" for finding in found):
            return
    engine = open_database(settings.database_url)
    try:
        with reading(engine) as connection:
            started = time.perf_counter()
            connection.exec_driver_sql("SELECT 1")
            yield Finding("database", "ok", f"{url} answers in {1000 * (time.perf_counter() - started):.1f} ms")
            if not file:
                yield from _check_server(connection)
        require_current(engine)
        yield Finding("database", "ok", "this release can use its tables")
        if not file:
            with reading(engine) as connection:
                yield from _check_role(connection)
    except DatabaseProblem as problem:
        yield Finding("database", "problem", str(problem))
    except DBAPIError as error:
        advice = "start it, or set MODERATO_DATABASE_URL (or …_FILE) with the right host, user and password"
        yield Finding("database", "problem", f"{url} cannot be used: {_first_line(without_rows(error))}", advice)
    finally:
        engine.dispose()


def _check_sqlite(file: Path) -> Iterator[Finding]:
    from db.checking import BUSY_S, try_sqlite

    if not file.exists():
        advice = "`moderato up` makes it; for processes that you start yourself run `moderato db upgrade`"
        yield Finding("database", "problem", f"there is no {file}", advice)
        return
    kind = _file_system(file)
    if kind.startswith(NETWORK_FILE_SYSTEMS):
        advice = "move it to a local disk, or use PostgreSQL: SQLite's write-ahead log needs shared memory"
        yield Finding("database", "problem", f"{file} is on a network file system ({kind})", advice)
    try:
        try_sqlite(file)
    except sqlite3.Error as error:
        if getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_BUSY:
            advice = "what else has it open? `fuser -v` names it; a large erasure or training takes some seconds"
            yield Finding("database", "warning", f"{file} has been locked by a writer for {BUSY_S:g} s", advice)
        else:
            advice = "its file and folder must be writable by this user, and its disk must have space"
            yield Finding("database", "problem", f"{file} cannot be written to: {error}", advice)
    else:
        yield Finding("database", "ok", f"{file} can be written to")


def _check_server(connection: "Connection") -> Iterator[Finding]:
    from db.checking import is_read_only, postgresql_version
    from db.durable import database_time

    major, minor = postgresql_version(connection)
    if major < MIN_POSTGRESQL_VERSION:
        advice = f"upgrade it to {MIN_POSTGRESQL_VERSION} or newer"
        yield Finding("database", "warning", f"PostgreSQL {major}.{minor} is older than what is tested", advice)
    else:
        yield Finding("database", "ok", f"PostgreSQL {major}.{minor}")
    if is_read_only(connection):
        advice = "set MODERATO_DATABASE_URL to the primary"
        yield Finding("database", "problem", "it takes no writes: a standby, or set to read-only", advice)
    yield _skew("database", "the database", database_time(connection).timestamp(), "retention goes by the database's")


def _check_role(connection: "Connection") -> Iterator[Finding]:
    from db.checking import not_insertable

    if refused := not_insertable(connection):
        said = f"this role may not write into {', '.join(refused)}: right for a reader, wrong for a worker"
        yield Finding("database", "warning", said, "deploy/postgresql/roles.sql has each part's role")
    else:
        yield Finding("database", "ok", "this role may write what a worker writes")


def _file_system(path: Path) -> str:
    """The kind of file system that a path is on, as Linux names it; empty where it cannot be told."""
    resolved, best, kind = str(path.resolve()), "", ""
    for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace").splitlines():
        before, _, after = line.partition(" - ")
        mount = before.split()[4]
        if (resolved == mount or resolved.startswith(mount.rstrip("/") + "/")) and len(mount) >= len(best):
            best, kind = mount, after.split()[0]
    return kind


# --- Versions and policy -----------------------------------------------------------------------------------------


def _client(settings: Settings) -> "ModerationClient":
    from api_client.client import ModerationClient

    return ModerationClient(settings.broker_url, settings.database_url, settings.broker_options.for_celery())


def check_versions(settings: Settings) -> Iterator[Finding]:
    """Whether the active version's files are here, whole, and score as they should."""
    from db.session import DatabaseProblem
    from model.engine import load_scorer
    from model.version import VersionError, version_directory

    directory = settings.versions_dir
    version = STARTER_VERSION
    try:
        with _client(settings) as client:
            if active := client.active():
                version = active.version
                yield from _refusals(client, active.activation_id)
    except DatabaseProblem:
        yield Finding("versions", "unknown", "without the database it cannot be told which version is active")
    try:
        # On the CPU, whatever the workers use: their GPU is theirs.
        scorer = load_scorer(version_directory(version, directory), device="cpu", threads=1, expected_version=version)
    except VersionError as error:
        if os.strerror(errno.EACCES) in str(error):
            advice = f"give this user the right to read it: chmod -R o+rX {directory}"
        else:
            advice = "restore its files from a backup, or `moderato rollback`"
        yield Finding("versions", "problem", str(error), advice)
    else:
        probes = len(scorer.manifest.probes)
        yield Finding("versions", "ok", f"{version} is whole, and scores its {probes} probe texts as it should")


def _refusals(client: "ModerationClient", activation_id: int) -> Iterator[Finding]:
    for load in client.loads(activation_id):
        if load.error is not None:
            said = f"{load.worker} refused the active version and continues with {load.version}: {load.error}"
            yield Finding("versions", "problem", said, "is MODERATO_VERSIONS_DIR the same volume there?")


def check_policy(settings: Settings) -> Iterator[Finding]:
    """Whether the policy file, and the policy that is active, can be read."""
    from config.policy import PolicyError, parse_policy
    from db.session import DatabaseProblem

    no_start = "mend it: a worker does not start with it"
    try:
        with _client(settings) as client:
            active = client.active_policy()
            text = client.policy(active.policy_version)[1] if active else ""
    except DatabaseProblem:  # said by the database's check
        yield _check_policy_file(settings, "problem", f"{no_start}, unless another is active in the database")
        return
    if active is None:
        yield _check_policy_file(settings, "problem", no_start)
        yield Finding("policy", "ok", "none is active in the database: each worker decides by its file")
        return
    shown = f"{active.policy_version[:12]}…"
    try:
        parse_policy(text)
    except PolicyError as error:
        yield _check_policy_file(settings, "problem", no_start)
        advice = "another release activated it: upgrade this one, or `moderato policy rollback`"
        yield Finding("policy", "problem", f"the active policy {shown} cannot be read here: {error}", advice)
    else:
        yield _check_policy_file(settings, "warning", "mend it; it decides nothing while another policy is active")
        yield Finding("policy", "ok", f"{shown} is active in the database")


def _check_policy_file(settings: Settings, level: Level, advice: str) -> Finding:
    """Of that level, with that advice, where it cannot be used."""
    from config.policy import PolicyError, read_policy

    try:
        version = read_policy(settings.policy_file).version
    except PolicyError as error:
        return Finding("policy", level, str(error), advice)
    return Finding("policy", "ok", f"{settings.policy_file} is sound ({version[:12]}…)")


def check_gpu(settings: Settings) -> Iterator[Finding]:
    """Which device a worker here would score on. torch is only imported where a driver is installed."""
    from model.engine import has_cuda

    device = settings.worker.device
    if device == "cpu":
        yield Finding("gpu", "ok", "not used: worker.device is cpu")
    elif not has_cuda():
        if device == "cuda":
            advice = "install the NVIDIA driver, give the container the device, or set MODERATO_WORKER__DEVICE=auto"
            yield Finding("gpu", "problem", "worker.device is cuda, and no CUDA device can be used", advice)
        else:
            yield Finding("gpu", "ok", f"none: a worker here scores on {len(os.sched_getaffinity(0))} CPU threads")
    else:
        import torch

        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        yield Finding("gpu", "ok", f"{', '.join(names)}; torch {torch.__version__}, CUDA {torch.version.cuda}")


# --- Processes ---------------------------------------------------------------------------------------------------


def check_processes(settings: Settings) -> Iterator[Finding]:
    """Which workers and trainers answer."""
    with _client(settings) as client:
        activity = client.activity()
    if activity.problems:
        yield Finding("processes", "unknown", f"could not be asked: {'; '.join(activity.problems)}")
        return
    parts = (
        ("worker", activity.workers, f"celery -A worker worker -Q {','.join(MODERATE_QUEUES)} -n worker@%h"),
        ("trainer", activity.trainers, f"celery -A trainer worker -Q {RETRAIN_QUEUE} -n trainer@%h"),
    )
    for part, nodes, command in parts:
        if twice := sorted({node for node in nodes if nodes.count(node) > 1}):
            said = f"more than one {part} answers as {', '.join(twice)}: whoever asks for one of them hears either"
            yield Finding("processes", "warning", said, "give each a name of its own, such as -n second@%h")
        if nodes:
            yield Finding("processes", "ok", f"{part}: {', '.join(nodes)}")
            for queue in activity.queues_without_worker if part == "worker" else ():
                said = f"no worker takes from {queue}, where messages wait: {activity.queue_depths[queue]:,}"
                yield Finding("processes", "problem", said, f"name it in a worker's -Q: {command}")
            continue
        waits = sum(activity.queue_depths.values()) if part == "worker" else 0
        said = f"no {part} answers{f', and {waits:,} messages wait' if waits else ''}"
        yield Finding("processes", "problem" if waits else "warning", said, f"start one: {command}")


# --- This host ---------------------------------------------------------------------------------------------------


def check_disks(settings: Settings) -> Iterator[Finding]:
    """How much space is left where this host writes."""
    from db.session import sqlite_file

    places = {"versions": settings.versions_dir, "var": ROOT / "var"}
    if file := sqlite_file(settings.database_url):
        places["database"] = file.parent
    seen: set[int] = set()
    # Its default is made at the first start. Another one is a volume that is not mounted, or a misspelt name.
    if settings.versions_dir != ROOT / "var" / "versions" and not settings.versions_dir.is_dir():
        said = f"there is no directory {settings.versions_dir} (versions)"
        yield Finding("disk", "problem", said, "make or mount it, or correct MODERATO_VERSIONS_DIR")
    for name, place in places.items():
        there = next(each for each in (place, *place.parents) if each.exists())
        device = there.stat().st_dev
        if device in seen:
            continue
        seen.add(device)
        usage, system = shutil.disk_usage(there), os.statvfs(there)
        said = f"{there} ({name}): {_bytes(usage.free)} of {_bytes(usage.total)} free"
        if system.f_files and not system.f_favail:
            said, free = f"{there} ({name}): no inode is free", 0
        else:
            free = usage.free
        advice = "`moderato models prune`, older logs, or a larger disk; docs/operations.md: disk full"
        level: Level = "problem" if free < LEAST_BYTES else "warning" if free < LOW_BYTES else "ok"
        yield Finding("disk", level, said, "" if level == "ok" else advice)


def check_permissions(settings: Settings) -> Iterator[Finding]:
    """Who else on this machine may read secrets and comments."""
    from db.session import sqlite_file

    private: dict[Path, tuple[Level, str]] = {
        path: ("warning", f"which {variable} names")
        for variable, path in secret_files(os.environ).items()
        if not _is_a_containers(path)
    }
    if named := os.environ.get(CONFIG_FILE_VARIABLE):
        config = ROOT / named
        text = config.read_text(encoding="utf-8")
        if any(without_password(url) != url for url in re.findall(r"[\w+]+://[^\s'\"]+", text)):
            private[config] = "problem", "which holds a password"
    if (file := sqlite_file(settings.database_url)) and file.exists():
        private[file] = "problem", "which holds the comments"
    open_to_all = {path: why for path, why in private.items() if path.stat().st_mode & stat.S_IROTH}
    for path, (level, why) in open_to_all.items():
        yield Finding("permissions", level, f"every user of this host may read {path}, {why}", f"chmod o-rwx {path}")
    if not open_to_all:
        yield Finding("permissions", "ok", "no other user may read passwords or comments in files of this host")
    var = ROOT / "var"
    if var.exists() and not os.access(var, os.W_OK | os.X_OK):
        said = f"{var} cannot be written to by this user: a worker then measures batch sizes anew at each start"
        yield Finding("permissions", "warning", said, f"chown {var} to the user that workers run as")


def _is_a_containers(secret: Path) -> bool:
    """Whether it was mounted into a container, where there is no other user, and the mode is not its to choose."""
    below = (path for path in (secret, *secret.parents) if path.is_relative_to(CONTAINER_SECRETS))
    return any(os.path.ismount(path) for path in below)


# --- Words -------------------------------------------------------------------------------------------------------


def _skew(part: str, whose: str, theirs_s: float, why: str) -> Finding:
    apart_s = datetime.now(UTC).timestamp() - theirs_s
    if abs(apart_s) < SKEW_S:
        return Finding(part, "ok", f"this host's clock and that of {whose} are {abs(apart_s):.1f} s apart")
    way = "ahead of" if apart_s > 0 else "behind"
    said = f"{socket.gethostname()}'s clock is {abs(apart_s):,.0f} s {way} that of {whose}: {why}"
    return Finding(part, "warning", said, "run NTP on both")


def _bytes(number: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:.1f} TiB"


def _first_line(error: object) -> str:
    said = briefly(error) if isinstance(error, Exception) else str(error)
    return next(iter(said.splitlines()), "") or type(error).__name__


CHECKS: dict[str, tuple[Check, float]] = {
    "broker": (check_broker, 15),
    "database": (check_database, 20),
    "policy": (check_policy, 30),
    "queues": (check_queues, 15),
    "processes": (check_processes, 30),
    "disk": (check_disks, 10),
    "permissions": (check_permissions, 10),
    "gpu": (check_gpu, 60),
    "versions": (check_versions, 90),
}
"""By what they look at; each with the seconds after which it is given up."""
