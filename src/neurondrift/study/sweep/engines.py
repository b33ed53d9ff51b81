"""What runs the points of a sweep: one after the other on this machine, or many at once on Ray.

An engine begins points and tells which have ended; what order they come in and what is tried again is the driver's.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from neurondrift.base.errors import ConfigError, ResourceError
from neurondrift.base.files import make_folder
from neurondrift.study.sweep.folder import SweepFolder
from neurondrift.study.sweep.settings import EngineSection

#: Seconds that an address has to answer.
PATIENCE = 5.0
SETTINGS_FRAME = 4
#: Seconds that a stopped point has to end by itself.
GRACE = 30.0


@dataclass(frozen=True)
class Ended:
    """A point that is no longer at work: its exit code, or None where its process died, and how."""

    name: str
    code: int | None
    how: str = ""


class Engine(Protocol):
    """Begins points of a sweep and tells of those that ended."""

    def has_room(self, running: int) -> bool:
        """Whether another point can be begun beside so many."""
        ...

    def begin(self, name: str) -> None:
        """Begin a point."""
        ...

    def ended(self) -> list[Ended]:
        """Points that have ended since the last call."""
        ...

    def close(self) -> None:
        """Stop what is at work, and give up what is held."""
        ...


class LocalEngine:
    """One point after the other, each in a process of its own: what one does to its process harms no other."""

    def __init__(self, folder: SweepFolder, settings: EngineSection) -> None:
        self.folder, self.settings = folder, settings
        self._process: tuple[str, subprocess.Popen[bytes]] | None = None

    def has_room(self, running: int) -> bool:
        return running == 0

    def begin(self, name: str) -> None:
        command = [sys.executable, "-m", "neurondrift.study.sweep.point", str(self.folder.root), name]
        make_folder(self.folder.log(name).parent)
        # As Ray does: the last bits of results depend on how many threads there are.
        cpus = self.settings.num_cpus
        threads = {} if cpus is None else {"OMP_NUM_THREADS": str(max(1, int(cpus)))}
        with self.folder.log(name).open("ab") as log:
            # In a group of its own: Ctrl-C reaches it from us alone. Its standard input ends when we do.
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=threads | os.environ,
            )
        self._process = (name, process)

    def ended(self) -> list[Ended]:
        if self._process is None or (code := self._process[1].poll()) is None:
            return []
        name, process = self._process
        self._close_input(process)
        self._process = None
        return [Ended(name, code) if code >= 0 else Ended(name, None, _signal_name(-code))]

    def close(self) -> None:
        if self._process is None:
            return
        _, process = self._process
        self._process = None
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGINT)
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        self._close_input(process)

    def _close_input(self, process: subprocess.Popen[bytes]) -> None:
        with contextlib.suppress(OSError):
            if process.stdin is not None:
                process.stdin.close()


class RayEngine:
    """Points as tasks of Ray, each in a worker of its own that sees the CPUs and GPUs that it asked for.

    The sweep's folder must be where every machine of the cluster sees it, under the same path.
    """

    def __init__(self, folder: SweepFolder, settings: EngineSection, *, on_cpu: bool = False) -> None:
        self.folder = folder
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        if settings.address is not None:
            require_answer(settings.address)
        self._ray = _connect(settings)
        self._tasks: dict[Any, str] = {}
        there = self._ray.cluster_resources()
        gpus = settings.num_gpus
        if gpus is None:
            gpus = 0.0 if on_cpu or there.get("GPU", 0) < 1 else 1.0
        cpus = _cpus(settings)
        asked = {"CPU": cpus, "GPU": gpus}
        for kind, amount in asked.items():
            if there.get(kind, 0) < amount:
                self.close()
                raise ResourceError(
                    f"The Ray cluster has fewer {kind}s than one point asks for",
                    received=f"{amount:g} asked, {there.get(kind, 0):g} there",
                    fix=f"lower num_{kind.lower()}s, or give Ray more",
                )
        fits = min(int(there[kind] / amount) for kind, amount in asked.items() if amount > 0)
        self.room = min(fits, settings.workers or fits)
        # Ray gives a task as many threads (OMP_NUM_THREADS) as it has whole CPUs, at least one.
        self._remote = self._ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=0, max_calls=1)(_task)

    def has_room(self, running: int) -> bool:
        return running < self.room

    def begin(self, name: str) -> None:
        task = self._remote.remote(str(self.folder.root.resolve()), name, os.getcwd())
        self._tasks[task] = name

    def ended(self) -> list[Ended]:
        if not self._tasks:
            return []
        ready, _ = self._ray.wait(list(self._tasks), num_returns=len(self._tasks), timeout=0)
        return [self._ended(self._tasks.pop(task), task) for task in ready]

    def _ended(self, name: str, task: Any) -> Ended:
        try:
            return Ended(name, int(self._ray.get(task)))
        except self._ray.exceptions.RayTaskError as error:  # of ours: the study's own are in its status
            return Ended(name, 1, str(error).strip().rpartition("\n")[2])
        except self._ray.exceptions.RayError as error:
            return Ended(name, None, type(error).__name__)

    def close(self) -> None:
        for task in self._tasks:
            with contextlib.suppress(Exception):
                self._ray.cancel(task, force=True)
        self._tasks = {}
        self._ray.shutdown()


def _cpus(settings: EngineSection) -> float:
    return settings.num_cpus or 1


def _task(root: str, name: str, place: str) -> int:
    """A point in a worker of Ray."""
    if os.path.isdir(place):
        os.chdir(place)  # paths of data are relative to where the sweep was begun
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from neurondrift.study.sweep.point import do_point

    return do_point(Path(root), name)


def _connect(settings: EngineSection) -> Any:
    """Ray, connected to the cluster of an address, or to one of its own on this machine."""
    if importlib.util.find_spec("ray") is None:
        raise ConfigError(
            "The engine ray needs the package ray",
            received="ray",
            fix="pip install 'neurondrift[sweep]', or --engine local",
        )
    import ray

    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    try:
        if settings.address is None:
            cpus = math.ceil(_cpus(settings) * settings.workers) if settings.workers else None
            ray.init(address="local", include_dashboard=False, num_cpus=cpus, **quiet)
        else:
            ray.init(address=settings.address, **quiet)
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        raise _unanswered(settings.address or "local", str(error).partition("\n")[0]) from error
    return ray


def require_answer(address: str) -> None:
    """Raise `ResourceError` where nothing answers at an address within `PATIENCE` seconds; `ConfigError` for none."""
    if address in ("auto", "local"):
        return
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigError(
            "This is no address of a Ray cluster", received=address, allowed="host:port, ray://host:port, auto"
        )
    try:
        with socket.create_connection((host, int(port)), timeout=PATIENCE) as connection:
            is_ray = os.environ.get("RAY_USE_TLS", "0") == "1" or _speaks_grpc(connection)
    except OSError as error:
        raise _unanswered(address, str(error)) from error
    if not is_ray:
        raise _unanswered(address, "what listens there does not speak Ray's protocol")


def _speaks_grpc(connection: socket.socket) -> bool:
    """Whether a server greets as HTTP/2 asks (RFC 9113, 3.4): Ray itself waits for minutes for one that does not."""
    connection.settimeout(PATIENCE)
    connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, SETTINGS_FRAME, 0, 0, 0, 0, 0]))
    head = b""
    while len(head) < 4 and (more := connection.recv(9)):
        head += more
    return head[3:4] == bytes([SETTINGS_FRAME])


def _unanswered(address: str, why: str) -> ResourceError:
    return ResourceError(
        f"No Ray cluster answers ({why})",
        received=address,
        fix="start one with ray start --head, name its address, or leave --address out to use this machine",
    )


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def wait_a_little() -> None:
    """Between two looks at what has ended."""
    time.sleep(0.5)
