#!/bin/sh
# Make .venv and install the project with its development tools into it, once.
#
# What was installed is recorded in .venv/.installed, last of all: nothing is done again while it
# matches pyproject.toml, and an installation that was interrupted is redone from an empty .venv.
# Environment: PYTHON (which Python), PIP_ARGS (passed to pip install).
set -eu
cd "$(dirname "$0")/.."

fail() {
    echo "error: $*" >&2
    exit 1
}

venv=.venv
done_mark=$venv/.installed
busy_mark=$venv/.installing

here=$(pwd)
want="$(cksum < pyproject.toml) $here"

# Two of these at a time would undo each other. The lock is on a file that is there anyway.
exec 9< pyproject.toml
if command -v flock > /dev/null; then flock 9; fi

if [ -f "$done_mark" ] && [ "$(cat "$done_mark")" = "$want" ] && "$venv/bin/python" -c '' 2> /dev/null; then
    exit 0
fi

[ "$(uname -s)" = Linux ] ||
    fail "this runs on Linux; on $(uname -s) use Docker: see 'macOS and Windows' in README.md"
case $(uname -m) in
    x86_64 | aarch64 | arm64) ;;
    *) fail "torch has no packages for $(uname -m); x86-64 or arm64 is needed" ;;
esac

new_enough='import sys; sys.exit(sys.version_info < (3, 11))'
python=
for candidate in ${PYTHON:-python3.13 python3.12 python3.11 python3}; do
    # A name on PATH may still not run (a version manager's shim), so each is tried.
    if "$candidate" -c "$new_enough" 2> /dev/null; then
        python=$candidate
        break
    fi
done
if [ -z "$python" ]; then
    if [ -n "${PYTHON:-}" ]; then
        fail "PYTHON=$PYTHON is not a Python 3.11 or newer that runs"
    fi
    fail "no Python 3.11 or newer found (tried python3.13, python3.12, python3.11, python3);" \
        "install one, or name it: make PYTHON=/path/to/python3"
fi
"$python" -c 'import ensurepip, venv' 2> /dev/null ||
    fail "$python cannot make virtual environments;" \
        "install its venv package (on Debian and Ubuntu: apt install $("$python" -c \
            'import sys; print("python%d.%d-venv" % sys.version_info[:2])'))"

if [ -f "$busy_mark" ]; then
    echo "the last installation did not end: starting over"
    rm -rf "$venv"
elif [ -f "$done_mark" ] && ! grep -qF " $here" "$done_mark"; then
    echo "this folder was moved since the installation, which holds its path: starting over"
    rm -rf "$venv"
fi
if "$venv/bin/python" -c "$new_enough" 2> /dev/null; then
    rm -f "$done_mark"
    : > "$busy_mark"
else
    echo "making $venv with $("$python" -c 'import sys; print(sys.executable, sys.version.split()[0])')"
    rm -rf "$venv"
    mkdir "$venv"
    : > "$busy_mark" # before anything else: this can be interrupted too
    "$python" -m venv "$venv" || fail "$python -m venv failed; its message is above"
fi
echo "installing (once, some minutes: README.md says how much)"
# PIP_ARGS is a list of options, so it is split into words here.
# shellcheck disable=SC2086
"$venv/bin/python" -m pip install --disable-pip-version-check ${PIP_ARGS:-} -e '.[dev]' ||
    fail "pip failed; its message is above ('make venv' tries again; PIP_ARGS holds options for pip)"
rm -f "$busy_mark"
printf '%s\n' "$want" > "$done_mark"
echo "installed into $venv: $(du -sh "$venv" | cut -f1)"
