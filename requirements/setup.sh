#!/bin/sh
# Finds a Python for setup.py beside it, which does the work, or says what this machine lacks.
# PYTHON=/path/to/python chooses one. A finished .venv answers for itself, in a tenth of a second.
here=$(dirname "$0")
[ -z "$PYTHON" ] && "$here/../.venv/bin/python" "$here/setup.py" --check "$@" 2>/dev/null && exit
faults=""
for python in ${PYTHON:-python3.11 python3.12 python3.13 python3.14 python3 python}; do
    command -v "$python" >/dev/null 2>&1 || continue
    fault=$("$python" -c '
import sys
if sys.version_info < (3, 11):
    sys.exit("is %d.%d, and 3.11 is the oldest that works" % sys.version_info[:2])
for name in ("venv", "ensurepip", "ssl", "sqlite3", "ctypes", "bz2", "lzma"):
    try:
        __import__(name)
    except ImportError:
        sys.exit("has no module %r" % name)
' 2>&1) && exec "$python" "$here/setup.py" "$@"
    faults="$faults
  $(command -v "$python"): $(printf '%s\n' "$fault" | tail -n 1)"
done
{
    echo "setup: no usable Python 3.11 or newer:${faults:-" none of ${PYTHON:-python3.11 ... python3} is on the PATH."}"
    echo "  -> Install one with its standard library complete. Debian and Ubuntu keep parts in packages of"
    echo "     their own: apt-get install python3 python3-venv. Built from source, Python leaves out the"
    echo "     modules whose C headers were missing. Then run make again, or name it: make setup PYTHON=..."
} >&2
exit 1
