#!/usr/bin/env bash
# Builds the image from the Dockerfile and proves what the README says of it:   bash tests/docker/build_and_run.sh [cpu|gpu]
#
# Takes docker, podman or buildah, whichever is there. With buildah and no registry to pull the base from, it makes a
# stand-in with debootstrap (as root) and says so. Pip's settings on this machine (index, proxy, certificate) hold for the
# build too; no trace of them stays in the image. `gpu` builds from requirements-gpu.lock (several GB) and also checks that
# NVIDIA's libraries load and, with docker on a machine with a GPU, that TensorFlow sees it.
# shellcheck disable=SC2016  # what stands in single quotes is for the shell in the container
set -euo pipefail
cd "$(dirname "$0")/../.."

kind=${1:-cpu}
case $kind in
    cpu) lock=requirements.lock ;;
    gpu) lock=requirements-gpu.lock ;;
    *) echo "usage: $0 [cpu|gpu]" >&2 && exit 2 ;;
esac
base=${BASE:-$(sed -n 's/^ARG BASE=//p' Dockerfile)}
image=localhost/thaw-proof:$kind
uid=$(id -u)
[ "$uid" != 0 ] || uid=4242 # the image knows nobody of this number
scratch=$(mktemp -d)
container=""

pass() { echo "PASS  $*"; }
note() { echo "      $*"; }
fail() { echo "FAIL  $*" >&2 && exit 1; }

finish() { # finish(exit code)
    [ -z "$container" ] || buildah rm "$container" > /dev/null
    if [ "$1" = 0 ]; then rm -rf "$scratch"; else note "logs and outputs: $scratch" >&2; fi
}
trap 'finish $?' EXIT

if docker info > /dev/null 2>&1; then
    tool=docker
else
    tool=$(command -v podman || command -v buildah) || fail "neither a running docker nor podman nor buildah is here"
    tool=$(basename "$tool")
fi

# The build

pip_option() { # pip_option(name): its value on this machine, but for what lies in local folders
    python3 -m pip config list 2> /dev/null | sed -n "s/^[^=]*\.$1='\(.*\)'\$/\1/p" | tail -n 1 |
        tr ' ' '\n' | sed '/^file:/d' | paste -sd ' '
}

stand_in() { # makes a base like the one that cannot be pulled
    local suite=${base#*:} root
    suite=${suite%-slim}
    command -v debootstrap > /dev/null || fail "$base cannot be pulled, and debootstrap is not here"
    note "$base cannot be pulled; in its place stands debootstrap --variant=minbase $suite"
    base=localhost/thaw-stand-in:$suite
    if ! buildah inspect --type image "$base" > /dev/null 2>&1; then
        debootstrap --variant=minbase "$suite" "$scratch/root" http://deb.debian.org/debian > "$scratch/base.log"
        root=$(buildah from scratch)
        buildah add --quiet "$root" "$scratch/root" / > /dev/null
        buildah commit --quiet --rm "$root" "$base" > /dev/null
        rm -rf "$scratch/root"
    fi
}

build() { # build(context, log)
    local command=("$tool" build --isolation chroot --layers --format docker)
    [ "$tool" != docker ] || command=(env DOCKER_BUILDKIT=1 docker build --progress plain)
    "${command[@]}" "${build_options[@]}" --tag "$image" "$1" > "$2" 2>&1 || { tail -n 30 "$2" && fail "the build"; }
}

note "$tool, the $kind image, uid $uid, $(nproc) cores"
if [ "$tool" = buildah ] && ! buildah pull --quiet "$base" > /dev/null 2>&1; then stand_in; fi
{
    echo "[global]"
    for option in index-url extra-index-url trusted-host proxy timeout; do
        value=$(pip_option $option)
        [ -z "$value" ] || echo "$option = $value"
    done
} > "$scratch/pip.conf"
build_options=(--build-arg "BASE=$base" --build-arg "LOCK=$lock" --build-arg PREFETCH=efficientnet_lite0)
build_options+=(--secret "id=pip.conf,src=$scratch/pip.conf")
certificate=$(pip_option cert)
if [ -n "$certificate" ] && [ "$tool" != docker ]; then
    echo "cert = /run/machine-ca.pem" >> "$scratch/pip.conf"
    build_options+=(--volume "$certificate:/run/machine-ca.pem:ro")
fi

SECONDS=0
build . "$scratch/build.log"
pass "the image builds from $lock ($SECONDS s)"

mkdir "$scratch/context"
cp -a Dockerfile .dockerignore ./*.lock pyproject.toml README.md LICENSE helpers notebooks recipes "$scratch/context"
echo "name: other" > "$scratch/context/recipes/other.yaml"
SECONDS=0
build "$scratch/context" "$scratch/changed.log"
grep -A 2 'require-hashes' "$scratch/changed.log" | grep -qE '^(--> Using cache|#[0-9]+ CACHED)' ||
    fail "a changed recipe had all packages installed again"
pass "with one recipe changed, it builds from the cache ($SECONDS s)"
build . "$scratch/build.log"

# The container

configured() { # configured(setting): what the image says of it, as a command line
    local inspect=("$tool" image inspect)
    [ "$tool" != buildah ] || inspect=(buildah inspect --type image)
    "${inspect[@]}" "$image" | python3 -c '
import json, shlex, sys
found = json.load(sys.stdin)
image = found[0] if isinstance(found, list) else found["Docker"]
settings = image | image.get("Config", {}) | image.get("config", {})
setting = settings[sys.argv[1]]
print(shlex.join(setting["Test"][1:] if sys.argv[1] == "Healthcheck" else setting))' "$1"
}

run() { # run(uid, option of run ..., --, command ...): in the container and without network
    local user=$1 options=()
    shift
    while [ "$1" != -- ]; do options+=("$1") && shift; done
    shift
    if [ "$tool" = buildah ]; then
        container=${container:-$(buildah from "$image")}
        local command=(buildah run --isolation chroot --user "$user:$user" "${options[@]}" "$container" -- "$@")
        unshare --net sh -c 'ip link set lo up && exec "$@"' - "${command[@]}"
    else
        "$tool" run --rm --init --no-healthcheck --network none --user "$user:$user" "${options[@]}" "$image" "$@"
    fi
}

mkdir "$scratch/data" "$scratch/runs"
chmod 755 "$scratch"
[ "$(id -u)" != 0 ] || chown "$uid:$uid" "$scratch/data" "$scratch/runs"
volumes=(-v "$scratch/data:/thaw/data" -v "$scratch/runs:/thaw/runs")

run "$uid" -- pip check > /dev/null
pass "every package has the packages that it needs"

run "$uid" "${volumes[@]}" -- bash -euc '
    [ "$(id -u)" != 0 ]
    for place in / /thaw /thaw/helpers /thaw/notebooks /thaw/recipes /opt/venv; do [ ! -w "$place" ]; done
    for place in /thaw/data /thaw/runs /tmp "$HOME" "$KERAS_HOME"; do [ -w "$place" ]; done
    [ -z "$(find "$HOME" "$KERAS_HOME" -type d ! -writable)" ]
    [ "$(ls -Am /thaw)" = "LICENSE, README.md, data, helpers, notebooks, pyproject.toml, recipes, runs" ]
    [ -z "$(ls -A /thaw/runs)" ] && [ ! -e /root/.config/pip ] && [ ! -s /etc/pip.conf ] && [ ! -s /run/secrets/pip.conf ]'
pass "uid $uid reads the project and can write to data, runs, home and weights only; no history or settings are in the image"

if [ "$kind" = gpu ]; then
    run "$uid" -- python -c '
import ctypes
names = "cudart.so.12 cublas.so.12 cublasLt.so.12 cudnn.so.9 cufft.so.11 cusolver.so.11 cusparse.so.12 nccl.so.2 nvJitLink.so.12"
for name in names.split():
    ctypes.CDLL("lib" + name)'
    pass "the dynamic linker finds and loads the libraries of NVIDIA's wheels"
    if [ "$tool" = docker ] && command -v nvidia-smi > /dev/null; then
        run "$uid" --gpus all -- python -c 'import tensorflow as tf; assert tf.config.list_physical_devices("GPU")'
        pass "TensorFlow sees the GPU"
    else
        note "not proven: that TensorFlow sees a GPU, since there is none here"
    fi
fi

SECONDS=0
run "$uid" "${volumes[@]}" -- thaw run recipes/textile.yaml
[ -s "$scratch/runs/textile/report.html" ] || fail "there is no report"
pass "the textile recipe runs to its report, without network ($SECONDS s)"

[ -z "$(find "$scratch/runs" ! -user "$uid")" ] || fail "some outputs do not belong to uid $uid"
pass "every output belongs to uid $uid"

run "$uid" "${volumes[@]}" -- thaw run recipes/textile.yaml > "$scratch/second.log"
grep -q "nothing to do" "$scratch/second.log" || fail "the second run: $(cat "$scratch/second.log")"
pass "a second run finds its stages in the volume and has nothing to do"

run "$uid" "${volumes[@]}" -- python -c '
import pathlib, shutil, conformal_clip_data
images = pathlib.Path(conformal_clip_data.__path__[0]).rglob("global/*.jpg")
for path in sorted(images)[:3]:
    shutil.copy(path, "data")'
run "$uid" -v "$scratch/data:/thaw/data:ro" -v "$scratch/runs:/thaw/runs" -- thaw predict runs/textile data --csv runs/new.csv
[ "$(wc -l < "$scratch/runs/new.csv")" = 4 ] || fail "there are not three predictions"
pass "thaw predict classifies three images of the data volume, mounted read-only"

# Lab

run "$uid" -- env JUPYTER_TOKEN=secret LAB="$(configured Cmd)" HEALTH="$(configured Healthcheck)" bash -euc '
    status() { # status(token): what Lab answers to someone who lists the files
        python -c "
import sys, urllib.error, urllib.request
try:
    print(urllib.request.urlopen(\"http://127.0.0.1:8888/api/contents?token=\" + sys.argv[1]).status)
except urllib.error.HTTPError as error:
    print(error.code)" "$1"
    }
    start() { # start(log): Lab, until it is healthy
        eval "exec $LAB" > "$1" 2>&1 &
        for _ in $(seq 120); do eval "$HEALTH" 2> /dev/null && return || sleep 1; done
        cat "$1" && exit 1
    }
    if eval "$HEALTH" 2> /dev/null; then echo "healthy without Lab" && exit 1; fi
    start /tmp/lab.log
    [ "$(status secret) $(status wrong) $(status "")" = "200 403 403" ]
    kill $! && wait || true
    export JUPYTER_TOKEN=
    start /tmp/empty.log
    [ "$(status "")" = 403 ] && grep -q "token=[0-9a-f]\{48\}" /tmp/empty.log
    kill $! && wait || true'
pass "Lab starts; HEALTHCHECK tells it from no Lab; no token, a wrong or an empty one is refused"

if run 0 -- bash -c "timeout 60 $(configured Cmd)" > "$scratch/root.log" 2>&1; then fail "Lab ran as root"; fi
grep -q "Running as root" "$scratch/root.log" || fail "Lab as root: $(cat "$scratch/root.log")"
pass "Lab refuses to run as root"

if command -v hadolint > /dev/null; then
    hadolint Dockerfile
    pass "hadolint finds nothing in the Dockerfile"
fi
