"""The URLs of the broker and the database: whether they can be understood, before any library tries.

Libraries that cannot parse a URL quote it, or take part of a password for the host and show that. So nothing here
repeats anything of a URL.
"""

import re
from urllib.parse import parse_qsl, urlsplit

from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

ENCODING = "in user and password write / as %2F, # as %23, ? as %3F, [ as %5B, ] as %5D, ; as %3B, @ as %40, % as %25"

BROKER_SCHEMES = ("redis", "rediss", "redis+socket", "sentinel")
_USERINFO = r"([^/?#\[\]\t\r\n]*@)?"
_HOST = r"(\[[^\[\]@/?#]*\]|[^\[\]@/?#:\s]*)"
_SERVER_FORM = re.compile(rf"\w+://{_USERINFO}{_HOST}(:\d*)?(/\d*)?(\?(?P<options>[^?#\s]*))?")
_SOCKET_FORM = re.compile(rf"redis\+socket://{_USERINFO}/[^?#\t\r\n]+(\?virtual_host=\d+)?")
TLS_OPTIONS = (
    "ssl_ca_certs",
    "ssl_ca_data",
    "ssl_ca_path",
    "ssl_cert_reqs",
    "ssl_certfile",
    "ssl_check_hostname",
    "ssl_ciphers",
    "ssl_keyfile",
    "ssl_password",
)
CERTIFICATE_REQUIREMENTS = ("required", "optional", "none", "CERT_REQUIRED", "CERT_OPTIONAL", "CERT_NONE")

DATABASE_SCHEMES = ("sqlite", "postgresql", "postgres", "postgresql+psycopg")
_DATABASE_FORMS = f"a URL such as sqlite:///var/moderato.db or postgresql://USER:PASSWORD@HOST:PORT/NAME; {ENCODING}"


def check_broker_url(value: str) -> None:
    """Make sure that Celery will read this URL as it was meant. A Sentinel's may name several, with semicolons between.

    Raises:
        ValueError: it may not; the message says what is expected.
    """
    for url in value.split(";"):
        scheme = url.partition("://")[0]
        if scheme not in BROKER_SCHEMES:
            schemes = ", ".join(f"{each}://" for each in BROKER_SCHEMES)
            raise ValueError(f"expected embedded, or a URL beginning with {schemes}; {ENCODING}")
        if scheme == "redis+socket":
            if not _SOCKET_FORM.fullmatch(url):
                raise ValueError(f"expected {scheme}://USER:PASSWORD@/path/to/redis.sock?virtual_host=0; {ENCODING}")
        else:
            _check_server(scheme, url)


def _check_server(scheme: str, url: str) -> None:
    form = _SERVER_FORM.fullmatch(url)
    try:
        _ = urlsplit(url).port  # it may be too large, or a letter of the password may look like a separator
    except ValueError:
        form = None
    if form is None:
        raise ValueError(f"expected {scheme}://USER:PASSWORD@HOST:PORT/0, with the database's number; {ENCODING}")
    options = dict(parse_qsl(form["options"] or "", keep_blank_values=True))
    if not options.keys() <= {*TLS_OPTIONS}:
        raise ValueError(f"after its ? a broker's URL may hold {', '.join(TLS_OPTIONS)}; {ENCODING}")
    if options.get("ssl_cert_reqs", "required") not in CERTIFICATE_REQUIREMENTS:
        raise ValueError(f"ssl_cert_reqs is one of {', '.join(CERTIFICATE_REQUIREMENTS)}")


def parse_database_url(value: str) -> URL:
    """A database's URL, with the driver that moderato comes with.

    Raises:
        ValueError: it is none, or no database that moderato can use; the message says what is expected.
    """
    try:
        url = make_url(value)
    except (ArgumentError, ValueError):
        raise ValueError(f"expected {_DATABASE_FORMS}") from None
    if url.drivername not in DATABASE_SCHEMES:
        raise ValueError(f"expected a URL beginning with {', '.join(f'{each}://' for each in DATABASE_SCHEMES)}")
    if url.drivername == "sqlite":
        if not url.database or url.database == ":memory:":
            raise ValueError("SQLite needs a file: several processes share the database")
        return url
    # SQLAlchemy ends a password at the first @, and takes what follows for the host.
    if value.count("@") > 1:
        raise ValueError(f"expected {_DATABASE_FORMS}")
    if not re.fullmatch(r"none|\d{1,9}", str(url.query.get("prepare_threshold", "none"))):
        raise ValueError("prepare_threshold is none, or a number of executions")
    return url.set(drivername="postgresql+psycopg")
