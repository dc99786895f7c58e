# Sourced by demo.sh and run.sh: makes .venv and finds or installs a database server. Stays inside this repository,
# except for Debian's or Ubuntu's packages, which it installs when it may.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONDONTWRITEBYTECODE=1 LC_ALL=C.UTF-8
readonly venv_python=.venv/bin/python

# Installs packages as root or by a sudo that asks for nothing; fails where neither is possible.
install_packages() {
    command -v apt-get > /dev/null || return 1
    local as_root=()
    if [ "$(id -u)" != 0 ]; then
        sudo -n true 2> /dev/null || return 1
        as_root=(sudo -n)
    fi
    echo "Installing $* ..." >&2
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get update -qq > /dev/null 2>&1 || true
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
        apt-get install -y -qq --no-install-recommends "$@" > /dev/null 2>&1
}

# The first Python that is new enough.
find_python() {
    local name
    for name in python3 python3.14 python3.13 python3.12 python3.11 python3.10; do
        if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2> /dev/null; then
            command -v "$name"
            return
        fi
    done
    return 1
}

# make_venv REQUIREMENTS...: .venv with these, made anew when it is broken, installed again when they changed.
make_venv() {
    local python stamp
    if ! "$venv_python" -m pip --version > /dev/null 2>&1; then
        python=$(find_python) || { install_packages python3 && python=$(find_python); } || {
            echo "Python 3.10 or newer is needed: install it, then run this again." >&2
            exit 1
        }
        echo "Making .venv with $python ..." >&2
        "$python" -m venv --clear .venv > /dev/null 2>&1 ||
            { install_packages python3-venv && "$python" -m venv --clear .venv > /dev/null; } || {
            echo "Python's venv module is needed: install python3-venv, then run this again." >&2
            exit 1
        }
    fi
    stamp=$(cat requirements.txt tests/requirements.txt | cksum; echo "$@")
    if [ "$(cat .venv/installed 2> /dev/null)" != "$stamp" ]; then
        echo "Installing Python packages ..." >&2
        "$venv_python" -m pip install -qq "$@"
        echo "$stamp" > .venv/installed
    fi
}

has_server() {
    (cd tests && "../$venv_python" -c 'import sys, database; sys.exit(not database.find_servers())' 2> /dev/null)
}

# A server of either kind, installed when there is none. Debian's and Ubuntu's "core" packages start no service.
find_database_server() {
    has_server || install_packages mariadb-server-core mariadb-client-core ||
        install_packages mysql-server-core-8.0 mysql-client-core-8.0 || true
    has_server || {
        echo "A database server's programs are needed (mariadbd or mysqld, and the client; none has to run)." >&2
        echo "Install them, for instance: apt-get install mariadb-server-core mariadb-client-core" >&2
        exit 1
    }
}
