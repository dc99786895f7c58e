#!/usr/bin/env bash
# The main job against a private database server and a local stand-in for Iterable.
# Arguments go to main.py.
source "$(dirname "${BASH_SOURCE[0]}")/lab/setup.sh"
make_venv -r requirements.txt
find_database_server
exec "$venv_python" -m lab.demo "$@"
