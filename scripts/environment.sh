# Makes a virtual environment with an editable install, or leaves one alone that is up to date. Sourced, not run.

find_python() {
    local name
    for name in "${PYTHON:-}" python3.13 python3.12 python3.11 python3 python; do
        if [ -n "$name" ] && command -v "$name" >/dev/null && "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$name"
            return
        fi
    done
    echo "error: Python 3.11 or newer is needed and none was found: install one, or set PYTHON to it" >&2
    return 1
}

# A stamp over everything the install depends on: strict editable installs must be renewed when a module is added.
environment_stamp() {
    { cat pyproject.toml constraints.txt; find model plugins exporter runtime scripts -name '*.py' | LC_ALL=C sort; echo "$1"; } | cksum
}

make_environment() {
    local folder=$1 extra=$2 stamp
    stamp=$(environment_stamp "$extra")
    # The editable install is links into build/, which people delete.
    if [ "$(cat "$folder/stamp" 2>/dev/null)" = "$stamp" ] && "$folder/bin/python" -c 'import mythos_edge.model.errors' 2>/dev/null; then
        return
    fi
    echo "== installing mythos-edge[$extra] into $folder (the first time this takes a few minutes)"
    [ -x "$folder/bin/python" ] || "$(find_python)" -m venv "$folder"
    "$folder/bin/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$extra]"
    # The reference, which train_text trains. It asks for transformers and datasets, which nothing here uses.
    "$folder/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps open-mythos==0.5.0
    echo "$stamp" >"$folder/stamp"
}

# The last lines of a script that made a bundle: how to use it.
say_where_to_go_on() {
    local bundle=$1
    shift
    echo
    echo "To go on, from this folder (or after: . .venv-demo/bin/activate, as mythos-edge everywhere):"
    echo "  ./mythos-edge generate $bundle $*"
    echo "  ./mythos-edge inspect $bundle"
    echo "  ./mythos-edge serve $bundle     (OpenAI's API, and a page that shows the depth of every token)"
    echo "  ./mythos-edge --help"
}

# ONNX Runtime for browsers, and what drives one: tests run both under node. A machine without npm does without them.
make_web() {
    local folder=tests/web
    if ! command -v npm >/dev/null; then
        echo "note: npm is not here, so the tests of onnxruntime-web and of the page are skipped: install node to run them"
        return
    fi
    if ! cmp -s "$folder/package-lock.json" "$folder/node_modules/stamp"; then
        (cd "$folder" && npm ci --ignore-scripts --no-audit --no-fund --loglevel=error)
        cp "$folder/package-lock.json" "$folder/node_modules/stamp"
    fi
}
