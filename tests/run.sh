#!/usr/bin/env bash
# All that has to hold before a change goes in: linter, types, tests. Arguments go to pytest.
source "$(dirname "${BASH_SOURCE[0]}")/lab/setup.sh"
make_venv -r requirements.txt -r tests/requirements.txt
find_database_server
bash tests/lab/mysql9.sh || echo "The tests run without MySQL 9." >&2
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
export COVERAGE_FILE=$folder/coverage

echo "Linter and types ..."
"$venv_python" -m ruff check --quiet .
"$venv_python" -m ruff format --quiet --check .
"$venv_python" -m mypy --no-error-summary --strict main.py db_connection.py iterable_client.py logger_config.py
echo "Tests (about 2 minutes) ..."
"$venv_python" -m coverage run -m pytest "$@"
if [ $# = 0 ]; then # some of the tests cover some of the code
    "$venv_python" -m coverage combine --quiet
    "$venv_python" -m coverage report > "$folder/report" || { cat "$folder/report" && exit 1; }
    echo "Coverage: $("$venv_python" -m coverage report --format=total) %"
fi
