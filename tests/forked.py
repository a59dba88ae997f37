"""Python programs in processes of their own that begin with torch imported, which takes two seconds: children of a process that has done
nothing but that. For what a fresh interpreter is wanted for: another environment, other modules, a limit, an end by a signal.

Not for what torch or the C library read while they are loaded: ``OMP_*``, ``MALLOC_*``, ``LD_PRELOAD``.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path


class _Parent:
    """The process that has imported torch, and forks a child for each program."""

    def __init__(self) -> None:
        command = [sys.executable, "-P", __file__]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._process = subprocess.Popen(command, text=True, start_new_session=True, **pipes)
        atexit.register(self.stop)

    def stop(self) -> None:
        """End it, and wait until it has."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def run(self, request: dict[str, object], timeout: float) -> int:
        """The child's status, negative where a signal ended it."""
        asked, told = self._process.stdin, self._process.stdout
        assert asked is not None and told is not None
        print(json.dumps(request), file=asked, flush=True)
        if not select.select([told], [], [], timeout)[0]:
            os.killpg(self._process.pid, signal.SIGKILL)
            raise subprocess.TimeoutExpired(str(request["arguments"]), timeout)
        return int(told.readline())


_parent: list[_Parent] = []


def python(
    arguments: Sequence[str],
    *,
    cwd: str | Path | None = None,
    env: Mapping[str, str] | None = None,
    timeout: float = 600,
) -> subprocess.CompletedProcess[str]:
    """As ``subprocess.run([sys.executable, *arguments], capture_output=True, text=True, ...)``: ``-P`` where it comes first, then ``-c``,
    ``-m`` or a file."""
    if not hasattr(os, "fork") or sys.platform == "darwin":
        command = [sys.executable, *arguments]
        return subprocess.run(command, cwd=cwd, env=env, timeout=timeout, capture_output=True, text=True)
    if not _parent:
        _parent.append(_Parent())
    with tempfile.TemporaryDirectory() as folder:
        said = [f"{folder}/out", f"{folder}/error"]
        environment = dict(os.environ if env is None else env)
        request = {"arguments": [*arguments], "cwd": str(cwd or Path.cwd()), "environment": environment, "said": said}
        try:
            status = _parent[0].run(request, timeout)
        except BaseException:
            _parent.clear()
            raise
        return subprocess.CompletedProcess([*arguments], status, *(Path(path).read_text() for path in said))


# ---- in the other process --------------------------------------------------------------------------------------------


def _become(arguments: list[str], cwd: str, environment: dict[str, str], said: list[str]) -> None:
    """What the interpreter that was asked for is before its program begins, and then the program."""
    for path, to in zip((os.devnull, *said), range(3), strict=True):
        opened = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        os.dup2(opened, to)
        os.close(opened)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    safe = arguments[0] == "-P"
    how, *rest = arguments[safe:]
    # sys.path as it is with -P, but for what this environment adds to it
    sys.path[:0] = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path not in ("", *sys.path)]
    if how == "-m":
        module, *sys.argv[1:] = rest
        sys.path[:0] = [] if safe else [cwd]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    elif how == "-c":
        code, *more = rest
        sys.argv[:] = ["-c", *more]
        sys.path[:0] = [] if safe else [""]
        exec(compile(code, "<string>", "exec"), sys.modules["__main__"].__dict__)
    else:
        sys.argv[:] = [how, *rest]
        sys.path[:0] = [] if safe else [str(Path(how).resolve().parent)]
        runpy.run_path(how, run_name="__main__")


def _requests() -> Iterator[str]:
    """Of the parent's: where a child leaves the loop, it must not read what is asked for next."""
    with contextlib.suppress(KeyboardInterrupt):
        while line := sys.stdin.readline():
            yield line


def main() -> None:
    """Fork for each line, and say how the child ended; a child returns from here as an interpreter that ends."""
    import torch  # noqa: F401

    for line in _requests():
        child = os.fork()
        if child == 0:
            sys.modules["__main__"] = types.ModuleType("__main__")
            _become(**json.loads(line))
            return
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
