#!/usr/bin/env bash
# All that has to hold before a change goes in: linter, types, tests. Arguments go to pytest.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
make_venv -r requirements.txt -r tests/requirements.txt
find_database_server
bash tests/mysql9.sh || echo "MySQL 9 is not to be had here; the tests run with the servers there are." >&2
"$venv_python" -m ruff check .
"$venv_python" -m ruff format --check .
"$venv_python" -m mypy --strict main.py db_connection.py iterable_client.py logger_config.py
"$venv_python" -m coverage erase
"$venv_python" -m coverage run -m pytest "$@"
"$venv_python" -m coverage combine --quiet
"$venv_python" -m coverage report --include="$PWD/main.py,$PWD/db_connection.py,$PWD/iterable_client.py,$PWD/logger_config.py"
