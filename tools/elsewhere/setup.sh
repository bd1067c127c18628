#!/usr/bin/env bash
# Make .elsewhere/: other runtimes and servers for the tests, each in an environment of its own.
# `make elsewhere` runs it; `make fuzz` with the word fuzz, for the one that its loop runs in. What is already there stays; a changed version is installed anew.
set -euo pipefail
cd "$(dirname "$0")/../.."

ORT=(onnxruntime==1.15.1 numpy==1.26.4)
OPENVINO=(openvino==2026.4.1 numpy==2.4.6)
SERVE=(kserve==0.21.0 onnxruntime==1.32.0 onnx==1.23.2 numpy==2.4.6 pillow==13.0.0)
WEB=(onnxruntime-web@1.30.0)
TRITON=(nvidia-pytriton==0.7.0 tritonclient==2.73.0 onnxruntime==1.32.0 numpy==1.26.4)
SIGNING=(model-signing==1.1.1 pyopenssl==26.4.0 onnxruntime==1.32.0 onnx==1.23.2 numpy==2.4.6)
POSTGRESQL=(psycopg==3.3.9 psycopg-binary==3.3.9)
MLFLOW=(mlflow==3.17.2)
TRACKERS=(trackio==0.43.0 wandb==0.31.0)
FUZZ=(atheris==3.0.0 numpy==2.4.6 onnx==1.23.2 onnxruntime==1.32.0 pillow==13.0.0)
ARM64=(onnxruntime==1.22.1 numpy==2.2.6 flatbuffers==25.12.19 protobuf==6.33.0 packaging==25.0)

fail() { echo "elsewhere: $1" >&2; exit 1; }

# Whether .elsewhere/NAME holds just these packages.
ready() { local name=$1; shift; [ "$(cat ".elsewhere/$name/.ready" 2>/dev/null)" = "$*" ] && echo ".elsewhere/$name: there ($*)"; }

# The first of the interpreters that is one of the versions and can make virtual environments.
find_python() { # VERSIONS: 3.11 3.10
	local python version
	for python in .venv/bin/python python3 "${@/#/python}"; do
		version=$("$python" -c 'import sys, venv, ensurepip; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || continue
		case " $* " in *" $version "*) echo "$python"; return ;; esac
	done
	return 1
}

python_environment() { # NAME "VERSIONS" PACKAGES...
	local name=$1 versions=$2 python; shift 2
	if ready "$name" "$@"; then return; fi
	# shellcheck disable=SC2086 # a list of words
	python=$(find_python $versions) || fail "$name needs one of Python $versions with its venv module; install one (on Debian: apt install python3-venv)"
	install_into "$name" "$python" "$@"
	echo "$*" >".elsewhere/$name/.ready"
}

install_into() { # NAME INTERPRETER PACKAGES...
	local name=$1 python=$2; shift 2
	echo ".elsewhere/$name: installing $* with $("$python" --version)"
	"$python" -m venv --clear ".elsewhere/$name"
	".elsewhere/$name/bin/python" -m pip install -q --disable-pip-version-check --progress-bar off "$@" >".elsewhere/$name/pip.log" 2>&1 \
		|| fail "pip cannot install $*; all it said is in .elsewhere/$name/pip.log"
}

# Triton's Python backend loads the interpreter's shared library, which Debian's Python has and pyenv's lacks.
triton_environment() { # NAME PACKAGES...
	local name=$1 version server; shift
	if ready "$name" "$@"; then return; fi
	for version in 3.11 3.12 3.13; do
		"/usr/bin/python$version" -c "import venv, ensurepip, ctypes; ctypes.CDLL('libpython$version.so.1.0')" 2>/dev/null && break
		version=
	done
	if [ -z "$version" ]; then
		echo ".elsewhere/$name: left out, it needs Debian's Python with its shared library (apt install python3-venv libpython3-dev, or python3.11-venv libpython3.11)"
		return
	fi
	install_into "$name" "/usr/bin/python$version" "$@"
	server=".elsewhere/$name/lib/python$version/site-packages/pytriton/tritonserver"
	cp "$server/python_backend_stubs/$version/triton_python_backend_stub" "$server/backends/python/"
	echo "$*" >".elsewhere/$name/.ready"
}

node_environment() { # NAME PACKAGES...
	local name=$1; shift
	if ready "$name" "$@"; then return; fi
	node -e 'process.exit(parseInt(process.versions.node) < 18 ? 1 : 0)' 2>/dev/null && npm --version >/dev/null 2>&1 \
		|| fail "$name needs Node.js 18 or newer and npm; install them (on Debian: apt install nodejs npm)"
	echo ".elsewhere/$name: installing $* with Node.js $(node --version)"
	rm -rf ".elsewhere/$name"
	mkdir ".elsewhere/$name"
	npm install --prefix ".elsewhere/$name" --ignore-scripts --no-audit --no-fund "$@" >".elsewhere/$name/npm.log" 2>&1 \
		|| fail "npm cannot install $*; all it said is in .elsewhere/$name/npm.log"
	echo "$*" >".elsewhere/$name/.ready"
}

# Debian's Python and libraries for arm64 and QEMU's user mode, unpacked into a folder: nothing of the system changes.
arm64_environment() { # NAME PACKAGES...
	local name=$1 folder="$PWD/.elsewhere/$1" host version; shift
	if ready "$name" "$@"; then return; fi
	if ! command -v apt-get >/dev/null; then echo ".elsewhere/$name: left out, it needs Debian's apt-get"; return; fi
	echo ".elsewhere/$name: installing $* with Debian's Python for arm64 and QEMU"
	rm -rf "$folder"
	mkdir -p "$folder"/{state/lists/partial,cache/archives/partial,qemu,root,site}
	touch "$folder/state/status"
	host=$(dpkg --print-architecture)
	local arm64=(-o APT::Architecture=arm64 -o APT::Architectures::=arm64 -o APT::Architectures::="$host" -o Dir::State="$folder/state" -o Dir::Cache="$folder/cache"
		-o Dir::State::status="$folder/state/status" -o APT::Sandbox::User="$(id -un)" -o Debug::NoLocking=1 -qq)
	{
		apt-get "${arm64[@]}" update &&
		apt-get "${arm64[@]}" install --download-only --no-install-recommends -y python3-minimal libpython3-stdlib libstdc++6 &&
		find "$folder/cache/archives" -name '*.deb' -print0 | xargs -0 -I{} dpkg-deb -x {} "$folder/root" &&
		(cd "$folder/qemu" && apt-get "${arm64[@]}" download "qemu-user-static:$host" && dpkg-deb --fsys-tarfile ./*.deb | tar x --strip-components=3 ./usr/bin/qemu-aarch64-static)
	} >"$folder/apt.log" 2>&1 || fail "apt-get cannot fetch Python for arm64 and QEMU; all it said is in .elsewhere/$name/apt.log"
	version=$(basename "$(readlink "$folder/root/usr/bin/python3")")
	local platforms=(manylinux_2_28_aarch64 manylinux_2_27_aarch64 manylinux_2_17_aarch64 manylinux2014_aarch64)
	.elsewhere/onnxruntime/bin/python -m pip install -q --disable-pip-version-check --progress-bar off --no-deps --only-binary=:all: \
		--python-version "${version#python}" "${platforms[@]/#/--platform=}" --target "$folder/site" "$@" >"$folder/pip.log" 2>&1 \
		|| fail "pip cannot install $* for arm64; all it said is in .elsewhere/$name/pip.log"
	rm -rf "$folder"/{state,cache} "$folder"/qemu/*.deb
	printf '#!/bin/sh\nexec "%s" -L "%s" -E PYTHONPATH="%s" "%s" "$@"\n' "$folder/qemu/qemu-aarch64-static" \
		"$folder/root" "$folder/site" "$folder/root/usr/bin/$version" >"$folder/python"
	chmod +x "$folder/python"
	echo "$*" >"$folder/.ready"
}

# Debian's server, and a driver for the searches' workers, which run in .venv.
postgresql_environment() { # NAME PACKAGES...
	local name=$1; shift
	if ready "$name" "$@"; then return; fi
	if ! compgen -G "/usr/lib/postgresql/*/bin/initdb" >/dev/null; then
		echo ".elsewhere/$name: left out, it needs Debian's server (apt install postgresql)"
		return
	fi
	rm -rf ".elsewhere/$name"
	mkdir ".elsewhere/$name"
	.venv/bin/python -m pip install -q --disable-pip-version-check --no-deps --target ".elsewhere/$name/site" "$@" >".elsewhere/$name/pip.log" 2>&1 \
		|| fail "pip cannot install $*; all it said is in .elsewhere/$name/pip.log"
	echo "$*" >".elsewhere/$name/.ready"
}

mkdir -p .elsewhere
if [ "${1:-}" = fuzz ]; then
	python_environment fuzz "3.13 3.12 3.11" "${FUZZ[@]}"
	exit
fi
python_environment onnxruntime "3.11 3.10 3.9 3.8" "${ORT[@]}"
python_environment openvino "3.13 3.12 3.11 3.10" "${OPENVINO[@]}"
python_environment signing "3.13 3.12 3.11" "${SIGNING[@]}"
python_environment mlflow "3.13 3.12 3.11" "${MLFLOW[@]}"
python_environment trackers "3.13 3.12 3.11" "${TRACKERS[@]}"
triton_environment triton "${TRITON[@]}"
postgresql_environment postgresql "${POSTGRESQL[@]}"
python_environment serve "3.13 3.12 3.11" "${SERVE[@]}"
node_environment web "${WEB[@]}"
arm64_environment arm64 "${ARM64[@]}"
