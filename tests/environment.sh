# shellcheck shell=bash
# Sourced by the commands in tests/, in the project's folder: the Python environment of the tests comes first on
# PATH, and is made where it is missing or asks for something else by now. Needs Python 3.10 or newer with venv.

python=${PYTHON:-python3}
venv=${VENV_DIR:-.venv}
stamp=$venv/.requirements-dev

wanted=$("$python" --version && cat requirements-proxy.txt requirements-report.txt requirements-top.txt requirements-otel.txt requirements-dev.txt constraints-dev.txt)
if [[ ! -x $venv/bin/python || $(cat "$stamp" 2>/dev/null) != "$wanted" ]]; then
  "$python" -m venv "$venv" || {
    echo "${0##*/}: '$python -m venv' failed; on Debian: apt-get install python3-venv" >&2
    exit 1
  }
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -c constraints-dev.txt -r requirements-dev.txt
  printf '%s' "$wanted" >"$stamp"
fi
export PATH="$PWD/$venv/bin:$PATH"
if [[ $venv == /* ]]; then export PATH="$venv/bin:$PATH"; fi
