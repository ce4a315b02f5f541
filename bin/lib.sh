# Shell functions that bin/quickstart and bin/test share.

make_venv() {
    python=${PYTHON:-python3}
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        echo "Python 3.11 or newer is needed; set PYTHON to one" >&2
        exit 1
    fi
    [ -x .venv/bin/python ] || "$python" -m venv .venv
}

# install_package EXTRAS: an editable install, done again only when pyproject.toml has changed.
install_package() {
    stamp=.venv/.installed-$(printf %s "$1" | tr ',' '-')
    if [ ! -e "$stamp" ] || [ pyproject.toml -nt "$stamp" ]; then
        echo "Installing (llama.cpp is compiled the first time, which takes some minutes) ..." >&2
        .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable ".${1:+[$1]}" >&2
        touch "$stamp"
    fi
}
