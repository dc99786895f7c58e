"""Read the rows of Query 2 from MySQL or MariaDB, over one read-only connection.

An error becomes a DatabaseError or a QueryFileError: one line that says what happened
and what to do. The same number of an error can have different causes before, during
and after the login, so the advice depends on the phase too.
"""

from __future__ import annotations

import contextlib
import json
import re
import socket
import ssl
import struct
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

from mysql.connector import errors
from mysql.connector.authentication import MySQLAuthenticator
from mysql.connector.connection import MySQLConnection
from mysql.connector.constants import ClientFlag, FieldType
from mysql.connector.network import MySQLTCPSocket

CONNECT_TIMEOUT = 10  # seconds, for the connection and for each answer of the login
QUERY_TIMEOUT = 600  # seconds without a byte from the server
ROWS_AT_ONCE = 1000  # one by one is slower, and an unparsed row takes 1.2 KB
IDS_AT_ONCE = 1000  # customers looked up by one statement

# https://dev.mysql.com/doc/connector-python/en/connector-python-connectargs.html
_OPTIONS = {
    "charset": "utf8mb4",
    # The connector's default, utf8mb4_0900_ai_ci, is unknown to MariaDB.
    "collation": "utf8mb4_unicode_ci",
    "autocommit": True,
    # When a query is left before its last row, the other rows are dropped.
    "consume_results": True,
    # The minus switches off a description of this computer for the server. To make it
    # the connector starts lsb_release, and with a long host name connecting fails.
    "client_flags": [-ClientFlag.CONNECT_ARGS],
}

# The first versions with window functions and common table expressions.
_OLDEST_VERSIONS = {"MySQL": (8, 0), "MariaDB": (10, 2)}

# Sets every server default that decides which rows arrive and how they look. Only
# MariaDB executes the text in /*M! */: of a table that keeps old rows it reads the
# current ones.
_SESSION = (
    """
    SET SESSION
        sql_mode = '',                           -- CHAR without its padding
        time_zone = '+00:00',
        sql_select_limit = 18446744073709551615, -- rows of a result: no limit
        sql_big_selects = 1,                     -- joins of any size
        max_sort_length = 1024,                  -- bytes of a text that are sorted by
        wait_timeout = 28800,                    -- seconds between two queries
        timestamp = DEFAULT                      -- CURDATE() is today
        /*M!100303 , system_versioning_asof = DEFAULT */
    """,
    "SET SESSION TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY",
)

Value: TypeAlias = int | str | None


class DatabaseError(Exception):
    """The database did not give the rows. The text says what happened and the cure."""


class QueryFileError(Exception):
    """The file with the queries is not usable. The text names it and the cure."""


class PageViewRow(NamedTuple):
    """A row of Query 2: a customer with the latest page view.

    Whole numbers are int, NULL is None, a JSON string is its content, and anything else
    is the text that the server sends. Lone surrogates stand for bytes not in UTF-8.
    """

    user_id: Value
    first_name: Value
    email: Value
    plan_type: Value
    view_id: Value
    page: Value
    browser: Value
    location: Value
    event_time: str | None


def read_query(path: Path, name: str) -> str:
    """Return the SQL statement that follows the line `-- name: <name>` in a file.

    Raises QueryFileError.
    """
    cure = "restore it from the program's repository"
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise QueryFileError(
            f"{path} cannot be read ({error.strerror}): {cure}"
        ) from error
    found = re.search(rf"^-- name: {name}$(.*?);$", text, re.MULTILINE | re.DOTALL)
    if found is None:
        raise QueryFileError(f"{path} has no query '-- name: {name}': {cure}")
    return found[1].strip()


class DatabaseConnection:
    """A `with` block around one read-only connection, in UTC.

    An account with SELECT alone is enough. `host` is a name, or the path of a Unix
    socket when it begins with `/`. With `ssl_ca` the certificate and the name of the
    server are verified. Entering the block and its methods raise DatabaseError, and
    QueryFileError when a query returns other columns than are read.
    """

    version: str  # such as "MySQL 9.7.0" or "MariaDB 10.11.6"

    def __init__(
        self,
        *,
        host: str,
        port: int,
        user: str,
        password: str,
        database: str,
        ssl_ca: str = "",
    ) -> None:
        self._config: dict[str, Any] = {
            "user": user,
            "password": password,
            "database": database,
            "connection_timeout": CONNECT_TIMEOUT,
            "read_timeout": QUERY_TIMEOUT,
            **_OPTIONS,
        }
        if host.startswith("/"):
            self._config["unix_socket"] = host
        else:
            self._config["host"] = host
            self._config["port"] = port
        if ssl_ca:
            self._config["ssl_ca"] = ssl_ca
            self._config["ssl_verify_cert"] = True
            self._config["ssl_verify_identity"] = True
        self._connection = MySQLConnection()
        # So that no password is sent unencrypted, for which there is no option.
        self._connection._authenticator = _Authenticator()
        self._is_logged_in = False

    def __enter__(self) -> DatabaseConnection:
        try:
            with self._errors_explained():
                self._connection.connect(**self._config)
                self._is_logged_in = True
                # The server's init_connect may have chosen another database.
                self._connection.cmd_init_db(self._config["database"])
                self.version = self._read_version()
                for statement in _SESSION:
                    self.execute_query(statement)
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def execute_query(self, sql: str) -> list[dict[str, Any]]:
        """Run one statement and return a dict of column to value for each row."""
        with self._cursor(dictionary=True) as cursor:
            cursor.execute(sql)
            return list(cursor)

    def check_columns(self, sql: str) -> None:
        """Check the types of the tables' columns, with the query `columns`.

        A column of another type would select other users, or send what Iterable does
        not understand. Raises DatabaseError, which lists every such column.
        """
        with self._cursor() as cursor:
            cursor.execute(sql)
            _require_names("columns", cursor.column_names, tuple(_REQUIREMENTS))
            kinds = {column[0]: _get_kind(column) for column in cursor.description}
        complaints = _list_complaints(kinds)
        if complaints:
            raise DatabaseError(
                f"Columns cannot be used: {'; '.join(complaints)}. Change them, or put"
                " a view that converts them in the place of the table"
            )

    def read_page_views(self, sql: str) -> list[PageViewRow]:
        """Return the rows of Query 2, in its order. A million take about 430 MB."""
        rows: list[PageViewRow] = []
        with self._cursor() as cursor:
            cursor.execute(sql)
            _require_names("query_2", cursor.column_names, PageViewRow._fields)
            # Past the cursor, which would convert the values: see _parse_rows.
            end_of_result = None  # the packet that follows the last row
            while end_of_result is None:
                some, end_of_result = self._connection.get_rows(ROWS_AT_ONCE, raw=True)
                values = _parse_rows(some, cursor.description)
                rows.extend(map(PageViewRow._make, values))
        return rows

    def find_customers(self, sql: str, ids: Iterable[int | str]) -> dict[str, Value]:
        """Return the address of each of these customers that exists, by id as text.

        `sql` is the query `customers_by_id`. Its ids are passed as text: the server
        converts them to the type of the column, and can still use the index.
        """
        # A damaged results file can give an id that UTF-8 cannot express. It is in no
        # table.
        texts = [str(customer_id) for customer_id in ids]
        wanted = [
            text for text in texts if text.encode(errors="ignore").decode() == text
        ]
        found: dict[str, Value] = {}
        for start in range(0, len(wanted), IDS_AT_ONCE):
            some = wanted[start : start + IDS_AT_ONCE]
            places = ", ".join(["%s"] * len(some))
            with self._cursor() as cursor:
                cursor.execute(sql.replace("(@customer_ids)", f"({places})"), some)
                rows, _ = self._connection.get_rows(raw=True)
                for customer_id, email in _parse_rows(rows, cursor.description):
                    found[str(customer_id)] = email
        # In a column of numbers a server also finds 7 where '7x' is asked for.
        return {key: found[key] for key in wanted if key in found}

    def _read_version(self) -> str:
        """Return the server's product and version. Raises DatabaseError if too old."""
        [row] = self.execute_query("SELECT VERSION() AS version")
        text = row["version"]
        product = "MariaDB" if "mariadb" in text.lower() else "MySQL"
        version = text.partition("-")[0]  # "10.11.6-MariaDB", "8.0.40-log"
        major, minor = version.split(".")[:2]
        if (int(major), int(minor)) < _OLDEST_VERSIONS[product]:
            raise DatabaseError(
                f"{product} {text} is too old:"
                " the query needs MySQL 8.0 or MariaDB 10.2, or later"
            )
        return f"{product} {version}"

    def _close(self) -> None:
        # It fails when the server is gone.
        with contextlib.suppress(*_DRIVER_ERRORS):
            self._connection.close()

    @contextlib.contextmanager
    def _cursor(self, **options: Any) -> Iterator[Any]:
        with self._errors_explained(), self._connection.cursor(**options) as cursor:
            yield cursor

    @contextlib.contextmanager
    def _errors_explained(self) -> Iterator[None]:
        """Turn an error of server or driver in this block into a DatabaseError."""
        try:
            yield
        except _DRIVER_ERRORS as error:
            raise DatabaseError(_explain(error, self._get_phase())) from error

    def _get_phase(self) -> _Phase:
        if self._is_logged_in:
            return "query"
        # The server's version is known from its first packet.
        return "connection" if self._connection.server_info is None else "login"


def _require_names(query: str, found: Sequence[str], wanted: Sequence[str]) -> None:
    if found != wanted:
        names = ", ".join(wanted)
        raise QueryFileError(
            f"The query {query} must return {names}:"
            " phase2_queries.sql and db_connection.py must agree"
        )


# Kinds of columns: several types that mean the same here. Any other type is a kind of
# its own, under its name in SQL.

_WHOLE_NUMBER = "a whole number"
_TEXT = "text"
_KINDS = {
    FieldType.TINY: _WHOLE_NUMBER,
    FieldType.SHORT: _WHOLE_NUMBER,
    FieldType.INT24: _WHOLE_NUMBER,
    FieldType.LONG: _WHOLE_NUMBER,
    FieldType.LONGLONG: _WHOLE_NUMBER,
    FieldType.NEWDECIMAL: "DECIMAL",
    FieldType.VARCHAR: _TEXT,
    FieldType.VAR_STRING: _TEXT,
    FieldType.STRING: _TEXT,  # the server says so of ENUM and SET as well
    FieldType.TINY_BLOB: _TEXT,
    FieldType.BLOB: _TEXT,
    FieldType.MEDIUM_BLOB: _TEXT,
    FieldType.LONG_BLOB: _TEXT,
}
_BINARY_CHARACTER_SET = 63  # the number of the "collation" of bytes, on every server

_IDENTIFIER = "a whole number or text"
_COMPARED_TEXT = "text"
_READABLE = "text, a number or a date"
_TIME = "a date with a time (DATETIME or TIMESTAMP)"
_USABLE_KINDS = {
    _IDENTIFIER: (_WHOLE_NUMBER, "DECIMAL", _TEXT),
    _COMPARED_TEXT: (_TEXT, "JSON"),  # JSON of MySQL; that of MariaDB is text
    _READABLE: (
        _TEXT,
        "JSON",
        "binary data",
        "NULL",
        _WHOLE_NUMBER,
        "DECIMAL",
        "FLOAT",
        "DOUBLE",
        "DATE",
        "DATETIME",
        "TIMESTAMP",
    ),
    _TIME: ("DATETIME", "TIMESTAMP"),
}
_REQUIREMENTS = {
    "customers.id": _IDENTIFIER,
    "customers.first_name": _READABLE,
    "customers.email": _READABLE,
    "customers.plan_type": _COMPARED_TEXT,
    "page_views.id": _IDENTIFIER,
    "page_views.user_id": _IDENTIFIER,
    "page_views.page": _COMPARED_TEXT,
    "page_views.browser": _READABLE,
    "page_views.location": _READABLE,
    "page_views.event_time": _TIME,
}


def _get_kind(column: Any) -> str:
    """Return the kind of a column.

    `column` is an item of the cursor's description: the name is its first part, the
    type the second, the character set the ninth.
    """
    kind = _KINDS.get(column[1], str(FieldType.get_info(column[1])))
    if kind == _TEXT and column[8] == _BINARY_CHARACTER_SET:
        return "binary data"
    return kind


def _list_complaints(kinds: dict[str, str]) -> list[str]:
    """Return a sentence for each column that cannot be used."""
    complaints = []
    for column, requirement in _REQUIREMENTS.items():
        if kinds[column] not in _USABLE_KINDS[requirement]:
            complaints.append(f"{column} is {kinds[column]} and must be {requirement}")
    user_id = kinds["page_views.user_id"]
    customer_id = kinds["customers.id"]
    if _TEXT in (user_id, customer_id) and user_id != customer_id:
        complaints.append(
            f"page_views.user_id is {user_id}, but customers.id is {customer_id}: both"
            " must be numbers, or both text"
        )
    return complaints


# Values: the connector gives the bytes that the server sends, because its own
# conversion takes longer.


def _parse_rows(rows: Iterable[Any], description: Iterable[Any]) -> Iterator[Any]:
    """Yield the values of each row."""
    # Column by column, because that takes a third of the time.
    columns = map(_parse_column, zip(*rows, strict=True), description)
    return zip(*columns, strict=True)


def _parse_column(values: Iterable[bytes | None], column: Any) -> list[Value]:
    kind = _get_kind(column)
    parse: Any = _parse_text
    if kind == _WHOLE_NUMBER:
        parse = int
    elif kind == "JSON":
        parse = _parse_json
    elif column[0] in ("plan_type", "page", "browser", "location"):
        parse = _parse_repeated_text
    return [None if value is None else parse(value) for value in values]


def _parse_text(value: bytes) -> str:
    return value.decode(errors="surrogateescape")


def _parse_repeated_text(value: bytes) -> str:
    """Return the same object for equal texts, so that many rows take little memory."""
    return sys.intern(_parse_text(value))


def _parse_json(value: bytes) -> str | None:
    """Return a string without its quotes, None for null, anything else as written."""
    text = _parse_text(value)
    parsed = json.loads(text)
    return parsed if isinstance(parsed, str | None) else text


# Logging in


class _Authenticator(MySQLAuthenticator):
    """The connector's login, except that no password leaves unencrypted.

    The connector itself refuses sha256_password and mysql_clear_password without TLS.
    But it sends the password as it is when the server asks for the full authentication
    of caching_sha2_password: auth_more_response in
    mysql/connector/plugins/caching_sha2_password.py.
    """

    def authenticate(
        self, sock: Any, handshake: Any, *args: Any, **kwargs: Any
    ) -> bytes:
        """Log in, as the connector does. Raises DatabaseError instead of a leak."""
        # Nobody can listen at a Unix socket. `password1` is the password.
        if isinstance(sock, MySQLTCPSocket) and not self.ssl_enabled:
            sock = _UnencryptedSocket(sock, kwargs["password1"])
        return super().authenticate(sock, handshake, *args, **kwargs)


class _UnencryptedSocket:
    """The connector's socket, except that it does not send the password as it is."""

    def __init__(self, sock: MySQLTCPSocket, password: str) -> None:
        self._sock = sock
        self._clear_text = password.encode() + b"\0"

    def send(self, payload: bytes, *packet_numbers: Any) -> None:
        if payload == self._clear_text:
            raise DatabaseError(_CLEAR_TEXT_LOGIN)
        self._sock.send(payload, *packet_numbers)

    def recv(self, *timeout: Any) -> bytearray:
        return self._sock.recv(*timeout)


# Advice

# `connection` until the server has introduced itself, `login` until it has accepted the
# account, `query` afterwards.
_Phase: TypeAlias = Literal["connection", "login", "query"]

# Besides its own errors the connector lets these through, for a host name that cannot
# be one, for a server that is not MySQL, and for one that breaks off in mid-answer.
_DRIVER_ERRORS = (
    errors.Error,
    AttributeError,
    IndexError,
    OSError,
    ValueError,
    struct.error,
)


def _explain(error: Exception, phase: _Phase) -> str:
    """Return what happened and what to do, in one line.

    The error's own words follow, except for time-outs.
    """
    if isinstance(error, errors.ReadTimeoutError):
        return (
            f"The database was silent for {QUERY_TIMEOUT} s:"
            " look for locks, and for a missing index"
        )
    if isinstance(error, errors.ConnectionTimeoutError):
        return (
            f"No database answers within {CONNECT_TIMEOUT} s: check DB_HOST and"
            " DB_PORT, whether a firewall is in between, and whether the server hangs"
        )
    details = " ".join(str(error).split())
    return f"{_advise(error, phase)} ({details})"


def _advise(error: Exception, phase: _Phase) -> str:
    number = getattr(error, "errno", None) or 0
    if number == 1045 and phase == "query":  # of the account that defined a view
        return _BROKEN_VIEW
    if number in _ADVICE:
        return _ADVICE[number]
    # From 2000 to 2999 are the numbers of clients:
    # https://dev.mysql.com/doc/mysql-errors/en/error-message-elements.html
    if 1000 <= number < 2000 or number >= 3000:
        return f"The database refused the {phase}"
    cause = error.__cause__
    if isinstance(cause, ssl.SSLCertVerificationError):
        return _CERTIFICATE_ADVICE.get(cause.verify_code, _UNTRUSTED_CERTIFICATE)
    if phase == "login" and isinstance(cause, (ssl.SSLError, PermissionError)):
        return _TLS_FAILED
    if isinstance(cause, socket.gaierror):
        return "The host name is not known: check DB_HOST, and this computer's DNS"
    # The connector lacks the login method, or a package for it.
    method_errors = (errors.NotSupportedError, errors.ProgrammingError)
    if phase == "login" and isinstance(error, method_errors):
        return _UNKNOWN_METHOD
    if str(error).endswith(" requires SSL"):  # of a login method
        return _CLEAR_TEXT_LOGIN
    return _DRIVER_ADVICE[phase]


_DRIVER_ADVICE = {
    "connection": (
        "No MySQL or MariaDB server answers there: check DB_HOST and DB_PORT, that the"
        " server runs, and whether a proxy or firewall is in between"
    ),
    "login": "The login broke off: see the log of the database server",
    "query": "The database connection broke: check that the server runs",
}
_CLEAR_TEXT_LOGIN = (
    "The password was not sent, because the login method of DB_USER would send it"
    " unencrypted: set up TLS on the database server, or give DB_USER another login"
    " method"
)
_UNKNOWN_METHOD = (
    "DB_USER has a login method that this program cannot use: give the account"
    " mysql_native_password or caching_sha2_password"
)
_TLS_FAILED = (
    "The encrypted connection failed: check that DB_SSL_CA is a readable file of"
    " certificates in PEM, and the server's TLS versions"
)

# By X509_V_ERR_..., https://docs.openssl.org/master/man1/openssl-verification-options
_UNTRUSTED_CERTIFICATE = (
    "The server's certificate is not trusted: put the certificate of the authority that"
    " issued it into DB_SSL_CA"
)
_OTHER_NAME = (
    "The server's certificate is for another name: set DB_HOST to a name that it has,"
    " or issue it for this one"
)
_CERTIFICATE_ADVICE = {
    10: "The server's certificate has expired: renew it",
    62: _OTHER_NAME,  # host name
    64: _OTHER_NAME,  # IP address
}

_LATER = "The database cannot do it at this time: try again later"
_LIMIT = (
    "A limit of the database is reached: try again later, or raise max_connections,"
    " max_user_connections or the limits of the account"
)
_NOT_ALLOWED = (
    "DB_USER may not read the database, table or column: check DB_NAME, or GRANT SELECT"
    " on it to the user"
)
_MISSING = (
    "A table or column is missing: check DB_NAME, and compare the tables with"
    " database_setup.sql"
)
_BROKEN_VIEW = (
    "A view is broken, or the account that defined it is gone: create the view again"
)
_EXPIRED = "The password of DB_USER has expired: set a new one with ALTER USER"
_LOCKED = "The account DB_USER is locked: ALTER USER ... ACCOUNT UNLOCK"
_TIME_LIMIT = (
    "The database ended the query at its own time limit: look for a missing index, or"
    " raise max_execution_time of MySQL, or max_statement_time of MariaDB"
)

# By the number of the error. The words of the server follow in brackets.
_ADVICE = {
    1040: _LIMIT,
    1203: _LIMIT,
    1226: _LIMIT,
    1044: _NOT_ALLOWED,
    1142: _NOT_ALLOWED,
    1143: _NOT_ALLOWED,
    1045: (
        "The database refused the login: check DB_USER and DB_PASSWORD, whether the"
        " account is for this computer's address, and whether it REQUIREs TLS or a"
        " certificate"
    ),
    1049: "There is no such database: check DB_NAME, or load database_setup.sql",
    1054: _MISSING,
    1146: _MISSING,
    1053: _LATER,  # the server is shutting down
    1205: _LATER,  # waited too long for a lock
    1317: _LATER,  # the query was cancelled
    1129: (
        "The database has blocked this computer after failed connections: run"
        " mysqladmin flush-hosts"
    ),
    1130: (
        "The database takes no connection from this computer: CREATE USER for this"
        " computer's address"
    ),
    1267: (
        "Two columns that are compared have different collations: give"
        " page_views.user_id that of customers.id"
    ),
    1356: _BROKEN_VIEW,
    1449: _BROKEN_VIEW,
    1524: (
        "The database has not loaded the login method of DB_USER: give the account"
        " another one with ALTER USER"
    ),
    1698: (
        "The database refused the login: DB_USER is for an operating system account"
        " only, so create one with a password"
    ),
    1820: _EXPIRED,
    1862: _EXPIRED,
    1969: _TIME_LIMIT,
    3024: _TIME_LIMIT,
    3118: _LOCKED,
    3955: _LOCKED,  # after failed logins
    4151: _LOCKED,
    2026: (  # for the connector it has this meaning only
        "DB_SSL_CA is set, but the database server offers no TLS: set TLS up on the"
        " server"
    ),
}
