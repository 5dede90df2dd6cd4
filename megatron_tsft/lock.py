"""One job at a time in a place: a lock file with a heartbeat, taken over from a holder that is
dead."""

import contextlib
import dataclasses
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_tsft.errors import UserError
from megatron_tsft.processes import state_of

BEAT = 10.0  # seconds between signs of life
STALE = 60.0  # seconds without one after which a holder that cannot be asked is dead
INSIDE = ".tsft_lock"  # the lock file of a folder that jobs write into, in it
LOOK = 0.5  # seconds between two looks at a lock that somebody holds


@dataclass(frozen=True)
class Holder:
    """Who holds a lock, as its file says.

    Attributes:
        token: of this holding, random.
        host: its name, for people.
        machine: tells hosts, their boots and the containers on them apart: only inside one of them
            does a process id say whether somebody lives.
        pid: the process.
        started: when the kernel started it, in its clock ticks; a number that was given to another
            process since has another.
        since: local time, for people.
        job: SLURM_JOB_ID, "" outside SLURM.
        restart: SLURM_RESTART_COUNT.
        step: SLURM_STEP_ID.
        inode: of the lock file; in a copy of the folder it has another.
    """

    token: str
    host: str
    machine: str
    pid: int
    started: str
    since: str
    job: str
    restart: str
    step: str
    inode: int

    @staticmethod
    def this_process(inode: int) -> "Holder":
        job, restart, step = _slurm()
        return Holder(
            token=secrets.token_hex(8),
            host=socket.gethostname(),
            machine=_machine(),
            pid=os.getpid(),
            started=state_of(os.getpid())[1],
            since=time.strftime("%Y-%m-%d %H:%M:%S"),
            job=job,
            restart=restart,
            step=step,
            inode=inode,
        )

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since}"

    def state(self) -> str:
        """ "alive", "stopped" (by a signal) or "dead"; "unknown" where it cannot be asked."""
        if self.machine != _machine():
            return "unknown"
        state, started = state_of(self.pid)
        return state if started == self.started or state == "dead" else "dead"

    def same_job(self) -> bool:
        """Whether this process is of the job that holds the lock, which SLURM started again: its
        former self is gone. Two steps of one start of a job may run side by side."""
        job, restart, step = _slurm()
        if not job or job != self.job:
            return False
        return restart != self.restart or not self.step or step == self.step


def _slurm() -> tuple[str, str, str]:
    """(job, its restarts, the step) that SLURM started this process in; "" outside."""
    names = {"SLURM_JOB_ID": "", "SLURM_RESTART_COUNT": "0", "SLURM_STEP_ID": ""}
    job, restart, step = (os.environ.get(name, usual) for name, usual in names.items())
    return job, restart, step


def _machine() -> str:
    """What makes a process id unique: host name, boot and process namespace."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    with contextlib.suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


class Lock:
    """A lock that this process holds; `hold` makes it."""

    def __init__(self, path: Path, what: str, holder: Holder):
        self._path, self._what, self._holder = path, what, holder
        self._ended, self._lost = threading.Event(), False
        self._thread = threading.Thread(target=self._beat, daemon=True, name="tsft-lock")
        self._thread.start()

    @property
    def token(self) -> str:
        """A name that no other holder has."""
        return self._holder.token

    @property
    def lost(self) -> bool:
        """Whether somebody else was seen to hold it now."""
        return self._lost

    def check(self) -> None:
        """Raise UserError where another process has taken the lock over: this one gave no sign of
        life for a minute, and may not write any more."""
        now = _read(self._path)
        if now is None or now[0] is None or now[0].token != self.token:
            self._lost = True
            by = f" by {now[0]}" if now is not None and now[0] is not None else ""
            raise UserError(
                f"{self._what} was taken over{by}, because this process gave no sign of life for"
                f" {STALE:.0f} seconds: it has stopped and written nothing more"
            )

    def release(self) -> None:
        """Give the lock back, in the process that took it."""
        if os.getpid() != self._holder.pid:
            return
        self._ended.set()
        self._thread.join()
        now = _read(self._path)
        if now is not None and now[0] is not None and now[0].token == self.token:
            with contextlib.suppress(OSError):
                self._path.unlink()

    def _beat(self) -> None:
        while not self._ended.wait(BEAT):
            now = _read(self._path)
            if now is None or (now[0] is not None and now[0].token != self.token):
                self._lost = True
                return
            with contextlib.suppress(OSError):  # a disk that does not answer is not another holder
                os.utime(self._path)


@contextlib.contextmanager
def hold_inside(folder: Path, what: str, **options: Any) -> Iterator[Lock]:
    """`hold` by a file in the folder itself, which is made where it is missing; one that was made
    and stays empty is removed again.

    Raises:
        UserError: somebody else holds it, or the folder cannot be written.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context(hold(folder / INSIDE, what, **options))
        except OSError as error:
            raise UserError(
                f"{what} cannot be written ({error.strerror}): name another folder, or mend this"
                " one"
            ) from error
        try:
            yield lock
        finally:
            stack.close()
            with contextlib.suppress(OSError):
                for path in made:
                    path.rmdir()


@contextlib.contextmanager
def hold(
    path: Path,
    what: str,
    *,
    patience: float = 0.0,
    stale: float = STALE,
    say: Callable[[str], None] = lambda text: None,
) -> Iterator[Lock]:
    """Inside, this process alone holds the lock.

    A holder that is dead on this machine, that is another start of this process' SLURM job, or that
    gives no sign of life for `stale` seconds, loses it. No clocks are compared: its file is
    watched.

    Args:
        path: the lock file; its folder is there.
        what: is locked, for messages.
        patience: seconds to wait for a holder that lives on this machine.
        stale: seconds to watch one that cannot be asked.
        say: called once with a line that says what is being waited for.

    Raises:
        UserError: somebody else holds it.
    """
    lock = Lock(path, what, _acquire(path, what, patience, stale, say))
    try:
        yield lock
    finally:
        lock.release()


def _acquire(
    path: Path, what: str, patience: float, stale: float, say: Callable[[str], None]
) -> Holder:
    begun = still = time.monotonic()
    watched: int | None = None
    said = False
    while (mine := _create(path)) is None:
        if (seen := _read(path)) is None:
            continue  # it was given back
        holder, mark, inode = seen
        now = time.monotonic()
        if watched != mark:
            watched, still = mark, now
        state = "unknown"
        if holder is not None:
            state = "dead" if holder.inode != inode else holder.state()
        over = state == "dead" or now - still >= stale
        if over or (state == "unknown" and holder is not None and holder.same_job()):
            if not _remove(path, holder, inode):
                time.sleep(LOOK / 10)
                if now - begun >= stale + BEAT:  # whoever was about to, was killed there
                    for left in path.parent.glob(f"{path.name}.*.old"):
                        left.unlink(missing_ok=True)
            continue
        if now - begun >= (patience if state == "alive" else stale):
            raise UserError(
                f"{what} is in use by {holder or 'a process that has not said its name'}: wait"
                " until it has ended, or name another folder"
            )
        if not said:
            say(f"{what} is in use by {holder}: waiting up to {stale:.0f} seconds for it to end")
            said = True
        time.sleep(LOOK)
    return mine


def _create(path: Path) -> Holder | None:
    """Make the file; None where it is there."""
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return None
    try:
        holder = Holder.this_process(os.fstat(descriptor).st_ino)
        os.write(descriptor, (json.dumps(dataclasses.asdict(holder)) + "\n").encode())
        os.fsync(descriptor)
    except BaseException:
        with contextlib.suppress(OSError):
            path.unlink()
        raise
    finally:
        os.close(descriptor)
    return holder


def _read(path: Path) -> tuple[Holder | None, int, int] | None:
    """(who holds it, its last sign of life, its inode); no holder where the file is not written
    yet or damaged; None where there is no file. It is opened, because a network disk looks after
    a file's times only then."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return None
    try:
        status, text = os.fstat(descriptor), os.read(descriptor, 1 << 16)
    finally:
        os.close(descriptor)
    try:
        holder = Holder(**json.loads(text))
    except (ValueError, TypeError):
        holder = None
    return holder, status.st_mtime_ns, status.st_ino


def _remove(path: Path, dead: Holder | None, inode: int) -> bool:
    """Remove the lock of a holder that is dead, and not one that somebody has taken since; False
    where another process is about to.

    Of all that want to remove this holder's lock, one at a time may: the one that made a file of
    its name. As long as the dead one's lock is there, nobody can make another.
    """
    name = dead.token if dead is not None else str(inode)
    claim = path.with_name(f"{path.name}.{name}.old")
    try:
        os.close(os.open(claim, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
    except FileExistsError:
        return False
    try:
        now = _read(path)
        if now is not None and now[0] == dead and now[2] == inode:
            path.unlink(missing_ok=True)
    finally:
        claim.unlink(missing_ok=True)
    return True
