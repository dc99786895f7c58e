"""The rows: Query 2 on a read-only connection to MySQL or MariaDB, and errors that say what to do."""

from __future__ import annotations

import contextlib
import re
import struct
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mysql.connector
from mysql.connector.constants import FieldType

QUERY_TIMEOUT = 600  # seconds without a byte from the server

_WHOLE_NUMBERS = (FieldType.TINY, FieldType.SHORT, FieldType.INT24, FieldType.LONG, FieldType.LONGLONG)
_SHARED = ("plan_type", "page", "browser", "location")  # columns of which many rows have the same text
_OLDEST = {"MySQL": (8, 0), "MariaDB": (10, 2)}  # the first with window functions and CTEs
_CURES: dict[int | None, str] = {  # by the error's number, of server or client
    **dict.fromkeys((None, -1), "There is no connection to the database: check DB_HOST, DB_PORT and DB_SSL_CA"),
    1040: "The database has no connection left: try again later, or raise max_connections",
    1044: "DB_USER may not use this database: check DB_NAME, or GRANT SELECT on it to the user",
    **dict.fromkeys((1045, 1698), "The database refused the login: check DB_USER and DB_PASSWORD"),
    1049: "There is no such database: check DB_NAME, or load database_setup.sql",
    1054: "A column is missing: compare the tables with database_setup.sql",
    1142: "DB_USER may not read a table: GRANT SELECT on it to the user",
    1146: "A table is missing: check DB_NAME, or load database_setup.sql",
    2002: "No database answers on this socket: check DB_HOST, and that the server runs",
    2003: "No database answers there: check DB_HOST and DB_PORT, and that the server runs",
    **dict.fromkeys((2013, 2055), "The database connection broke: check that the server runs, and DB_SSL_CA if set"),
    2026: "The encrypted connection to the database failed: check DB_SSL_CA and the server's certificate",
    3024: f"The database was silent for {QUERY_TIMEOUT} s: look for locks, and for a missing index",
}

# Besides its own errors the connector lets these through: for an impossible host name, for a server that is not MySQL,
# and for a failing lsb_release, which it starts.
_ERRORS = (mysql.connector.Error, OSError, ValueError, IndexError, struct.error, subprocess.SubprocessError)


class DatabaseError(Exception):
    """The rows could not be read. The text says in one line what happened and what to do."""


# A row of Query 2: its columns in their order, whole numbers as int, NULL as None, else the text that the server sends;
# lone surrogates stand for bytes that are no UTF-8. No value is trusted.
Record = namedtuple("Record", "user_id first_name email plan_type view_id page browser location event_time")


def read_query(path: Path, name: str) -> str:
    """The SQL statement that follows the line `-- name: <name>` in a file. Raises DatabaseError, OSError."""
    text = path.read_text(encoding="utf-8", errors="replace")
    found = re.search(rf"^-- name: {name}$(.*?);$", text, re.MULTILINE | re.DOTALL)
    if not found:
        raise DatabaseError(f"{path} has no query under '-- name: {name}': restore the file")
    return found[1].strip()


class DatabaseConnection:
    """A `with` block around one read-only connection, in UTC. An account with SELECT alone is enough.

    `host` is a name, or the path of a Unix socket when it begins with `/`. With `ssl_ca` the server's certificate and
    name are verified. Entering it and its methods raise DatabaseError.
    """

    def __init__(self, host: str, port: int, user: str, password: str, database: str, ssl_ca: str = "") -> None:
        self._config: dict[str, Any] = {
            "user": user,
            "password": password,
            "database": database,
            "connection_timeout": 10,  # seconds
            "read_timeout": QUERY_TIMEOUT,
            "charset": "utf8mb4",
            "collation": "utf8mb4_unicode_ci",  # the connector's own, utf8mb4_0900_ai_ci, is unknown to MariaDB
            "time_zone": "+00:00",
            "autocommit": True,
            "consume_results": True,  # of a query that is left before its last row
            "use_pure": True,  # the same behaviour and errors on machines with and without the C library
        }
        self._config |= {"unix_socket": host} if host.startswith("/") else {"host": host, "port": port}
        if ssl_ca:
            self._config |= {"ssl_ca": ssl_ca, "ssl_verify_cert": True, "ssl_verify_identity": True}

    def __enter__(self) -> DatabaseConnection:
        with _errors_in_words():
            self._connection: Any = mysql.connector.connect(**self._config)
        self._check_version()
        self.execute_query("SET SESSION TRANSACTION READ ONLY")
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(*_ERRORS):  # it says goodbye to a server that may be gone
            self._connection.close()

    def execute_query(self, sql: str) -> list[dict[str, Any]]:
        """Run one statement; a dict of column to value for each row."""
        with _errors_in_words(), self._connection.cursor(dictionary=True) as cursor:
            cursor.execute(sql)
            return [*cursor]

    def read_records(self, sql: str) -> list[Record]:
        """The rows of Query 2, in its order. A million of them take about 430 MB."""
        with _errors_in_words(), self._connection.cursor() as cursor:
            cursor.execute(sql)
            if cursor.column_names != Record._fields:
                raise DatabaseError(f"Query 2 must return {', '.join(Record._fields)}: restore phase2_queries.sql")
            parsers = [_parser(kind, shared=column in _SHARED) for column, kind, *_ in cursor.description]
            records: list[Record] = []
            end = None
            while not end:  # in thousands: single rows take longer, and all at once hold their packets, 1.2 KB a row
                rows, end = self._connection.get_rows(count=1000, raw=True)
                columns = zip(*rows, strict=True)  # none where there are no rows
                values = [map(parse, column) for parse, column in zip(parsers, columns, strict=False)]
                records += map(Record._make, zip(*values, strict=True))
            return records

    def _check_version(self) -> None:
        version = str(self.execute_query("SELECT VERSION() AS version")[0]["version"])
        kind = "MariaDB" if "mariadb" in version.lower() else "MySQL"
        if tuple(map(int, re.findall(r"\d+", version)[:2])) < _OLDEST[kind]:
            raise DatabaseError(f"{kind} {version} is too old: the query needs MySQL 8.0 or MariaDB 10.2, or later")


def _parser(kind: int, *, shared: bool) -> Callable[[bytes | None], Any]:
    """Turns what the server sends for a column of this type into its value. The connector's own takes longer."""
    if kind in _WHOLE_NUMBERS:
        return lambda value: None if value is None else int(value)
    keep = sys.intern if shared else str
    return lambda value: None if value is None else keep(value.decode(errors="surrogateescape"))


@contextlib.contextmanager
def _errors_in_words() -> Iterator[None]:
    """An error in this block becomes a DatabaseError, with its cure."""
    try:
        yield
    except _ERRORS as error:
        cure = _CURES.get(getattr(error, "errno", None), "The database reported an error")
        raise DatabaseError(f"{cure} ({' '.join(str(error).split())})") from error
