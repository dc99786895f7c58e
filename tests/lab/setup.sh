# shellcheck shell=bash
# Sourced by the scripts in tests/. Makes .venv, and finds or installs a database server.
#
# It stays inside this repository, except for Debian's or Ubuntu's packages, which it
# installs if it may.

set -euo pipefail
unset CDPATH
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export LC_ALL=C.UTF-8
export PIP_DISABLE_PIP_VERSION_CHECK=1
export PYTHONDONTWRITEBYTECODE=1
export PYTHONPATH=$PWD/tests
readonly venv_python=.venv/bin/python

# Prints the path of the first Python that is new enough.
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

has_venv() {
    "$venv_python" -m pip --version > /dev/null 2>&1
}

can_make_venv() {
    "$(find_python)" -c 'import ensurepip, venv' 2> /dev/null
}

# Whether there are programs with the names of a server's. What they are, and whether
# they run, has_server knows; it needs .venv.
seems_to_have_server() {
    if [ -n "${TEST_MARIADBD:-}${TEST_MYSQLD:-}" ] || [ -x .venv/mysql9/bin/mysqld ]; then
        return 0
    fi
    local folders=$PATH:/usr/sbin:/usr/libexec:/usr/local/mysql/bin
    (PATH=$folders && command -v mariadbd mysqld > /dev/null)
}

has_server() {
    "$venv_python" -c 'import sys; from lab import database
sys.exit(not database.find_servers())' 2> /dev/null
}

# install_packages NAME...: installs Debian's or Ubuntu's packages, as root or by a sudo
# that asks for no password. Fails where neither is possible.
install_packages() {
    local as_root=(env)
    if ! command -v apt-get > /dev/null; then
        return 1
    fi
    if [ "$(id -u)" != 0 ]; then
        as_root=(sudo -n env)
        sudo -n true 2> /dev/null || return 1
    fi
    as_root+=(DEBIAN_FRONTEND=noninteractive)
    echo "Installing $* ..." >&2
    "${as_root[@]}" apt-get update -qq > /dev/null 2>&1 || true
    "${as_root[@]}" apt-get install -y -qq --no-install-recommends "$@" > /dev/null 2>&1
}

install_server() {
    install_packages mariadb-server-core mariadb-client-core ||
        install_packages mysql-server-core-8.0 mysql-client-core-8.0
}

# ask_for WHAT...: ends with the one command that installs all that is missing, which is
# "python", "server" or both.
ask_for() {
    local what command packages=
    echo "Something that the tests and the demo need is not installed:" >&2
    for what in "$@"; do
        case $what in
            python) echo "- Python 3.10 or newer with its venv module" >&2 ;;
            server) echo "- the programs of a MariaDB or MySQL server (none has to run)" >&2 ;;
        esac
        packages+=" $(name_packages "$what")"
    done
    if [ "$(uname)" = Darwin ]; then
        command="brew install$packages"
    elif command -v apt-get > /dev/null; then
        command="sudo apt-get install -y$packages"
    else
        command="(the packages of your system that have these)"
    fi
    echo "Install what is missing, then run this again:" >&2
    echo "    $command" >&2
    exit 1
}

# name_packages WHAT: prints the packages of Homebrew, or of Debian and Ubuntu.
name_packages() {
    case $(uname):$1 in
        Darwin:python) echo python ;;
        Darwin:server) echo mariadb ;;
        *:python) echo python3 python3-venv ;;
        *:server) echo mariadb-server-core mariadb-client-core ;;
    esac
}

# make_venv REQUIREMENTS...: makes .venv, anew when it is broken, and installs these in
# it, again when they changed. Looks for a database server before, so that everything
# that is missing is asked for at once.
make_venv() {
    local missing=()
    if ! has_venv && ! can_make_venv; then
        install_packages python3 python3-venv || true
        can_make_venv || missing+=(python)
    fi
    if ! seems_to_have_server; then
        install_server || missing+=(server)
    fi
    if [ "${#missing[@]}" != 0 ]; then
        ask_for "${missing[@]}"
    fi
    if ! has_venv; then
        echo "Making .venv with $(find_python) ..." >&2
        "$(find_python)" -m venv --clear .venv > /dev/null
    fi
    install_requirements "$@"
}

# install_requirements REQUIREMENTS...: installs these, unless .venv/installed has a line
# that says that they are. The line begins with a checksum of the requirements' files.
install_requirements() {
    local checksum
    checksum=$(cat requirements.txt tests/requirements.txt | cksum)
    if grep -qxF "$checksum $*" .venv/installed 2> /dev/null; then
        return
    fi
    echo "Installing Python packages ..." >&2
    "$venv_python" -m pip install -qq "$@"
    if ! grep -qF "$checksum" .venv/installed 2> /dev/null; then
        rm -f .venv/installed # its lines are about other versions
    fi
    echo "$checksum $*" >> .venv/installed
}

# find_database_server: makes sure that there is a server that runs, with its client.
find_database_server() {
    if ! has_server; then
        install_packages mariadb-server-core mariadb-client-core || true
        has_server || ask_for server
    fi
}
