"""A PostgreSQL server of the tests' own: made in a folder of its own, stopped, killed and started again at will."""

import glob
import os
import select
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from pathlib import Path

USER, PASSWORD = "loka", "se/cr@et"
# Whom the server runs as where the tests run as root, which PostgreSQL refuses.
UNPRIVILEGED = ("postgres", "nobody")


def find_binaries() -> Path | None:
    """Return the folder of the newest server that is installed; None where there is none."""
    found = sorted(glob.glob("/usr/lib/postgresql/*/bin/postgres"), key=lambda path: float(Path(path).parts[4]))
    on_path = shutil.which("postgres")
    return Path(found[-1]).parent if found else Path(on_path).resolve().parent if on_path else None


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class Server:
    """Listens on a port of this machine, asks for a password, and keeps its data in a temporary folder.

    Without fsync: nothing here outlives the machine, and what the system has taken outlives a killed process.
    """

    def __init__(self, binaries: Path) -> None:
        self._binaries = binaries
        self.port = _free_port()
        self.folder = Path(tempfile.mkdtemp(prefix="loka-postgresql-"))
        self.data = self.folder / "data"
        self._as: dict[str, object] = {}
        if os.geteuid() == 0:
            user = next(name for name in UNPRIVILEGED if _user_exists(name))
            self._as = {"user": user, "extra_groups": []}
            shutil.chown(self.folder, user)
        secret = self.folder / "password"
        secret.write_text(PASSWORD)
        secret.chmod(0o644)
        self._run(
            *("initdb", "--pgdata", self.data, "--username", USER, "--pwfile", secret, "--auth", "scram-sha-256"),
            *("--encoding", "UTF8", "--no-locale", "--no-sync"),
        )
        with (self.data / "postgresql.conf").open("a", encoding="utf-8") as settings:
            settings.write(
                f"listen_addresses = '127.0.0.1'\nport = {self.port}\nunix_socket_directories = ''\n"
                "fsync = off\nmax_connections = 50\nshared_buffers = 16MB\nlc_messages = 'C'\n"
            )
        self.start()

    @property
    def url(self) -> str:
        """The address with its password, as a user writes it."""
        secret = PASSWORD.replace("/", "%2F").replace("@", "%40")
        return f"postgresql://{USER}:{secret}@127.0.0.1:{self.port}/postgres"

    def start(self) -> None:
        """Start, and wait until it answers; a server that was killed leaves its last processes a moment."""
        give_up = time.monotonic() + 30
        while self._run("pg_ctl", "start", "-w", "-D", self.data, "-l", self.folder / "log", check=False).returncode:
            assert time.monotonic() < give_up, (self.folder / "log").read_text()
            time.sleep(0.1)

    def stop(self, mode: str = "fast") -> None:
        """Stop: `fast` ends transactions first, `immediate` does not."""
        self._run("pg_ctl", "stop", "-w", "-D", self.data, "-m", mode)

    def kill(self) -> None:
        """`kill -9`."""
        os.kill(int((self.data / "postmaster.pid").read_text().split()[0]), signal.SIGKILL)

    def remove(self) -> None:
        """Stop, if it runs, and leave nothing behind."""
        self._run("pg_ctl", "stop", "-w", "-D", self.data, "-m", "immediate", check=False)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _run(self, program: str, *arguments: object, check: bool = True) -> subprocess.CompletedProcess[str]:
        # Not with pipes: the server would inherit them, and reading to their end would wait for it.
        with (self.folder / f"{program}.log").open("w+") as log:
            command = [str(self._binaries / program), *map(str, arguments)]
            done = subprocess.run(command, stdout=log, stderr=log, cwd="/", check=False, **self._as)
            log.seek(0)
            assert not (check and done.returncode), f"{program} failed: {log.read()}"
            return done


def _user_exists(name: str) -> bool:
    return any(line.split(":")[0] == name for line in Path("/etc/passwd").read_text().splitlines())


class Cable:
    """What lies between a client and a server, and can be cut at the worst moment: while a transaction is committed.

    `cut = "before"` loses the next COMMIT on its way to the server, `cut = "after"` the server's answer to it.
    """

    def __init__(self, server_port: int) -> None:
        self._server_port = server_port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self.cut = ""
        self.cuts = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._carry, args=(client,), daemon=True).start()

    def _carry(self, client: socket.socket) -> None:
        with client, socket.create_connection(("127.0.0.1", self._server_port)) as server:
            other, committing = {client: server, server: client}, False
            while True:
                for ready in select.select([client, server], [], [])[0]:
                    data = ready.recv(2**16)
                    committing = committing or (ready is client and b"COMMIT" in data and bool(self.cut))
                    if not data or (committing and (ready is server or self.cut == "before")):
                        self.cuts += committing
                        self.cut = "" if committing else self.cut
                        return
                    other[ready].sendall(data)

    def close(self) -> None:
        """Take no more connections."""
        self._listener.close()
