#!/usr/bin/env bash
# The figures of the README's table. Arguments are the parts to measure; all of them take about 12 minutes.
source "$(dirname "${BASH_SOURCE[0]}")/lab/setup.sh"
make_venv -r requirements.txt -c tests/requirements.txt trustme
find_database_server
exec "$venv_python" -m lab.benchmark "$@"
