# Sourced by scripts/run and scripts/test: `set_up run` or `set_up dev` leaves a complete environment in .venv.
#
# .venv/.installed-KIND holds what was installed (this folder's path, pyproject.toml, constraints.txt, a checksum of the C++): equal
# means nothing to do.
# .venv/.unfinished exists while the set-up changes something: whoever finds it afterwards makes the environment anew.

say() { printf '%s: %s\n' "$NAME" "$*" >&2; }

set_up() {  # set_up KIND
    wanted="$ROOT
$(cat "$ROOT/pyproject.toml" "$ROOT/constraints.txt")
$(cat "$ROOT/CMakeLists.txt" "$ROOT"/kernels/cpu/native/* | cksum)"
    if is_ready "$1"; then return; fi
    find_python
    exec 9<"$ROOT/pyproject.toml"
    "$PYTHON" -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)' 2>/dev/null || {
        say "waiting for another set-up of this folder to finish"
        "$PYTHON" -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX)'
    }
    is_ready "$1" || install "$1"  # the other one may have done it meanwhile
    exec 9<&-
}

is_ready() {  # is_ready KIND
    [ -x "$VENV/bin/python" ] && [ -x "$VENV/bin/appliance" ] && [ ! -e "$VENV/.unfinished" ] &&
        [ -r "$VENV/.installed-$1" ] && [ "$(<"$VENV/.installed-$1")" = "$wanted" ]
}

find_python() {  # the first Python that will do, tested versions first, into PYTHON
    local candidate seen="" why
    for candidate in ${PYTHON:+"$PYTHON"} python3.12 python3.11 python3 python "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.1[12].*/bin/python; do
        command -v "$candidate" >/dev/null 2>&1 || continue
        why=$("$candidate" -c '
import sys
if sys.version_info < (3, 11): sys.exit(print("is %d.%d" % sys.version_info[:2]))
try: import ensurepip, venv
except ImportError as error: sys.exit(print("lacks " + str(error.name) + " (on Debian and Ubuntu: apt install python3-venv)"))
' 2>/dev/null) && [ -z "$why" ] && { PYTHON=$candidate; return; }
        seen+="
  $candidate ${why:-does not run}"
    done
    say "Python 3.11 or newer is needed (tested: 3.11, 3.12). Install it, or name one: PYTHON=/path/to/python $NAME${seen:+
Found, but of no use:$seen}"
    exit 1
}

install() {  # install KIND
    local rc=0 stopped="" told what=(-e .)
    if [ "$1" = dev ]; then
        what=(-e ".[dev]")
        if is_ready run; then  # all else is there, the extension too, which pip would build anew for minutes
            what=(-r .venv/dev.txt)
        fi
    fi
    trap 'stopped=129' HUP
    trap 'stopped=130' INT
    trap 'stopped=143' TERM
    if [ -e "$VENV/.unfinished" ] || ! "$VENV/bin/python" -c 'import sys, pip; assert sys.version_info >= (3, 11)' 2>/dev/null; then
        say "making .venv with $PYTHON ($("$PYTHON" --version 2>&1))"
        mkdir -p "$VENV"
        : >"$VENV/.unfinished"  # before the first deletion and until the end
        find "$VENV/" -mindepth 1 ! -name .unfinished -delete
        told=$("$PYTHON" -m venv "$VENV" 2>&1) || rc=$?
        [ -z "$stopped" ] || stop_here "$stopped"
        if [ "$rc" -ne 0 ]; then
            say "$PYTHON -m venv failed: $told"
            exit 1
        fi
    fi
    : >"$VENV/.unfinished"
    [ "${what[0]}" = -e ] || "$VENV/bin/python" -c '
import sys, tomllib
sys.stdout.writelines(f"{one}\n" for one in tomllib.load(open(sys.argv[1], "rb"))["project"]["optional-dependencies"]["dev"])
' "$ROOT/pyproject.toml" >"$VENV/dev.txt"
    say "pip install -c constraints.txt ${what[*]}   (once; the first time downloads some hundred MB and takes minutes)"
    (cd "$ROOT" && "$VENV/bin/python" -m pip install --disable-pip-version-check --no-input -c constraints.txt "${what[@]}") >&2 || rc=$?
    if [ "$rc" -ne 0 ]; then
        [ -z "$stopped" ] || stop_here "$stopped"
        [ "$rc" -ge 128 ] || rm "$VENV/.unfinished"  # pip refused and put all back; a stopped pip did not
        say "the installation failed (pip's exit status is $rc); run this again when the cause is mended"
        exit 1
    fi
    (cd / && "$VENV/bin/python" -c 'import kernels.cpu._native') 2>/dev/null || [ -n "$stopped" ] ||
        say "note: the native CPU kernels were not built (is there a C++ compiler? on Debian and Ubuntu: apt install g++); torch's operators" \
            "compute instead, several times slower. After mending that: rm -r $VENV/.installed-* and run this again"
    printf '%s\n' "$wanted" >"$VENV/.installed-run"
    [ "$1" = run ] || cp "$VENV/.installed-run" "$VENV/.installed-dev"
    rm "$VENV/.unfinished"
    trap - HUP INT TERM
    [ -z "$stopped" ] || stop_here "$stopped"
}

stop_here() {  # stop_here STATUS
    say "stopped; run this again to go on"
    exit "$1"
}
