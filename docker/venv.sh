#!/bin/sh
# Makes /venv from /lock and /wheels while an image is built: see the Dockerfile beside this file.
set -eu
python3.11 -m venv --without-pip /build
python3.11 -m venv --without-pip /venv
export PIP_NO_INDEX=1 PIP_FIND_LINKS=/wheels PIP_NO_DEPS=1 PIP_REQUIRE_HASHES=1
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore PIP_PROGRESS_BAR=off
set -- /wheels/pip-*.whl
python3.11 "$1/pip" --python /build/bin/python install --quiet -r /lock/build.txt
pip() { /build/bin/python -m pip "$@"; }
pip --python /venv/bin/python install --quiet --no-compile --only-binary=:all: -r /lock/wheels.txt
site=/venv/lib/python3.11/site-packages
# Source comes last: one of those (deepspeed) looks at the PyTorch that it will run with.
if [ -s /lock/source.txt ]; then
    PYTHONPATH=$site pip wheel --quiet --no-build-isolation --no-binary=:all: -w /built -r /lock/source.txt
    PIP_REQUIRE_HASHES=0 pip --python /venv/bin/python install --quiet --no-compile /built/*.whl
fi
# Tests and headers are a sixth of the whole. What pip notes of where a wheel lay differs between machines.
find /venv/lib -type d \( -name tests -o -name __pycache__ \) -prune -exec rm -rf {} +
find /venv/lib -name direct_url.json -delete
rm -rf $site/torch/include $site/torch/test $site/pyarrow/include
# Nothing can write byte code at run time, so it is written here. It is never compared with its source, whose
# time the build sets. Some files are of other Pythons: they do not compile and are never imported.
python3.11 -m compileall -q -j 0 --invalidation-mode unchecked-hash /venv/lib >/dev/null || true
rm -rf /build /built
