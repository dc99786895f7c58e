#!/usr/bin/env bash
# Writes the guide, a PDF, from the README, the code and real runs:
#
#     bash tests/guide.sh [FILE]      (default: iterable_integration_guide.pdf, here)
file=
if [ $# != 0 ]; then
    case $1 in
        /*) file=$1 ;;
        *) file=$PWD/$1 ;;
    esac
fi
source "$(dirname "${BASH_SOURCE[0]}")/lab/setup.sh"
make_venv -r requirements.txt -r tests/requirements.txt
find_database_server
exec "$venv_python" -m lab.guide ${file:+"$file"}
