#!/usr/bin/env bash
# Writes the guide, iterable_integration_guide.pdf or the file that is named, from the README, the code and real runs.
[ $# = 0 ] || case $1 in /*) ;; *) set -- "$PWD/$1" ;; esac
source "$(dirname "${BASH_SOURCE[0]}")/lab/setup.sh"
make_venv -r requirements.txt -r tests/requirements.txt
find_database_server
exec "$venv_python" -m lab.guide "$@"
