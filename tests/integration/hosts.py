"""Separate hosts on one machine, made of Linux namespaces: for tests of what crosses from one host to another.

A host has an address on a network of its own, a mount, UTS and PID namespace, a home, /tmp and /dev/shm that no other
host sees, and its own SSH server. All of them see this machine's Python and the folder that stands for network
storage. The network lives in the laptop's namespace. So nothing of it is on the machine itself: when the processes
end, however they do, the kernel removes the rest.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

REPOSITORY = Path(__file__).parents[2]
SHARED = "/mnt/shared"
HOME = "/mnt/home"
PYTHON = Path(sys.prefix).resolve()
"""The virtual environment of this process, which all hosts see under this path."""
NETWORK = "10.77.0"

INIT = r"""
set -euo pipefail
name=$1 home=$2 shared=$3 repository=$4 kept=("${@:5}")
hostname "$name"
mount -t tmpfs tmpfs /mnt
mkdir -p /mnt/home /mnt/storage /mnt/shared "${kept[@]/#//mnt/kept}"
mount --bind "$home" /mnt/home
mount --bind "$shared" /mnt/storage
mount --bind /mnt/storage /mnt/shared
for folder in "${kept[@]}"; do mount --bind "$folder" "/mnt/kept$folder"; done
for file in passwd shadow hosts; do mount --bind "$home/.etc/$file" "/etc/$file"; done
mount --bind /dev/null /etc/resolv.conf  # a name server out of reach would be waited for, 10 s a question
for hidden in "$repository" /tmp /run /dev/shm; do mount -t tmpfs tmpfs "$hidden"; done
chmod 1777 /tmp /dev/shm
for folder in "${kept[@]}"; do  # what lay under a hidden folder comes back
    mkdir -p "$folder"
    mount --bind "/mnt/kept$folder" "$folder"
done
mkdir /run/sshd
ip link set lo up
echo up
exec /usr/sbin/sshd -D -e -f /mnt/home/.etc/sshd_config
"""

SSHD = f"""\
HostKey {HOME}/.etc/host_key
AuthorizedKeysFile {HOME}/.ssh/authorized_keys
StrictModes no
UsePAM no
PasswordAuthentication no
PermitRootLogin yes
MaxSessions 100
MaxStartups 100
"""


def missing() -> str | None:
    """Why hosts cannot be made on this machine; None where they can."""
    if os.geteuid() != 0:
        return "separate hosts need root"
    where = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    absent = [
        package
        for program, package in (("ip", "iproute2"), ("sshd", "openssh-server"), ("rsync", "rsync"))
        if shutil.which(program, path=where) is None
    ]
    if absent:
        return f"separate hosts need Debian's {' '.join(absent)}"
    tried = subprocess.run(["unshare", "--net", "--mount", "--uts", "--pid", "--fork", "true"], capture_output=True)
    return None if tried.returncode == 0 else f"separate hosts need namespaces: {tried.stderr.decode().strip()}"


@dataclass
class Host:
    """One host: a folder that is its disk, and while it is on, a process that is its init."""

    name: str
    address: str
    home: Path
    """Its home's place on this machine."""
    shared: Path
    _init: subprocess.Popen[str] | None = field(default=None, init=False)
    _log: IO[str] | None = field(default=None, init=False)

    def install(self, key: Path) -> None:
        """Writes its disk: users, names as Debian's installer leaves them, and who may log in."""
        etc, ssh = self.home / ".etc", self.home / ".ssh"
        etc.mkdir(parents=True)
        ssh.mkdir()
        users = [line.split(":") for line in Path("/etc/passwd").read_text().splitlines()]
        moved = [[*user[:5], HOME, "/bin/bash"] if user[0] == "root" else user for user in users]
        (etc / "passwd").write_text("".join(":".join(user) + "\n" for user in moved))
        (etc / "shadow").write_text("".join(f"{user[0]}:*:19000:0:99999:7:::\n" for user in users))
        (etc / "hosts").write_text(f"127.0.0.1 localhost\n127.0.1.1 {self.name}\n")
        (etc / "sshd_config").write_text(SSHD)
        shutil.copy(key, etc / "host_key")
        shutil.copy(key, ssh / "id_ed25519")
        shutil.copy(key.with_suffix(".pub"), ssh / "authorized_keys")
        (self.home / ".bashrc").write_text("case $- in *i*) ;; *) return ;; esac\n")

    def power_on(self) -> None:
        kept = [str(PYTHON), str(Path(sys.base_prefix).resolve())]
        self._log = (self.home / ".etc" / "log").open("a")
        self._init = subprocess.Popen(
            [
                *("setpriv", "--pdeathsig", "KILL"),  # it goes when this process goes
                *("unshare", "--net", "--mount", "--uts", "--pid", "--fork", "--mount-proc", "--kill-child"),
                *("bash", "-c", INIT, "init", self.name, self.home, self.shared, REPOSITORY, *kept),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        assert self._init.stdout is not None
        if self._init.stdout.readline() != "up\n":
            raise RuntimeError(f"{self.name} does not start:\n{(self.home / '.etc' / 'log').read_text()}")

    def power_off(self) -> None:
        """At once, as by pulling the plug: every process is gone, and with them /tmp and /dev/shm."""
        if self._init is None:
            return
        self._init.kill()
        self._init.wait()
        assert self._init.stdout is not None and self._log is not None
        self._init.stdout.close()
        self._log.close()
        self._init = None

    @property
    def pid(self) -> int:
        """Of its init, as this machine sees it."""
        assert self._init is not None, f"{self.name} is off"
        return int(Path(f"/proc/{self._init.pid}/task/{self._init.pid}/children").read_text())

    def command(self, command: Sequence[str], folder: str = HOME) -> dict[str, Any]:
        """What runs a command there as its user would, for subprocess.run and Popen."""
        inside = ["bash", "-ic", f'cd {shlex.quote(folder)} && exec "$@"', "bash", *command]
        path = f"{PYTHON}/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        return {
            "args": ["nsenter", "--target", str(self.pid), "--all", "--", *inside],
            "env": {"HOME": HOME, "USER": "root", "PATH": path, "TERM": "dumb", "LANG": "C.UTF-8"},
            "stdin": subprocess.DEVNULL,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.PIPE,
            "text": True,
        }

    def run(self, *command: str, folder: str = HOME, within_s: float = 600) -> str:
        """Runs a command there to its end and returns what it printed to stdout.

        Raises:
            AssertionError: it failed; with all that it printed.
        """
        done = subprocess.run(**self.command(command, folder), timeout=within_s)
        assert done.returncode == 0, f"{self.name}: {shlex.join(command)}\n{done.stdout}\n{done.stderr}"
        return str(done.stdout)

    def processes(self) -> dict[int, str]:
        """The command lines of all that runs there, by their numbers on this machine."""
        there, found = os.readlink(f"/proc/{self.pid}/ns/pid"), {}
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if os.readlink(process / "ns" / "pid") == there:
                    found[int(process.name)] = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
        return found


class Network:
    """A laptop and hosts that reach each other."""

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self.shared = folder / "shared"
        self.shared.mkdir()
        key = folder / "key"
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
        self.laptop, *self.hosts = (
            Host(name, f"{NETWORK}.{number}", folder / name, self.shared)
            for number, name in enumerate(["laptop", *names], start=1)
        )
        for host in (self.laptop, *self.hosts):
            host.install(key)

    @contextmanager
    def up(self) -> Iterator[None]:
        with ExitStack() as on:
            on.callback(self.laptop.power_off)
            self.laptop.power_on()
            _ip(self.laptop, "link add lan type bridge")
            _ip(self.laptop, f"addr add {self.laptop.address}/24 dev lan")
            _ip(self.laptop, "link set lan up")
            for host in self.hosts:
                on.callback(host.power_off)
                self.power_on(host)
            yield

    def power_on(self, host: Host) -> None:
        host.power_on()
        hardware = f"02:00:00:00:00:{host.address.rpartition('.')[2]:>02}"
        _ip(self.laptop, f"link add {host.name} type veth peer name eth0 address {hardware} netns {host.pid}")
        _ip(self.laptop, f"link set {host.name} master lan up")
        _ip(host, f"addr add {host.address}/24 dev eth0")
        _ip(host, "link set eth0 up")
        _ip(host, f"route add default via {self.laptop.address}")

    def power_off(self, host: Host) -> None:
        _ip(self.laptop, f"link del {host.name}")
        host.power_off()

    def cut(self, host: Host) -> None:
        """Pulls its network cable: what is sent is lost, and nobody is told; network storage is out of reach."""
        _ip(self.laptop, f"link set {host.name} down")
        host.run("umount", "--lazy", SHARED)

    def mend(self, host: Host) -> None:
        host.run("mount", "--bind", "/mnt/storage", SHARED)
        _ip(self.laptop, f"link set {host.name} up")


def _ip(host: Host, command: str) -> None:
    """Only its network is entered: the command may name another host's process."""
    ip = shutil.which("ip", path="/usr/sbin:/sbin:/usr/bin:/bin") or "ip"
    subprocess.run(["nsenter", "--target", str(host.pid), "--net", ip, *command.split()], check=True)
