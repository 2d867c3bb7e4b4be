"""The sandbox against programs that try to get out, to disturb others, or to claim what they did not compute.

Where bwrap is installed these tests fail if it does not work; they are skipped only where it is absent.
"""
from __future__ import annotations

import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import pytest

from m2rl_core import sandbox
from m2rl_core.domains import programs
from m2rl_core.sandbox import Limits, Outcome, Program, Sandbox, SandboxUnavailable
from m2rl_core.sandbox.interpreter import STEPS, Interpreter

ADD = "print(sum(map(int, input().split())))"
needs_bwrap = pytest.mark.skipif(shutil.which("bwrap") is None,
                                 reason="bwrap is not installed: apt-get install bubblewrap")


@pytest.fixture(scope="module")
def box():
    with Sandbox() as opened:
        yield opened


def run(box, code, *inputs) -> Outcome:
    return box.run([Program(code, inputs or ("1 2\n",))])[0]


# --- what programs get


@needs_bwrap
@pytest.mark.parametrize(("code", "outputs"), [
    (ADD, ("3\n", "15\n")),
    ("import sys\nprint(sys.stdin.read().split()[-1])", ("2\n", "8\n")),
    ("import os\nos.write(1, os.read(0, 3))", ("1 2", "7 8")),
    ("print(5)\nraise SystemExit", ("5\n", "5\n")),  # printed output survives the exit
    ("import sys\nprint(5)\nsys.exit(0)", ("5\n", "5\n")),
    ("import os\nprint(5, flush=True)\nos._exit(0)", ("5\n", "5\n")),  # ends the fork: the next input gets another
    ("import threading\nthreading.Thread(target=print, args=(1,)).start()", ("1\n", "1\n")),
    ("import atexit\natexit.register(print, 'end')", ("end\n", "end\n")),
    ("if __name__ == '__main__':\n    print('main')", ("main\n", "main\n")),
    ("try:\n    seen\nexcept NameError:\n    print('fresh')\nseen = 1", ("fresh\n",
    "fresh\n")),  # globals of another run
    ("import __main__\nprint(hasattr(__main__, 'serve'))", ("False\n", "False\n")),
    ("from dataclasses import dataclass\n@dataclass\nclass A:\n    b: int\nprint(A(1).b)", ("1\n", "1\n")),
])
def test_programs_run_as_they_would_outside(box, code, outputs):
    """Catches lost output at an exit, input that does not arrive, and state that leaks from input to input."""
    assert run(box, code, "1 2\n", "7 8") == Outcome(outputs)


@needs_bwrap
@pytest.mark.parametrize(("code", "error"), [
    ("print(", "SyntaxError"), ("print(1)\n1/0", "ZeroDivisionError"), ("import sys\nsys.exit(3)", "exit code 3"),
    ("import os\nos._exit(4)", "exit code 4"), ("import os\nos.abort()", ""), ("print(input(), input())", "EOFError"),
    ("raise type('E', (Exception,), {'__str__': lambda self: 1 / 0})", "exit code 70"), ("x" * 10 + "\0", "null bytes"),
    ("def f(): f()\nf()", "RecursionError"), ("import ctypes\nctypes.string_at(0)", "SIGSEGV"),
])
def test_a_failing_program_has_no_output_and_a_reason(box, code, error):
    """Catches a failure that is read as an empty but valid output."""
    found = run(box, code)
    assert found.outputs == (None,) and found.error.startswith("input 1: ") and error in found.error


@needs_bwrap
def test_a_failure_on_one_input_leaves_the_others(box):
    found = run(box, "print(10 // int(input()))", "5", "0", "2")
    assert found.outputs == ("2\n", None, "5\n") and found.error.startswith("input 2: ZeroDivisionError")


@needs_bwrap
def test_a_given_folder_can_be_imported_and_not_written():
    """Catches a folder that is not there, one that a program can change, and modules whose state outlives a program."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        pathlib.Path(folder, "given.py").write_text("seen = []")
        code = f"import given\ngiven.seen.append(1)\nprint(len(given.seen), given.__file__ == {folder!r} + '/given.py')"
        with Sandbox(Limits(folder=folder, modules=("given",)), workers=1) as box:
            assert [run(box, code + f"#{i}").outputs for i in range(2)] == [("1 True\n",)] * 2
            assert "Error" in run(box, f"open({folder!r} + '/given.py', 'a')").error
            assert run(box, f"import os\nprint(os.listdir({str(pathlib.Path(folder).parent)!r}))").outputs == (
                f"[{pathlib.Path(folder).name!r}]\n",), "nothing beside it"
        with pytest.raises(SandboxUnavailable, match="No module named 'absent'"):
            Sandbox(Limits(folder=folder, modules=("absent",)))


@needs_bwrap
def test_more_inputs_than_one_fork_takes_and_equal_programs(box):
    """Catches lost or shifted outputs where a program goes on in a second fork, and wrong sharing of results."""
    many = Program("print(int(input()) + 1)", tuple(map(str, range(120))))
    other = Program("print(2)", ("",))
    counted = Outcome(tuple(f"{i + 1}\n" for i in range(120)))
    assert box.run([many, other, many]) == [counted, Outcome(("2\n",)), counted]
    assert box.run([]) == []


# --- what programs do not get


@needs_bwrap
@pytest.mark.parametrize("code", [
    "open('/etc/passwd')",
    f"open({str(pathlib.Path(__file__).resolve())!r})",
    f"import os\nos.listdir({str(pathlib.Path(__file__).resolve().parents[1])!r})",
    "import os\nos.listdir('/proc')",
    "open('/usr/note', 'w')", "open('/note', 'w')", "open('/tmp/note', 'w')", "open('/dev/shm/note', 'w')",
    "import os\nos.mkdir('/usr/lib/note')",
    "import socket\nsocket.create_connection(('127.0.0.1', 22), 1)", "import socket\nsocket.socket(socket.AF_UNIX)",
    "import os\nos.fork()", "import subprocess\nsubprocess.run(['/usr/bin/python3'])",
    "import os\nos.execv('/usr/bin/id', ['id'])",
    "import os\nos.kill(os.getppid(), 9)", "import os\nos.kill(-1, 9)", "import os\nos.kill(1, 19)",
    "import resource, os\nresource.prlimit(os.getppid(), resource.RLIMIT_CPU, (0, 0))",
    "import os\nos.setpriority(os.PRIO_PROCESS, os.getppid(), 19)",
    "import fcntl, os\nfcntl.fcntl(1, fcntl.F_SETOWN, os.getppid())",
    "import resource\nresource.setrlimit(resource.RLIMIT_CPU, (99, 99))",
    "import os\nos.setuid(0)",
    "import os\nos.memfd_create('more')",
    "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\nassert libc.unshare(0x10000000) == 0",
    "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\nassert libc.ptrace(16, 2, 0, 0) == 0",
    "import os\nfor fd in range(3, 99):\n"
    "    try: os.write(fd, b'\\0\\0\\0\\2{}')\n    except OSError: 0\nos.stat('/proc')",
])
def test_there_is_no_way_out(box, code):
    """Catches a host file, a socket, another process or a wider limit within reach; the sandbox works on afterwards."""
    found = run(box, code + "\nprint('out')")
    assert found.outputs == (None,)
    assert run(box, ADD) == Outcome(("3\n",))


@needs_bwrap
def test_it_is_nobody_and_sees_only_libraries(box):
    assert run(box, "print(__import__('os').getuid() != 0, sorted(__import__('os').listdir('/')))").outputs[0] in (
        "True ['lib', 'lib64', 'usr']\n", "True ['lib', 'usr']\n")


@needs_bwrap
def test_root_starts_it_as_another_user():
    """Catches a sandbox whose processes are the host's root, for whom limits on processes do nothing."""
    with Sandbox(workers=1) as box:
        status = pathlib.Path(f"/proc/{box._workers[0].process.pid}/status").read_text()
    uid = int(status.split("Uid:")[1].split()[0])
    assert uid == (sandbox.UID if os.geteuid() == 0 else os.geteuid())


# --- limits, and the others


@needs_bwrap
def test_bad_programs_leave_the_others_alone():
    """Catches a loop, a bomb or a flood that costs a neighbour its result; 3 workers run them side by side."""
    bad = {
        "while True: pass": "time limit",
        "import signal\nfor s in (24, 14): signal.signal(s, signal.SIG_IGN)\nwhile True: pass": "time limit",
        "x = [0] * 10**10": "MemoryError",
        "x = []\nwhile True: x.append(bytearray(10**6))": "MemoryError",
        "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass": "time limit",
        "from threading import *\nwhile True: Thread(target=Event().wait, daemon=True).start()": "RuntimeError",
        "while True: print('x' * 1000)": "output limit",
        "import os\nwhile True: os.write(1, b'x' * 1000)": "output limit",
        "import sys\nwhile True: sys.stderr.write('x' * 1000)": "OSError",
    }
    batch = []
    for i, code in enumerate(bad):
        batch += [Program(code, ("",) * 5), Program(f"print({i})\n{ADD}", ("1 2", "3 4"))]
    with Sandbox(workers=3) as box:
        before = time.monotonic()
        found = box.run(batch)
        assert time.monotonic() - before < 60
        assert all(isinstance(worker.about, str) for worker in box._workers) and len(box._workers) <= 3
    for i, (code, error) in enumerate(bad.items()):
        assert set(found[2 * i].outputs) == {None} and error in found[2 * i].error, code
        assert found[2 * i + 1] == Outcome((f"{i}\n3\n", f"{i}\n7\n"))


@needs_bwrap
def test_a_sleeper_is_ended_by_wall_time(box, monkeypatch):
    monkeypatch.setattr(sandbox, "WALL_LEAST", 0.5)
    monkeypatch.setattr(sandbox, "WALL_FACTOR", 0.5)
    found = run(box, "import time\ntime.sleep(60)", "a", "b")
    assert found == Outcome((None, None), "input 1: time limit")


@needs_bwrap
def test_seconds_of_cpu_are_a_programs_own():
    """Catches one limit for all: the same work passes with more seconds, and each program states its own."""
    work = "import time\nwhile time.process_time() < 1.6: pass\nprint(1)"
    with Sandbox() as box:
        short, long = box.run([Program(work, ("",)), Program(work, ("",), cpu_seconds=4)])
    assert short.error == "input 1: time limit" and long.outputs == ("1\n",)


@needs_bwrap
def test_output_of_the_size_of_the_limit_is_refused_whole():
    with Sandbox(Limits(output_bytes=100), workers=1) as box:
        assert run(box, "print('x' * 98)").outputs == ("x" * 98 + "\n",)
        assert run(box, "print('x' * 200)").outputs == (None,)


@needs_bwrap
def test_what_looks_like_a_result_is_only_output(box):
    """Catches framing that a program can forge: a whole message, a separator or another input's output."""
    message = '\\0\\0\\0\\x2a{"outputs": ["3\\\\n", "7\\\\n"], "error": ""}'
    found = box.run([Program(f"print('{message}')", ("1 2", "3 4")), Program("print('ok\\nok\\n')\n1/0", ("1 2",
    "3 4")),
                     Program(ADD, ("1 2", "3 4"))])
    assert found[0].outputs[0].startswith("\0\0\0*{") and found[0].outputs[0] == found[0].outputs[1]
    assert found[1].outputs == (None, None)
    assert found[2].outputs == ("3\n", "7\n")


@needs_bwrap
def test_a_killed_worker_is_replaced_in_the_middle_of_a_batch():
    """Catches a batch that is lost, or blamed on the program, when something outside ends the process."""
    with Sandbox(workers=1) as box:
        run(box, ADD)
        os.killpg(box._workers[0].process.pid, signal.SIGKILL)
        assert box.run([Program(ADD, (f"{i} 1",)) for i in range(3)]) == [Outcome((f"{i + 1}\n",)) for i in range(3)]


@needs_bwrap
def test_nothing_stays_behind_when_the_owner_is_killed(tmp_path):
    """Catches a sandbox that runs on as an orphan after kill -9."""
    code = ("from m2rl_core.sandbox import *\nimport time, sys\nbox = Sandbox(workers=1)\n"
            "print(box._workers[0].process.pid, flush=True)\n"
            "box.run([Program('while True: pass', ('',), cpu_seconds=60)])")
    root = pathlib.Path(__file__).parents[1]
    owner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=root)
    group = int(owner.stdout.readline())
    time.sleep(0.3)
    owner.kill()
    owner.wait()
    owner.stdout.close()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and pathlib.Path(f"/proc/{group}/status").exists():
        if "State:\tZ" in pathlib.Path(f"/proc/{group}/status").read_text():
            break  # ended, and nobody has asked for its status yet
        time.sleep(0.05)
    else:
        assert not pathlib.Path(f"/proc/{group}").exists()


@needs_bwrap
def test_throughput(box, capsys):
    """200 programs of 5 inputs a second on 2 free cores; half of it must hold on a busy machine."""
    code = "a = map(int, input().split())\nprint(sum(x * x for x in a if x % 2 == {}))"
    batch = [Program(code.format(i), tuple(f"{i} {j} 3 4 5" for j in range(5))) for i in range(400)]
    box.run(batch[:20])
    before = time.monotonic()
    found = box.run(batch)
    seconds = time.monotonic() - before
    with capsys.disabled():
        print(f"\nsandbox: {len(batch) / seconds:.0f} programs a second, {os.getloadavg()[0]:.1f} load")
    assert all(None not in outcome.outputs for outcome in found)
    assert len(batch) / seconds >= 100


# --- the choice, and the interpreter


def test_the_choice_is_stated(monkeypatch):
    monkeypatch.setenv("M2RL_SANDBOX", "interpreter")
    assert sandbox.probe().startswith("restricted interpreter") and "all other code is refused" in sandbox.probe()
    with pytest.warns(UserWarning, match="no sandbox: .*restricted interpreter"):
        assert sandbox.open_sandbox().kind == "interpreter"
    monkeypatch.setenv("M2RL_SANDBOX", "docker")
    with pytest.raises(ValueError, match="M2RL_SANDBOX='docker': one of auto, bubblewrap, interpreter"):
        sandbox.probe()
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv("M2RL_SANDBOX", "auto")
    assert "apt-get install bubblewrap" in sandbox.probe() and sandbox.probe().startswith("restricted interpreter")
    monkeypatch.setenv("M2RL_SANDBOX", "bubblewrap")
    with pytest.raises(SandboxUnavailable, match="bwrap is not installed"):
        sandbox.open_sandbox()


def test_a_bwrap_that_fails_gives_its_own_words(monkeypatch, tmp_path):
    """Catches a broken bubblewrap that is used, or whose reason is hidden."""
    broken = tmp_path / "bwrap"
    broken.write_text("#!/bin/sh\necho 'setting up uid map: Permission denied' >&2\nexit 1\n")
    broken.chmod(0o755)
    for folder in (tmp_path, *tmp_path.parents[:3]):
        folder.chmod(0o755)  # root starts it as another user, who must reach it
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("M2RL_SANDBOX", "auto")
    assert "setting up uid map: Permission denied" in sandbox.probe()
    assert sandbox.probe().startswith("restricted interpreter")


@needs_bwrap
def test_where_bwrap_is_installed_it_works(monkeypatch):
    monkeypatch.setenv("M2RL_SANDBOX", "bubblewrap")
    assert sandbox.probe().startswith("bubblewrap around ")


@needs_bwrap
def test_the_interpreter_agrees_with_the_sandbox(box):
    """Catches a difference in meaning: the same outputs on the miniature's programs and on hand-written variants."""
    rng, batch = random.Random(0), []
    for _ in range(100):
        parts = programs.draw_composition(rng, rng.choice(("keep", "change", "both", "long")))
        lines = tuple(" ".join(str(rng.randint(-9, 20)) for _ in range(rng.randint(0, 6))) for _ in range(5))
        batch.append(Program(programs.program(parts)[0], lines))
    batch += [Program(code, ("3 -1 2 8\n",)) for code in VARIANTS]
    ours, theirs = Interpreter("a test").run(batch), box.run(batch)
    for program, one, other in zip(batch, ours, theirs, strict=True):
        assert one.outputs == other.outputs, program.code
    assert sum(None not in one.outputs for one in ours[-len(VARIANTS):]) == len(VARIANTS) - 3


VARIANTS = (
    "a=list(map(int,input().split()))\nb=[]\nfor x in a:\n    if x%2:\n        b.append(x)\nprint(*b,sep=',')",
    "a=[int(x) for x in input().split()]\na.sort(reverse=True)\nprint(a, a[0], a[-1], a[1:3], a[::-1])",
    "s=0\nfor x in map(int,input().split()):\n    if x<0: continue\n    if x>5: break\n    s+=x\n"
    "else:\n    s=99\nprint(s)",
    "print(sum(filter(lambda x:x%2==0,map(int,input().split()))))",
    "print(max(map(int,input().split()),key=lambda x:-x), min([],default=7), len('abc'), abs(-3))",
    "f=lambda x,y=2:x*y+1\nprint([f(x) for x in range(3)], [f(x,3) for x in range(3)])",
    "print(1 if 2<3<4 and not 0 else 2, 7//2, -7//2, -7%3, 2**5, True+1, 3 in [1,2,3], 3 not in [3], [] or 5, 0 and 1)",
    "a,b=1,2\na,b=b,a\nprint(a,b,(1,2),end='!')", "fs=[x*y for x in range(3) for y in range(x) if y<9]\nprint(*fs)",
    "sum=5\nprint(sum)", "a=map(int,input().split())\nprint(len(list(a)), list(a))",
    "print('a'+'b'*2, 'x y'.split(), None)",
    "k=3\nprint([k for k in range(2)], k)", "print(input())\nprint(input())", "print([][0])", "print(undefined)",
)


@pytest.mark.parametrize("code", [
    "import os", "from os import getuid", "__import__('os')", "print(().__class__)", "print((1).real)", "x=''.join",
    "''.join([])",
    "def f(): pass", "class A: pass", "while True: pass", "with open('x'): pass", "f'{1}'", "{1: 2}", "{1, 2}",
    "x: int = 1",
    "del x", "try:\n    1\nexcept: pass", "(x:=1)", "[1][0]=2", "global x", "assert 1", "1/2", "1&2", "1<<9",
    "lambda *a: a",
    "print(__builtins__)", "raise ValueError", "[].append", "b'x'", "1.5", "...", "await x", "[].sort.__self__",
    "'%9d'%1",
    "'{}'.format(1)", "a=[1]\nb=[a]", "print(print)", "+" * 200 + "1", "x=1;" * 9000,
])
def test_the_interpreter_refuses_what_is_not_in_its_grammar(code):
    """Catches a way from the grammar to Python's own objects. Undefined names are errors, not a way out."""
    found = Interpreter("a test").run([Program(code, ("1 2\n",))])[0]
    assert found.outputs == (None,)
    assert any(word in found.error for word in ("not in the miniature's grammar", "SyntaxError", "not defined",
    "size limit"))


def test_refused_programs_print_nothing_before():
    found = Interpreter("a test").run([Program("print(1)\nimport os", ("",))])[0]
    assert found == Outcome((None,), "input 1: not in the miniature's grammar: Import in line 2")


@pytest.mark.parametrize("code", [
    "print(10**10**10)", "x=9\nfor i in range(99): x=x*x", "print([0]*10**9)", "print(10**9*[0])", "print('a'*10**9)",
    "print(sum(range(10**12)))", "print(list(range(10**12)))", "a=[1]\nfor x in a: a.append(x)",
    "f=lambda x:f(x)\nf(1)",
    "s='a'\nfor i in range(99): s=s+s", "for i in range(5000): print('x'*5000)",
    "for i in range(4000):\n    for j in range(4000): 1",
    "print([0 for i in range(4000) for j in range(4000)])", "a=list(range(4000))\nfor i in range(4000): a.sort()",
    "a=list(range(4000))\nfor i in range(4000): max(a)", "a=list(range(4000))\nprint(sum(map(lambda x:a,a),[]))",
    "a=list(range(4000))\nfor i in range(4000): a[:]", "a=list(range(4000))\nfor i in range(4000): -1 in a",
    "a=list(range(4000))\nfor i in range(4000): a+a[:9]", "s='1 '*2500\nfor i in range(4000): s.split()",
    "f=lambda:[f()]\nf()",
    "a=list(range(4000))\nfor i in range(4000): a==a[:]",
])
def test_the_interpreters_limits_hold(code):
    """Catches work that grows past the counted steps; each of these would take seconds, gigabytes or forever."""
    before = time.process_time()
    found = Interpreter("a test").run([Program(code, ("",))])[0]
    assert found.outputs == (None,) and time.process_time() - before < 3, found.error
    assert STEPS <= 100_000
