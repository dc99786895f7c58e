#!/usr/bin/env bash
# Measures the figures of the README's section Speed. Arguments name the parts to
# measure (see lab/benchmark.py); all of them take about 15 minutes.
source "$(dirname "${BASH_SOURCE[0]}")/lab/setup.sh"
make_venv -r requirements.txt -c tests/requirements.txt trustme
find_database_server
exec "$venv_python" -m lab.benchmark "$@"
