#!/bin/sh
# `make install` and `make uninstall`: the program, the unit, its user and folders, and a first config file. Both may be run again.
#
#   PREFIX=/opt/orchestrator   a venv of the daemon's own (the engines' venv, PREFIX/engine, is `make engine`'s)
#   DESTDIR=                   a root to stage into, for packages: then nothing of this machine is touched
#   PYTHON, PACKAGE, PIP_ARGS  the Python of the venv; what pip installs, the source tree; more words for pip
set -eu
umask 022

PREFIX=${PREFIX:-/opt/orchestrator}
DESTDIR=${DESTDIR:-}
PYTHON=${PYTHON:-python3}
HERE=$(cd "$(dirname "$0")/.." && pwd)
PACKAGE=${PACKAGE:-$HERE}
VENV=$DESTDIR$PREFIX
CONFIG=$DESTDIR/etc/orchestrator
UNIT=$DESTDIR/etc/systemd/system/orchestrator.service
SYSUSERS=$DESTDIR/usr/lib/sysusers.d/orchestrator.conf
TMPFILES=$DESTDIR/usr/lib/tmpfiles.d/orchestrator.conf
DOCS=$VENV/share/doc/orchestrator

die() {
    echo "$1" >&2
    exit 1
}

here() { # is this machine itself the target, and has it a systemd that runs
    [ -z "$DESTDIR" ] && [ -d /run/systemd/system ]
}

ours() { # a venv whose only purpose is this program
    [ -f "$VENV/pyvenv.cfg" ] && [ -x "$VENV/bin/orchestratord" ]
}

put() { # file, target: with the paths of PREFIX
    mkdir -p "$(dirname "$2")"
    sed "s|/opt/orchestrator|$PREFIX|g" "$1" >"$2.new"
    chmod 0644 "$2.new"
    mv "$2.new" "$2"
}

install() {
    case $PREFIX in /*) ;; *) die "PREFIX is $PREFIX: an absolute path is needed" ;; esac
    if [ -e "$VENV" ] && ! ours && [ -n "$(find "$VENV" -mindepth 1 -maxdepth 1 ! -name engine)" ]; then
        die "$VENV is there and is none of ours: choose another PREFIX"
    fi
    if [ -z "$DESTDIR" ] && [ "$(id -u)" -ne 0 ]; then
        die "root is needed: sudo make install (or DESTDIR=folder to stage)"
    fi
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || die "Python 3.11 or later is needed: make install PYTHON=/path/to/python3.11"
    mkdir -p "$VENV"
    "$PYTHON" -m venv "$VENV"
    # shellcheck disable=SC2086  # PIP_ARGS are words
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --upgrade --force-reinstall --no-deps ${PIP_ARGS:-} "$PACKAGE"
    # shellcheck disable=SC2086
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check ${PIP_ARGS:-} "$PACKAGE"
    if [ -n "$DESTDIR" ]; then # where it will be, not where it is staged
        find "$VENV/bin" "$VENV/pyvenv.cfg" -type f -exec grep -Il -e "$VENV" {} + | while read -r file; do
            sed -i "s|$VENV|$PREFIX|g" "$file"
        done
    fi
    put "$HERE/docs/operations.md" "$DOCS/operations.md"
    put "$HERE/systemd/orchestrator.service" "$UNIT"
    put "$HERE/systemd/orchestrator.sysusers.conf" "$SYSUSERS"
    put "$HERE/systemd/orchestrator.tmpfiles.conf" "$TMPFILES"
    mkdir -p "$CONFIG"
    if [ ! -e "$CONFIG/orchestrator.yaml" ]; then
        sed "s|/opt/orchestrator|$PREFIX|g" "$HERE/config/orchestrator.yaml" >"$CONFIG/orchestrator.yaml"
        chmod 0640 "$CONFIG/orchestrator.yaml"
    fi
    cp "$HERE/config/orchestrator.schema.json" "$CONFIG/orchestrator.schema.json"
    if [ -z "$DESTDIR" ]; then
        mkdir -p /usr/local/bin
        for name in orchestratord orchestratorctl; do ln -sfn "$PREFIX/bin/$name" "/usr/local/bin/$name"; done
        systemd-sysusers orchestrator.conf
        chgrp orchestrator "$CONFIG" "$CONFIG/orchestrator.yaml"
        systemd-tmpfiles --create orchestrator.conf
        runuser -u orchestrator -- "$PREFIX/bin/orchestratord" --version >/dev/null ||
            die "the user orchestrator may not run $(readlink -f "$VENV/bin/python"): make install PYTHON=/usr/bin/python3, or another that all may run"
    else
        mkdir -p "$DESTDIR/usr/local/bin"
        for name in orchestratord orchestratorctl; do ln -sfn "$PREFIX/bin/$name" "$DESTDIR/usr/local/bin/$name"; done
    fi
    if here; then
        systemctl daemon-reload
        if systemctl is-active --quiet orchestrator; then
            echo "installed; the daemon runs as it was: \`orchestratorctl restart-daemon --keep-engines\` takes the new program"
        else
            echo "installed; \`make engine\` builds the engines' venv, \`systemctl enable --now orchestrator\` starts the daemon"
        fi
    else
        echo "installed under ${DESTDIR:-/}"
    fi
}

uninstall() {
    if [ -z "$DESTDIR" ] && [ "$(id -u)" -ne 0 ]; then
        die "root is needed: sudo make uninstall"
    fi
    if here && [ -e "$UNIT" ]; then
        systemctl disable --now --quiet orchestrator || true
    fi
    for name in orchestratord orchestratorctl; do
        link=$DESTDIR/usr/local/bin/$name
        if [ "$(readlink "$link" 2>/dev/null)" = "$PREFIX/bin/$name" ]; then rm -f "$link"; fi
    done
    rm -f "$UNIT" "$SYSUSERS" "$TMPFILES" "$CONFIG/orchestrator.schema.json"
    if ours; then rm -rf "$VENV"; fi
    rm -rf "$DESTDIR/var/cache/orchestrator-tmp"
    if here; then systemctl daemon-reload; fi
    echo "uninstalled; left as they are: $CONFIG, $DESTDIR/var/lib/orchestrator (models, keys, usage), $DESTDIR/var/log/orchestrator," \
        "$DESTDIR/var/cache/orchestrator (downloads), and the user and group orchestrator"
}

case ${1:-} in
install) install ;;
uninstall) uninstall ;;
*) die "usage: $0 install|uninstall" ;;
esac
