"""Serve one file of a bundle over HTTP by the Open Inference Protocol (v2), to try a bundle and for tests.

`python -m export.serve BUNDLE` runs it, without torch, on KServe's Python SDK. By default it listens only on this machine, and it has
neither encryption nor authentication: on a network, use Triton, KServe or OpenVINO Model Server with the same files.
"""

import argparse
import signal
import socket
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

from export.bundle.read import NAME, read_bundle
from export.bundle.sandbox import vet
from export.command.arguments import at_least
from export.command.main import run
from export.errors import BundleError
from export.onnx_file.model_file import inspect
from export.runtime.providers import add_arguments, asked
from export.runtime.session import open_session

INSTALL = (
    "serving needs KServe's Python SDK: python -m pip install kserve, "
    "in a separate environment (docs/bundle.md), because it needs an older protobuf"
)
KEEP_ALIVE = 65  # seconds that an idle connection stays open: KServe's value, longer than most proxies'


def serve(arguments: argparse.Namespace) -> int:
    """Print the address and serve until a signal comes.

    Raises BundleError if ONNX Runtime cannot load the file or the address is not free.
    """
    if find_spec("kserve") is None:
        raise BundleError(INSTALL)
    bundle = read_bundle(arguments.bundle, inspect=vet)
    for number in (signal.SIGINT, signal.SIGTERM):
        # Used again at the end: uvicorn finishes running requests, then re-raises the signal.
        signal.signal(number, leave)
    if not NAME.fullmatch(bundle.name):
        raise BundleError(f"bundle.json: name: must be lower-case letters, digits, - and _, got {bundle.name!r}")
    path = bundle.file(arguments.file)
    runs_in = asked(arguments)
    sessions = [open_session(path, runs_in=runs_in, threads=arguments.threads) for _ in range(arguments.instances)]
    listener = listen(arguments.host, arguments.port)
    # Imported here, because KServe takes seconds to import and may not be installed.
    import uvicorn

    from export.serving.open_inference import SessionModel, application

    app = application(SessionModel(bundle.name, sessions, inspect(path), max_batch=arguments.max_batch))
    config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_keep_alive=KEEP_ALIVE)
    host, port = listener.getsockname()[:2]
    where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    class Server(uvicorn.Server):  # type: ignore[misc] # is not installed where this is checked
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            """Say the address once requests and signals are heard."""
            await super().startup(sockets)
            sys.stdout.write(f"{path.name} is served at http://{where}/v2/models/{bundle.name}; Ctrl-C stops it\n")
            sys.stdout.flush()

    Server(config).run(sockets=[listener])
    return 0


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket; with port 0 the system chooses a free one."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        raise BundleError(f"{host}:{port}: cannot listen there ({error}): name another --host or --port") from error


def leave(*_: object) -> NoReturn:
    """Exit without a traceback."""
    sys.exit(0)


def main() -> int:
    """Serve one file of a bundle over HTTP by the Open Inference Protocol (v2), by default only on this machine."""
    # KServe parses sys.argv itself when it is imported, and could take abbreviations for its own options.
    parser = argparse.ArgumentParser(prog="python -m export.serve", description=main.__doc__, allow_abbrev=False)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--file", metavar="NAME", help="a file of the bundle, by default the one to serve")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 accepts the network")
    parser.add_argument("--port", type=at_least(0), default=8080, help="0 chooses a free one")
    parser.add_argument("--threads", type=at_least(0), default=1, help="CPU threads per run; 0 is all cores")
    parser.add_argument(
        "--instances",
        type=at_least(1),
        default=1,
        help="sessions; requests that meet in one share it, and a plugin's with one thread runs them one after the other",
    )
    add_arguments(parser)
    parser.add_argument("--max-batch", type=at_least(1), default=8, help="most images per request")
    return run(parser, serve)


if __name__ == "__main__":
    sys.exit(main())
