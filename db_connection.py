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
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

from mysql.connector import errors
from mysql.connector.authentication import MySQLAuthenticator
from mysql.connector.connection import MySQLConnection
from mysql.connector.constants import ClientFlag, FieldType

CONNECT_TIMEOUT = 10  # seconds, for the connection and for each answer of the login
QUERY_TIMEOUT = 600  # seconds without a byte from the server
ROWS_AT_ONCE = 1000  # fewer are slower; more take memory, 1.2 KB an unparsed row
IDS_AT_ONCE = 1000  # customers looked up by one statement

# https://dev.mysql.com/doc/connector-python/en/connector-python-connectargs.html
_OPTIONS = {
    "charset": "utf8mb4",
    # The connector's default, utf8mb4_0900_ai_ci, is unknown to MariaDB.
    "collation": "utf8mb4_unicode_ci",
    "autocommit": True,
    # When a query is left before its last row, the other rows are dropped.
    "consume_results": True,
    # The minus: do not describe this computer to the server. For that the connector
    # starts lsb_release, and its packet is not valid if the host name is long.
    "client_flags": [-ClientFlag.CONNECT_ARGS],
}

# The connector's errors, and those that it lets through while it connects, if the host
# name is malformed, or if something that is not MySQL answers.
_CONNECT_ERRORS = (
    errors.Error,
    OSError,
    AttributeError,
    IndexError,
    ValueError,
    struct.error,
)

# The first versions with window functions and common table expressions.
_OLDEST_VERSIONS = {"MySQL": (8, 0), "MariaDB": (10, 2)}

# Undoes what the configuration of a server or its init_connect may have set, where it
# would change the rows or make the run fail. Only MariaDB from 10.3.3 on executes
# /*M!100303 */: a system-versioned table gives its current rows.
_SESSION = (
    """
    SET SESSION
        sql_mode = '',       -- usual operators and escapes, CHAR without its padding
        time_zone = '+00:00',
        sql_select_limit = 18446744073709551615, -- rows of a result: no limit
        sql_big_selects = 1,                     -- joins of any size
        max_sort_length = 1024,                  -- bytes of a text that are sorted by
        wait_timeout = 28800,                    -- seconds from a query to the next
        timestamp = DEFAULT                      -- CURDATE() is today
        /*M!100303 , system_versioning_asof = DEFAULT */
    """,
    # A lower level could read what another transaction has not committed.
    "SET SESSION TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY",
)

Value: TypeAlias = int | str | None


class DatabaseError(Exception):
    """The database did not give the rows. The text says what happened and the cure."""


class QueryFileError(Exception):
    """The file with the queries is not usable. The text names it and the cure."""


class PageViewRow(NamedTuple):
    """A row of Query 2: a customer with the latest page view.

    INT types are int; NULL and JSON's null are None; a JSON string is its content;
    anything else is the text that the server sends. Lone surrogates stand for bytes not
    in UTF-8.
    """

    user_id: int | str
    first_name: Value
    email: Value
    plan_type: Value
    view_id: Value
    page: Value
    browser: Value
    location: Value
    event_time: str


# Of each text in these columns one copy is kept, so that many rows take little memory.
_REPEATED = ("plan_type", "page", "browser", "location")


def read_query(path: Path, name: str) -> str:
    """Return the SQL statement that follows the line `-- name: <name>` in a file.

    Raises QueryFileError.
    """
    cure = "restore it from the program's repository"
    try:
        # A comment that was saved in another encoding does no harm.
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
    server are verified, except on a Unix socket, which needs no TLS.

    Entering the block and calling a method can raise DatabaseError. All methods except
    execute_query belong to one query of phase2_queries.sql, and raise QueryFileError if
    that returns other columns.
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
        self._connection = MySQLConnection()
        self._is_logged_in = False
        if host.startswith("/"):
            self._config.update(unix_socket=host)
        else:
            self._config.update(host=host, port=port)
            # It sends no password unencrypted. The connector has no option for this.
            self._connection._authenticator = _Authenticator()
            if ssl_ca:
                self._config.update(
                    ssl_ca=ssl_ca, ssl_verify_cert=True, ssl_verify_identity=True
                )

    def __enter__(self) -> DatabaseConnection:
        with contextlib.ExitStack() as stack:
            stack.callback(self._connection.close)
            with self._errors_explained(*_CONNECT_ERRORS):
                self._connection.connect(**self._config)
                self._is_logged_in = True
                # The server's init_connect may have chosen another database.
                self._connection.cmd_init_db(self._config["database"])
            self.version = self._read_version()
            for statement in _SESSION:
                self.execute_query(statement)
            stack.pop_all()  # all is well, so it stays open
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

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
        with self._query("columns", sql, tuple(_REQUIREMENTS)) as description:
            kinds = {column[0]: _get_kind(column) for column in description}
        complaints = _list_complaints(kinds)
        if complaints:
            raise DatabaseError(
                f"Columns cannot be used: {'; '.join(complaints)}. Change them, or put"
                " a view that converts them in the place of the table"
            )

    def read_page_views(self, sql: str) -> list[PageViewRow]:
        """Return the rows of Query 2, in its order. A million take about 430 MB."""
        rows: list[PageViewRow] = []
        with self._query("query_2", sql, PageViewRow._fields) as description:
            end_of_result = None  # the packet that follows the last row
            while end_of_result is None:
                chunk, end_of_result = self._connection.get_rows(ROWS_AT_ONCE, raw=True)
                rows.extend(map(PageViewRow._make, _parse_rows(chunk, description)))
        return rows

    def find_customers(self, sql: str, ids: Iterable[int | str]) -> dict[str, Value]:
        """Return the address of each of these customers that exists, by id as text.

        `sql` is the query `customers_by_id`. Its ids are passed as text: the server
        converts them to the type of the column, and can still use the index.
        """
        texts = [str(customer_id) for customer_id in ids]
        columns = ("id", "email")
        found: dict[str, Value] = {}
        for start in range(0, len(texts), IDS_AT_ONCE):
            wanted = set(texts[start : start + IDS_AT_ONCE])
            # An id of a damaged results file may hold lone surrogates, which cannot be
            # encoded.
            values = [text.encode(errors="replace").decode() for text in wanted]
            placeholders = ", ".join("%s" for _ in values)
            statement = sql.replace("(@customer_ids)", f"({placeholders})")
            query = self._query("customers_by_id", statement, columns, values)
            with query as description:
                rows, _ = self._connection.get_rows(raw=True)
                for customer_id, email in _parse_rows(rows, description):
                    # For '7x' a server also finds the number 7.
                    if str(customer_id) in wanted:
                        found[str(customer_id)] = email
        return found

    @contextlib.contextmanager
    def _query(
        self, name: str, sql: str, columns: tuple[str, ...], values: Sequence[str] = ()
    ) -> Iterator[Any]:
        """Run the query `name`, and return the description of its columns.

        In the block the rows are read from the connection, raw: the cursor's conversion
        is slower than `_parse_rows`.
        """
        with self._cursor() as cursor:
            cursor.execute(sql, values)
            if cursor.column_names != columns:
                raise QueryFileError(
                    f"The query {name} must return {', '.join(columns)}:"
                    " phase2_queries.sql and db_connection.py must agree"
                )
            yield cursor.description

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

    @contextlib.contextmanager
    def _cursor(self, **options: Any) -> Iterator[Any]:
        with (
            self._errors_explained(errors.Error, OSError),
            self._connection.cursor(**options) as cursor,
        ):
            yield cursor

    @contextlib.contextmanager
    def _errors_explained(self, *kinds: type[Exception]) -> Iterator[None]:
        """Turn an error of these kinds in this block into a DatabaseError."""
        try:
            yield
        except kinds as error:
            raise DatabaseError(_explain(error, self._get_phase())) from error

    def _get_phase(self) -> _Phase:
        if self._is_logged_in:
            return "query"
        # None until the server's first packet has arrived.
        return "connection" if self._connection.server_info is None else "login"


# A kind of column is a group of types that are the same to this program. A type in no
# group is a kind of its own, called as in SQL.

_WHOLE_NUMBER = "a whole number"
_TEXT = "text"
# The connector's names of the types. The server calls ENUM and SET a STRING.
_WHOLE_NUMBER_TYPES = ("TINY", "SHORT", "INT24", "LONG", "LONGLONG")
_TEXT_TYPES = (
    "VARCHAR",
    "VAR_STRING",
    "STRING",
    "TINY_BLOB",
    "BLOB",
    "MEDIUM_BLOB",
    "LONG_BLOB",
)
_BINARY_COLLATION = 63  # of all types that hold bytes, on every server


class _Requirement(NamedTuple):
    """What a column must be, in words, and the kinds that are."""

    words: str
    kinds: tuple[str, ...]


_ID = _Requirement(
    "a whole number or text",
    (_WHOLE_NUMBER, _TEXT, "DECIMAL"),  # as for DECIMAL(20), which has no fraction
)
_COMPARED = _Requirement("text", (_TEXT, "JSON"))  # with pro, pricing and settings
_TIME = _Requirement(
    "a date with a time (DATETIME or TIMESTAMP)",
    ("DATETIME", "TIMESTAMP"),
)
_READABLE = _Requirement(
    "text, a number or a date",
    (
        _TEXT,
        "JSON",
        "binary data",  # is read as UTF-8
        "NULL",  # in a view, for a column that the table lacks
        _WHOLE_NUMBER,
        "DECIMAL",
        "FLOAT",
        "DOUBLE",
        "DATE",
        "DATETIME",
        "TIMESTAMP",
    ),
)
_REQUIREMENTS = {
    "customers.id": _ID,
    "customers.first_name": _READABLE,
    "customers.email": _READABLE,
    "customers.plan_type": _COMPARED,
    "page_views.id": _ID,
    "page_views.user_id": _ID,
    "page_views.page": _COMPARED,
    "page_views.browser": _READABLE,
    "page_views.location": _READABLE,
    "page_views.event_time": _TIME,
}


def _get_kind(column: Any) -> str:
    """Return the kind of a column.

    `column` is an item of the cursor's description: the name is its first part, the
    type the second, the collation the ninth.
    """
    name = str(FieldType.get_info(column[1]))
    if name in _WHOLE_NUMBER_TYPES:
        return _WHOLE_NUMBER
    if name in _TEXT_TYPES:
        return "binary data" if column[8] == _BINARY_COLLATION else _TEXT
    return name.removeprefix("NEW")  # NEWDECIMAL is DECIMAL


def _list_complaints(kinds: dict[str, str]) -> list[str]:
    """Return a sentence for each column that cannot be used."""
    complaints = []
    for column, (words, usable_kinds) in _REQUIREMENTS.items():
        kind = kinds[column]
        if kind not in usable_kinds:
            complaints.append(f"{column} is {kind} and must be {words}")
    user_id = kinds["page_views.user_id"]
    customer_id = kinds["customers.id"]
    if _TEXT in (user_id, customer_id) and user_id != customer_id:
        complaints.append(
            f"page_views.user_id is {user_id}, but customers.id is {customer_id}: both"
            " must be numbers, or both text"
        )
    return complaints


# Values


def _parse_rows(rows: Iterable[Any], description: Iterable[Any]) -> Iterator[Any]:
    """Yield the rows with their values parsed. They come as bytes or None."""
    # Column by column, because that takes a third of the time. Without rows there are
    # no columns, and so no rows.
    columns = map(_parse_column, zip(*rows, strict=True), description)
    return zip(*columns, strict=True)


def _parse_column(values: Iterable[bytes | None], column: Any) -> list[Value]:
    kind = _get_kind(column)
    parse: Any = _parse_text
    if kind == _WHOLE_NUMBER:
        parse = int
    elif kind == "JSON":
        parse = _parse_json
    elif column[0] in _REPEATED:
        parse = _parse_repeated_text
    return [None if value is None else parse(value) for value in values]


def _parse_text(value: bytes) -> str:
    return value.decode(errors="surrogateescape")


def _parse_repeated_text(value: bytes) -> str:
    """Return the same object for equal texts."""
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
        if not self.ssl_enabled:
            # The connector's first of three passwords; no other is configured.
            password = kwargs["password1"]
            sock.send = _refuse_to_send(password, sock.send)
        return super().authenticate(sock, handshake, *args, **kwargs)


def _refuse_to_send(password: str, send: Callable[..., None]) -> Callable[..., None]:
    """Return `send`, except that it does not send the password as it is."""
    clear_text = password.encode() + b"\0"

    def guarded_send(payload: bytes, *args: Any) -> None:
        if payload == clear_text:
            raise DatabaseError(_CLEAR_TEXT_LOGIN)
        send(payload, *args)

    return guarded_send


# Advice

# `connection` until the server has introduced itself, `login` until it has accepted the
# account, `query` afterwards.
_Phase: TypeAlias = Literal["connection", "login", "query"]


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
    # After the login, 1045 is about the account that defined a view.
    if number == 1045 and phase == "query":
        return _BROKEN_VIEW
    for numbers, advice in _ADVICE.items():
        if number in numbers:
            return advice
    # A number of the server. From 2000 to 2999 are those of clients:
    # https://dev.mysql.com/doc/mysql-errors/en/error-message-elements.html
    if 1000 <= number < 2000 or number >= 3000:
        return f"The database refused the {phase}"
    cause = error.__cause__  # which the connector has wrapped in its own error
    if isinstance(cause, ssl.SSLCertVerificationError):
        return _CERTIFICATE_ADVICE.get(cause.verify_code, _UNTRUSTED_CERTIFICATE)
    if phase == "login" and isinstance(cause, _TLS_ERRORS):
        return _TLS_FAILED
    if isinstance(cause, socket.gaierror):
        return "The host name is not known: check DB_HOST, and this computer's DNS"
    # The connector lacks the login method, or a package for it.
    login_method_errors = (errors.NotSupportedError, errors.ProgrammingError)
    if phase == "login" and isinstance(error, login_method_errors):
        return _UNKNOWN_METHOD
    # The connector's words when a login method would send the password as it is.
    if str(error).endswith(" requires SSL"):
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
# During the login, the last two are about the CA file.
_TLS_ERRORS = (ssl.SSLError, FileNotFoundError, PermissionError)
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

_BROKEN_VIEW = (
    "A view is broken, or the account that defined it is gone: create the view again"
)

# By the numbers of the errors.
_ADVICE = {
    (1040, 1203, 1226): (
        "A limit of the database is reached: try again later, or raise max_connections,"
        " max_user_connections or the limits of the account"
    ),
    (1044, 1142, 1143): (
        "DB_USER may not read the database, table or column: check DB_NAME, or GRANT"
        " SELECT on it to the user"
    ),
    (1045,): (
        "The database refused the login: check DB_USER and DB_PASSWORD, whether the"
        " account is for this computer's address, and whether it REQUIREs TLS or a"
        " certificate"
    ),
    (1049,): "There is no such database: check DB_NAME, or load database_setup.sql",
    # It shuts down, a lock lasted too long, or the query was cancelled.
    (1053, 1205, 1317): "The database cannot do it at this time: try again later",
    (1054, 1146): (
        "A table or column is missing: check DB_NAME, and compare the tables with"
        " database_setup.sql"
    ),
    (1129,): (
        "The database has blocked this computer after failed connections: run"
        " mysqladmin flush-hosts"
    ),
    (1130,): (
        "The database takes no connection from this computer: CREATE USER for this"
        " computer's address"
    ),
    (1267,): (
        "Two columns that are compared have different collations: give"
        " page_views.user_id that of customers.id"
    ),
    (1356, 1449): _BROKEN_VIEW,
    (1524,): (
        "The database has not loaded the login method of DB_USER: give the account"
        " another one with ALTER USER"
    ),
    (1698,): (
        "The database refused the login: DB_USER is for an operating system account"
        " only, so create one with a password"
    ),
    (1820, 1862): "The password of DB_USER has expired: set a new one with ALTER USER",
    (1969, 3024): (
        "The database ended the query at its own time limit: look for a missing index,"
        " or raise max_execution_time of MySQL, or max_statement_time of MariaDB"
    ),
    (2026,): (  # for the connector it has this meaning only
        "DB_SSL_CA is set, but the database server offers no TLS: set TLS up on the"
        " server"
    ),
    # 3955 comes after failed logins.
    (3118, 3955, 4151): "The account DB_USER is locked: ALTER USER ... ACCOUNT UNLOCK",
}
