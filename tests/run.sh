#!/usr/bin/env bash
# Everything that must hold before a change is committed: linter, types, tests, coverage.
# Arguments go to pytest; then coverage is not checked.
source "$(dirname "${BASH_SOURCE[0]}")/lab/setup.sh"
make_venv -r requirements.txt -r tests/requirements.txt
find_database_server
bash tests/lab/mysql9.sh || echo "The tests run without MySQL 9." >&2
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
export COVERAGE_FILE=$folder/coverage

echo "Linter and types ..."
"$venv_python" -m ruff check
"$venv_python" -m ruff format --check
"$venv_python" -m mypy
echo "Tests (a few minutes) ..."
"$venv_python" -m coverage run -m pytest "$@"
if [ $# = 0 ]; then
    "$venv_python" -m coverage combine --quiet
    if ! "$venv_python" -m coverage report > "$folder/report"; then
        cat "$folder/report"
        exit 1
    fi
    echo "Coverage: $("$venv_python" -m coverage report --format=total) %"
fi
