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

# The page of `parrot view` is tried in a real browser: the system's Chromium, or the one that playwright keeps.
find_chromium() {
    command -v chromium || command -v chromium-browser || command -v google-chrome ||
        .venv/bin/python -c 'if 1:
            import os, sys
            from playwright.sync_api import sync_playwright
            with sync_playwright() as playwright:
                sys.exit(not os.path.exists(playwright.chromium.executable_path))'
}

install_chromium() {
    find_chromium >/dev/null && return
    echo "Installing Chromium for the tests of parrot view ..." >&2
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        { apt-get update --quiet && apt-get install --quiet --yes --no-install-recommends chromium; } >/dev/null || true
    else
        .venv/bin/python -m playwright install chromium >&2 || true
    fi
    find_chromium >/dev/null && return
    echo "Chromium is needed to test the page of parrot view; install it, as with: sudo apt-get install chromium" >&2
    exit 1
}
