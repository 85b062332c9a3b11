"""Database servers of a test's own: each listens on a socket in a folder and keeps its data there."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest


class DatabaseServer:
    """A server that listens on a socket in a folder of its own.

    Args:
        folder: Of its socket, data and log; nothing else may be in it.
        make: The command that makes its data folder.
        serve: The command that serves it.
        url: SQLAlchemy's, of a database in which `tune` may make its tables.
        ready: What the server writes to its log when it can be used.
    """

    def __init__(self, folder: Path, make: list[str], serve: list[str], url: str, ready: str) -> None:
        self.folder, self.url, self._serve, self._ready = folder, url, serve, ready
        made = subprocess.run(make, capture_output=True, text=True, cwd="/")
        if made.returncode:
            pytest.skip(f"{make[0]} fails here: {made.stderr.strip()[-200:]}")
        self.start()

    def start(self) -> None:
        with (self.folder / "log").open("w") as log:
            self._server = subprocess.Popen(self._serve, stdout=log, stderr=log, cwd="/")
        end = time.monotonic() + 60
        while self._ready not in (said := (self.folder / "log").read_text()):
            assert self._server.poll() is None, said
            assert time.monotonic() < end, said
            time.sleep(0.05)

    def stop(self) -> None:
        if self._server.poll() is None:
            self._server.send_signal(self.ENDS_AT_ONCE)
            self._server.wait(30)

    ENDS_AT_ONCE = signal.SIGINT


class PostgreSQL(DatabaseServer):
    def __init__(self, folder: Path) -> None:
        programs = sorted(Path("/usr/lib/postgresql").glob("*/bin")) or [Path("/usr/bin")]
        if not (programs[-1] / "initdb").exists():
            pytest.skip("needs a PostgreSQL: apt-get install postgresql")
        prefix: list[str] = []
        if os.geteuid() == 0:  # it refuses to run as root
            if shutil.which("setpriv") is None:
                pytest.skip("PostgreSQL refuses to run as root, and there is no setpriv")
            shutil.chown(folder, "nobody")
            prefix = ["setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups"]
            for place in [folder, *folder.parents]:  # the other user must reach it
                if place.owner() == "root" and place.stat().st_mode & 0o001 == 0:
                    place.chmod(place.stat().st_mode | 0o011)
        data = str(folder / "data")
        make = [str(programs[-1] / "initdb"), "-D", data, "-A", "trust", "-U", "tester", "--no-sync", "-E", "UTF8"]
        serve = [str(programs[-1] / "postgres"), "-D", data, "-k", str(folder), "-c", "listen_addresses=", "-F"]
        url = f"postgresql+psycopg2://tester@/postgres?host={folder}"
        super().__init__(folder, [*prefix, *make], [*prefix, *serve], url, "ready to accept")


class MySQL(DatabaseServer):
    """MariaDB, which is the MySQL of Debian."""

    ENDS_AT_ONCE = signal.SIGKILL  # it waits for its clients at any other

    def __init__(self, folder: Path) -> None:
        install, server = shutil.which("mariadb-install-db"), shutil.which("mariadbd", path="/usr/sbin:/usr/bin")
        if install is None or server is None:
            pytest.skip("needs a MariaDB: apt-get install mariadb-server-core")
        user = ["--user=root"] if os.geteuid() == 0 else []
        place = ["--no-defaults", *user, f"--datadir={folder / 'data'}"]
        make = [install, *place, "--auth-root-authentication-method=normal"]  # no password; it makes a database "test"
        serve = [server, *place, f"--socket={folder / 'socket'}", "--skip-networking", "--character-set-server=utf8mb4"]
        # Quick, and yet what was committed survives the kill of the server.
        serve += ["--innodb-flush-log-at-trx-commit=2", "--innodb-doublewrite=0"]
        url = f"mysql+pymysql://root@localhost/test?unix_socket={folder / 'socket'}"
        super().__init__(folder, make, serve, url, "ready for connections")


SERVERS = {"postgresql": ("psycopg2", PostgreSQL), "mysql": ("pymysql", MySQL)}
