"""The program that stands inside the sandbox: it takes programs one by one and forks for each.

`sandbox.py` hands this file's text to a bare Python inside bubblewrap; standard library only, Python 3.8 or later.
A fork gets one program, one file for each of its outputs, and no way to this process: its system calls are an
allow-list (no processes, sockets, signals to others or new files), so what it prints is all that it can say.
"""
from __future__ import annotations

import atexit
import ctypes
import errno
import gc
import json
import os
import platform
import resource
import signal
import struct
import sys
import threading
import time
import types

GROUP = 50  # inputs that one fork runs before the next fork takes over; each needs two open files
ALLOW, KILL, ERROR = 0x7FFF0000, 0x80000000, 0x00050000  # SECCOMP_RET_*
CLONE_THREAD = 0x10000
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column below, AUDIT_ARCH_*
CALLS = {  # system calls a program may make: numbers on x86_64, aarch64
    "read": (0, 63), "write": (1, 64), "readv": (19, 65), "writev": (20, 66), "pread64": (17, 67), "pwrite64": (18, 68),
    "close": (3, 57), "fstat": (5, 80), "newfstatat": (262, 79), "stat": (4, None), "lstat": (6, None),
    "open": (2, None), "openat": (257, 56), "access": (21, None), "faccessat": (269, 48), "faccessat2": (439, 439),
    "readlink": (89, None), "readlinkat": (267, 78), "statx": (332, 291), "lseek": (8, 62), "getdents64": (217, 61),
    "getcwd": (79, 17), "dup": (32, 23), "dup2": (33, None), "dup3": (292, 24), "poll": (7, None), "ppoll": (271, 73),
    "select": (23, None), "pselect6": (270, 72), "mmap": (9, 222), "mprotect": (10, 226), "munmap": (11, 215),
    "mremap": (25, 216), "madvise": (28, 233), "brk": (12, 214), "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "sigaltstack": (131, 132), "futex": (202, 98),
    "set_robust_list": (273, 99), "rseq": (334, 293), "set_tid_address": (218, 96), "sched_yield": (24, 124),
    "sched_getaffinity": (204, 123), "getpid": (39, 172), "gettid": (186, 178), "getppid": (110, 173),
    "getuid": (102, 174), "geteuid": (107, 175), "getgid": (104, 176), "getegid": (108, 177), "uname": (63, 160),
    "sysinfo": (99, 179), "getrusage": (98, 165), "times": (100, 153), "clock_gettime": (228, 113),
    "clock_getres": (229, 114), "clock_nanosleep": (230, 115), "nanosleep": (35, 101), "gettimeofday": (96, 169),
    "time": (201, None), "getrandom": (318, 278), "exit": (60, 93), "exit_group": (231, 94), "arch_prctl": (158, None),
    "restart_syscall": (219, 128),
}
ARGUMENTS = {  # allowed for these values of one argument only: (numbers, index of the argument, values)
    "fcntl": ((72, 25), 1, (0, 1, 2, 3, 4, 1030)),  # duplicate and flags; not F_SETOWN, which can signal others
    "ioctl": ((16, 29), 1, (0x5401, 0x5413, 0x5450, 0x5451)),  # terminal questions, close-on-exec
    "prlimit64": ((302, 261), 0, (0,)),  # its own limits, nobody else's
}
SERVER = {  # what this process needs besides and its forks lose
    "kill": (62, 129), "wait4": (61, 260), "memfd_create": (319, 279), "rt_sigtimedwait": (128, 137),
    "prctl": (157, 167), "clone": (56, 220),
}
CLONE3 = (435, 435)
RETURN, LOAD, EQUALS, BITS = 0x06, 0x20, 0x15, 0x45  # BPF instructions


def call_filters(machine: str) -> tuple:
    """Two seccomp programs for a machine name: for this process, and on top of it for each fork.

    The first allows what the lists name and nothing else, the second takes away what only this process needs; all
    the checking is in the first, since the second is put in place once a program. KeyError: no numbers are known.
    """
    column, arch = MACHINES[machine]
    deny, allow = (RETURN, 0, 0, ERROR | errno.EPERM), (RETURN, 0, 0, ALLOW)
    number, start = (LOAD, 0, 0, 0), [(LOAD, 0, 0, 4), (EQUALS, 1, 0, arch), (RETURN, 0, 0, KILL)]
    first = [*start, number]
    for numbers in [*CALLS.values(), *SERVER.values()]:
        if numbers[column] is not None:
            first += [(EQUALS, 0, 1, numbers[column]), allow]
    for numbers, index, values in ARGUMENTS.values():
        block = [(LOAD, 0, 0, 16 + 8 * index)]
        for value in values:
            block += [(EQUALS, 0, 1, value), allow]
        first += [(EQUALS, 0, len(block) + 1, numbers[column]), *block, deny]
    first += [(EQUALS, 0, 1, CLONE3[column]), (RETURN, 0, 0, ERROR | errno.ENOSYS), deny]  # libc then uses clone
    second = [number]
    for name, numbers in SERVER.items():
        if name != "clone":
            second += [(EQUALS, 0, 1, numbers[column]), deny]
    second += [(EQUALS, 0, 3, SERVER["clone"][column]), (LOAD, 0, 0, 16), (BITS, 1, 0, CLONE_THREAD), deny, allow]
    return tuple(b"".join(struct.pack("=HBBI", *line) for line in lines) for lines in (first, second))


def confine(program: bytes) -> None:
    """Put this process under a seccomp program for good; OSError where the kernel refuses."""
    buffer = ctypes.create_string_buffer(program, len(program))
    head = struct.pack("@HP", len(program) // 8, ctypes.addressof(buffer))
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_ulong)
    if libc.prctl(38, 1, None, 0, 0) or libc.prctl(22, 2, head, 0, 0):  # no new privileges; filter
        raise OSError(ctypes.get_errno(), "the kernel takes no seccomp filter")


def limit(cpu: int, limits: dict) -> None:
    """Lower this process's limits: seconds of CPU, bytes of address space, bytes of each output, threads."""
    resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu + 1))  # SIGXCPU says what it was; SIGKILL if it is ignored
    for name, value in (("AS", limits["memory_bytes"]), ("FSIZE", limits["output_bytes"]),
                        ("NPROC", limits["threads"] + 8), ("CORE", 0)):
        resource.setrlimit(getattr(resource, "RLIMIT_" + name), (value, value))


def execute(code) -> str:
    """Run a compiled program once as a fresh `__main__` on files 0 and 1; "ok" or what ended it, in one line."""
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    sys.argv = [""]
    sys.stdin = sys.__stdin__ = open(0, encoding="utf-8", errors="replace", closefd=False)
    sys.stdout = sys.__stdout__ = open(1, "w", encoding="utf-8", newline="\n", closefd=False)
    message = "ok"
    for step in (lambda: exec(code, main.__dict__), finish):
        try:
            step()
        except SystemExit as stop:
            if stop.code not in (None, 0):
                message = "exit code %r" % (stop.code,)
        except BaseException as error:  # whatever a model's program raises is its result
            message = type(error).__name__ + ": " + str(error)
            break
    return " ".join(message.split())[:200]


def finish() -> None:
    """What Python does at its end: wait for threads, run exit functions, flush."""
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.__stdout__):
        if stream is not None and not stream.closed:
            stream.flush()


def inside(source: str, files: list, report: int, errors: int, cpu: int, limits: dict, program: bytes) -> None:
    """The fork: confine itself, then run the program on each (input, output) pair of files, a line of report each."""
    try:
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        os.dup2(errors, 2)
        os.dup2(files[0][0], 0)
        os.dup2(files[0][1], 1)  # the pipes to the world outside are gone now
        limit(cpu, limits)
        confine(program)
        code, message = None, ""
        try:
            code = compile(source, "program.py", "exec", dont_inherit=True)
        except (SyntaxError, ValueError, MemoryError, RecursionError, OverflowError) as error:
            message = " ".join((type(error).__name__ + ": " + str(error)).split())[:200]
        for stdin, stdout in files:
            os.dup2(stdin, 0)
            os.dup2(stdout, 1)
            os.write(report, (message or execute(code)).encode("utf-8", "replace") + b"\n")
        os._exit(0)
    finally:
        os._exit(70)


def wait(pid: int, wall: float):
    """(status, seconds of CPU, whether it was ended for its wall time) of a fork."""
    deadline = time.monotonic() + wall
    while True:
        done, status, usage = os.wait4(pid, os.WNOHANG)
        left = deadline - time.monotonic()
        if not done and left <= 0:
            os.kill(pid, signal.SIGKILL)
            _, status, usage = os.wait4(pid, 0)
        if done or left <= 0:
            return status, usage.ru_utime + usage.ru_stime, not done
        signal.sigtimedwait({signal.SIGCHLD}, left)


def file_with(text: str) -> int:
    """A file in memory that holds `text`, at its start."""
    number, data = os.memfd_create("file"), text.encode("utf-8", "replace")
    while data:
        data = data[os.write(number, data):]
    os.lseek(number, 0, os.SEEK_SET)
    return number


def read_text(number: int, most: int) -> str:
    return os.pread(number, most, 0).decode("utf-8", "replace")


def run_group(source, inputs, cpu, wall, limits, program):
    """One fork over some inputs: (outputs, first error, seconds of CPU, whether later inputs may run).

    Outputs end with the input that ended the fork, where one did; None stands for a failed one.
    """
    files = [(file_with(text), file_with("")) for text in inputs]
    report, errors = file_with(""), file_with("")
    pid = os.fork()
    if pid == 0:
        inside(source, files, report, errors, cpu, limits, program)
    status, used, late = wait(pid, wall)
    lines = read_text(report, 256 * len(inputs)).split("\n")[:-1][:len(inputs)]
    go_on = len(lines) == len(inputs)
    if not go_on:
        ended_by = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        if late or ended_by == signal.SIGXCPU or (ended_by == signal.SIGKILL and used >= cpu):
            lines.append("time limit")
        elif ended_by:
            lines.append("ended by " + signal.Signals(ended_by).name)
        else:
            code = os.WEXITSTATUS(status)
            go_on = code == 0  # os._exit(0): a good end of this input
            lines.append("ok" if go_on else "exit code %d" % code)
    outputs, error = [], ""
    for (_, stdout), line in zip(files, lines):
        if os.fstat(stdout).st_size >= limits["output_bytes"]:
            line = "output limit"
        outputs.append(read_text(stdout, limits["output_bytes"]) if line == "ok" else None)
        error = error or ("" if line == "ok" else line)
    for number in [report, errors, *(number for pair in files for number in pair)]:
        os.close(number)
    return outputs, error, used, go_on


def run(request: dict, limits: dict, program: bytes) -> dict:
    """Run one program on all its inputs; after a failure that ended a fork, the rest is None."""
    inputs, cpu = request["inputs"], request["cpu_seconds"]
    deadline, spent = time.monotonic() + request["wall_seconds"], 0.0
    outputs, error = [], ""
    while len(outputs) < len(inputs):
        rest = inputs[len(outputs):]
        left = max(0.0, deadline - time.monotonic())
        found, failure, used, go_on = run_group(request["code"], rest[:GROUP], max(1, int(cpu - spent)), left, limits,
                                                program)
        if failure and not error:
            error = "input %d: %s" % (len(outputs) + found.index(None) + 1, failure)
        outputs += found
        spent += used
        if not go_on:
            outputs += [None] * (len(inputs) - len(outputs))
    return {"outputs": outputs, "error": error}


def receive():
    """One message: four bytes of length, then JSON; None at the end of the stream."""
    size, data = None, b""
    while size is None or len(data) < size:
        part = os.read(0, (4 if size is None else size) - len(data))
        if not part:
            return None
        data += part
        if size is None and len(data) == 4:
            size, data = struct.unpack(">I", data)[0], b""
    return json.loads(data)


def send(message: dict) -> None:
    data = json.dumps(message).encode()
    data = struct.pack(">I", len(data)) + data
    while data:
        data = data[os.write(1, data):]


def serve(limits: dict) -> None:
    """Answer requests until the stream ends; the first message says whether a fork can be confined here."""
    sys.path[:] = [entry for entry in [*sys.path, limits["folder"]] if entry]
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    if platform.machine() not in MACHINES:
        return send({"refused": "no list of system calls for %s" % platform.machine()})
    for name in ("bisect", "collections", "functools", "heapq", "itertools", "math", "re", *limits["modules"]):
        __import__(name)  # once here, not once in each fork
    mine, program = call_filters(platform.machine())
    try:
        confine(mine)
    except OSError as error:
        return send({"refused": str(error)})
    gc.freeze()  # forks then share these pages
    test = run({"code": "import os\ntry: os.fork()\nexcept PermissionError: print(os.getuid())", "inputs": [""],
                "cpu_seconds": 5, "wall_seconds": 60}, limits, program)
    if test["outputs"][0] in (None, "", "0\n"):
        return send({"refused": "a fork cannot be confined: %s" % (test["error"] or "no seccomp, or it is root")})
    send({"ready": platform.python_version()})
    while True:
        request = receive()
        if request is None:
            return None
        send(run(request, limits, program))


if __name__ == "__main__":
    serve(json.loads(sys.argv[1]))
