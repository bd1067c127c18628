"""A PostgreSQL server of Debian's, for a search's workers."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from elsewhere.files import ENVIRONMENTS

BIN = Path("/usr/lib/postgresql")
SITE = ENVIRONMENTS / "postgresql" / "site"


def use_driver() -> None:
    """Let this process import the driver, where it is."""
    sys.path.append(str(SITE))


@contextmanager
def server() -> Iterator[str]:
    """Run a server that is reached through a socket alone, and give the URL of its database."""
    bin_folder = max(BIN.glob("*/bin"))
    user = ["runuser", "-u", "postgres", "--"] if os.getuid() == 0 else []  # the server refuses to be root
    folder = Path(tempfile.mkdtemp(prefix="postgresql-"))  # a socket's path has 107 characters at most
    if user:
        shutil.chown(folder, "postgres")
    run = [*user, str(bin_folder / "pg_ctl"), "-D", str(folder / "data"), "-s", "-w", "-l", str(folder / "log")]
    initdb = [
        *user,
        str(bin_folder / "initdb"),
        "-D",
        str(folder / "data"),
        "-U",
        "postgres",
        "-A",
        "trust",
        "--no-sync",
    ]
    subprocess.run(initdb, check=True, capture_output=True, cwd="/")
    try:
        subprocess.run([*run, "-o", f"-k {folder} -c listen_addresses= -c fsync=off", "start"], check=True, cwd="/")
        yield f"postgresql://postgres@/postgres?host={folder}"
    finally:
        subprocess.run([*run, "-m", "immediate", "stop"], check=False, cwd="/")
        shutil.rmtree(folder)
