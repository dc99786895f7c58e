#!/usr/bin/env bash
# Unpacks MySQL 9 from Debian unstable into a folder, for tests on machines whose own packages hold MariaDB only:
# from a mirror that the machine's own apt settings name, with apt's proxy and passwords.
#
#     bash tests/lab/mysql9.sh [FOLDER]        (default: .venv/mysql9)
#
# Afterwards FOLDER/bin/mysqld and FOLDER/bin/mysql run, with the libraries of their own release beside them. Needs no
# root. Nothing is installed: apt gets lists and a cache of its own, and the system's stay as they are.
# Does nothing when the folder is there. Exit 1, and a line that says why, when it cannot be done.
set -euo pipefail

target=${1:-$(cd "$(dirname "$0")/../.." && pwd)/.venv/mysql9}
keyring=/usr/share/keyrings/debian-archive-keyring.gpg

fail() {
    echo "No MySQL 9: $*" >&2
    exit 1
}

[ ! -x "$target/bin/mysqld" ] || exit 0
for tool in apt-get apt-cache dpkg; do
    command -v "$tool" >/dev/null || fail "this is not Debian or a relative of it ($tool is missing)"
done
[ -r "$keyring" ] || fail "Debian's keys are not here (install the package debian-archive-keyring)"

mkdir -p "$(dirname "$target")" 2>/dev/null || fail "$(dirname "$target") cannot be made"
target=$(cd "$(dirname "$target")" && pwd)/$(basename "$target")
work=$(mktemp -d "$target.XXXXXX" 2>/dev/null) || fail "nothing can be made beside $target"
trap 'rm -rf "$work"' EXIT
mkdir -p "$work"/apt/{lists,cache,debs} "$work/mysql9/bin"
root=$work/mysql9/root

try_apt() { # [command] [arguments]: apt-get or apt-cache, with lists, cache and sources of its own
    local command=$1
    shift
    "$command" -qq -o Dir::State="$work/apt" -o Dir::State::status="$work/apt/status" -o Dir::Cache="$work/apt/cache" \
        -o Dir::Etc::sourcelist="$work/apt/sources.list" -o Dir::Etc::sourceparts=/dev/null \
        -o Dir::Etc::preferences=/dev/null -o Dir::Etc::preferencesparts=/dev/null -o Acquire::Languages=none \
        -o APT::Sandbox::User=root -o APT::Update::Error-Mode=any -o APT::Install-Recommends=false \
        -o Acquire::http::Timeout=20 "$@" 2>>"$work/log"
}

apt() { # the same, or the end
    try_apt "$@" || fail "$(grep '^E:' "$work/log" | tail -n 1)"
}

use_mirror() { # the first archive of the machine's apt that has Debian unstable; those for security have not
    local archive
    for archive in $(apt-get indextargets --format '$(REPO_URI)' 2>>"$work/log" | sort -u); do
        echo "deb [arch=$architecture signed-by=$keyring] $archive sid main" >"$work/apt/sources.list"
        ! try_apt apt-get update >/dev/null || return 0
    done
    fail "no archive in this machine's apt settings has Debian unstable: $(grep '^E:' "$work/log" | tail -n 1)"
}

echo "Fetching MySQL 9 for the tests (about a minute, once) ..." >&2
architecture=$(dpkg --print-architecture)
: >"$work/apt/status" # a machine on which nothing is installed, so that every library is fetched
use_mirror

# The libraries' names change with each release of theirs, so they are asked for. Perl is for scripts that are not run.
packages=$(apt apt-cache depends --recurse --no-recommends --no-suggests --no-conflicts --no-breaks --no-replaces \
    --no-enhances mysql-server-core mysql-client-core)
packages=$(grep '^[a-z]' <<<"$packages" | grep -vE '^(perl|libperl|libgdbm|libdb|libc-gconv)' | sort -u)
# shellcheck disable=SC2086 # a word for each package
(cd "$work/apt/debs" && apt apt-get download $packages >/dev/null)
for package in "$work"/apt/debs/*.deb; do
    dpkg -x "$package" "$root" || fail "${package##*/} cannot be unpacked"
done
rm -rf "$root"/usr/share/{doc,man,locale,lintian,gcc,gdb}
find "$root/usr/bin" -mindepth 1 ! -name mysql -delete

loader=$(find "$root/usr" -name 'ld-linux*.so.*' -path '*-linux-*' | head -n 1)
[ -n "$loader" ] || fail "no loader for $architecture in libc6"
wrap() { # name, program, further arguments: bin/<name> runs the program with its own libraries
    {
        echo '#!/bin/sh'
        echo 'root=$(dirname "$(dirname "$(readlink -f "$0")")")/root'
        echo "libraries=\$root/usr/lib/$(basename "$(dirname "$loader")")"
        echo "exec \"\$libraries/${loader##*/}\" --library-path \"\$libraries\" \"\$root/usr/$2\" \"\$@\" $3"
    } >"$work/mysql9/bin/$1"
    chmod +x "$work/mysql9/bin/$1"
}
wrap mysqld sbin/mysqld '--basedir="$root/usr" --lc-messages-dir="$root/usr/share/mysql"'
wrap mysql bin/mysql ''

for name in mysqld mysql; do
    "$work/mysql9/bin/$name" --no-defaults --version >/dev/null 2>>"$work/log" || fail "$(tail -n 1 "$work/log")"
done
mv -T "$work/mysql9" "$target" || fail "$target is in the way"
