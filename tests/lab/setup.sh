# Sourced by the scripts in tests/: makes .venv and finds or installs a database server. Stays inside this repository,
# except for Debian's or Ubuntu's packages, which it installs when it may.

set -euo pipefail
unset CDPATH
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONDONTWRITEBYTECODE=1 PYTHONPATH="$PWD/tests" LC_ALL=C.UTF-8
readonly venv_python=.venv/bin/python

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

has_venv() {
    "$venv_python" -m pip --version > /dev/null 2>&1
}

can_make_venv() {
    "$(find_python)" -c 'import ensurepip, venv' 2> /dev/null
}

# By the names of its programs; which they are, and whether they run, find_database_server asks.
seems_to_have_server() {
    [ -n "${TEST_MARIADBD:-}${TEST_MYSQLD:-}" ] || [ -x .venv/mysql9/bin/mysqld ] ||
        (PATH=$PATH:/usr/sbin:/usr/libexec:/usr/local/mysql/bin && command -v mariadbd mysqld > /dev/null)
}

has_server() {
    "$venv_python" -c 'import sys; from lab import database; sys.exit(not database.find_servers())' 2> /dev/null
}

# Installs Debian's or Ubuntu's packages as root, or by a sudo that asks for nothing; fails where neither is possible.
install_packages() {
    command -v apt-get > /dev/null || return 1
    local as_root=(env)
    if [ "$(id -u)" != 0 ]; then
        sudo -n true 2> /dev/null || return 1
        as_root=(sudo -n env)
    fi
    echo "Installing $* ..." >&2
    "${as_root[@]}" DEBIAN_FRONTEND=noninteractive apt-get update -qq > /dev/null 2>&1 || true
    "${as_root[@]}" DEBIAN_FRONTEND=noninteractive \
        apt-get install -y -qq --no-install-recommends "$@" > /dev/null 2>&1
}

# Ends with the one command that installs all that is missing: "python", "server" or both.
ask_for() {
    local missing=" $* " command packages=()
    if [ "$(uname)" = Darwin ]; then
        [[ $missing != *" python "* ]] || packages+=(python)
        [[ $missing != *" server "* ]] || packages+=(mariadb)
        command="brew install ${packages[*]}"
    elif command -v apt-get > /dev/null; then
        [[ $missing != *" python "* ]] || packages+=(python3 python3-venv)
        [[ $missing != *" server "* ]] || packages+=(mariadb-server-core mariadb-client-core)
        command="sudo apt-get install -y ${packages[*]}"
    else
        [[ $missing != *" python "* ]] || packages+=("Python 3.10 or newer with its venv module")
        [[ $missing != *" server "* ]] || packages+=("MariaDB's or MySQL's server and client")
        command="the packages of your system for ${packages[0]}${packages[1]:+, and for ${packages[1]}}"
    fi
    {
        [[ $missing != *" python "* ]] || echo "Python 3.10 or newer with its venv module is needed."
        [[ $missing != *" server "* ]] || echo "The programs of a MariaDB or MySQL server are needed (none has to run)."
        echo "Install what is missing, then run this again:"
        echo "    $command"
    } >&2
    exit 1
}

# make_venv REQUIREMENTS...: .venv with these, made anew when it is broken, installed again when they changed. Asks
# for a missing database server, too, so that nobody is asked twice.
make_venv() {
    local pinned missing=()
    if ! has_venv && ! can_make_venv; then
        install_packages python3 python3-venv || true
        can_make_venv || missing+=(python)
    fi
    if ! seems_to_have_server; then
        install_packages mariadb-server-core mariadb-client-core ||
            install_packages mysql-server-core-8.0 mysql-client-core-8.0 || missing+=(server)
    fi
    [ "${#missing[@]}" = 0 ] || ask_for "${missing[@]}"
    if ! has_venv; then
        echo "Making .venv with $(find_python) ..." >&2
        "$(find_python)" -m venv --clear .venv > /dev/null
    fi
    pinned=$(cat requirements.txt tests/requirements.txt | cksum)
    if ! grep -qxF "$pinned $*" .venv/installed 2> /dev/null; then
        echo "Installing Python packages ..." >&2
        "$venv_python" -m pip install -qq "$@"
        grep -qF "$pinned" .venv/installed 2> /dev/null || rm -f .venv/installed
        echo "$pinned $*" >> .venv/installed
    fi
}

# A server of either kind that runs, with its client.
find_database_server() {
    has_server || install_packages mariadb-server-core mariadb-client-core || true
    has_server || ask_for server
}
