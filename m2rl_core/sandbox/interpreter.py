"""A restricted interpreter of the miniature's grammar, for machines where no sandbox can be had.

It walks the syntax tree and knows integers, flat lists, the names in `NAMES`, comprehensions, lambdas, `for`, `if`
and assignments; every number, list and output has a largest size and every step is counted. Whatever else a program
holds is refused before anything of it runs, with "not in the miniature's grammar".
"""
from __future__ import annotations

import ast
import operator
from collections.abc import Sequence

from m2rl_core.sandbox import Outcome, Program

STEPS, BITS, ITEMS, OUTPUT = 50_000, 512, 5_000, 65_536  # most steps, bits of a number, items of a list, characters
DEPTH, LENGTH = 100, 20_000  # most nesting, most characters of a program
NAMES = ("int", "list", "map", "filter", "sum", "max", "min", "len", "sorted", "abs", "print", "input", "range")
METHODS = ("split", "append", "reverse", "sort")
KEYWORDS = ("key", "reverse", "default", "start", "sep", "end")
BINARY = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv,
          ast.Mod: operator.mod, ast.Pow: operator.pow}
UNARY = {ast.USub: operator.neg, ast.UAdd: operator.pos, ast.Not: operator.not_}
COMPARE = {ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le,
           ast.Gt: operator.gt, ast.GtE: operator.ge, ast.In: lambda a, b: a in b, ast.NotIn: lambda a, b: a not in b}
GRAMMAR = (ast.Module, ast.Expr, ast.Assign, ast.AugAssign, ast.For, ast.If, ast.Pass, ast.Break, ast.Continue,
           ast.Name, ast.Load, ast.Store, ast.Constant, ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.And, ast.Or,
           ast.Compare, ast.IfExp, ast.Call, ast.keyword, ast.Starred, ast.Lambda, ast.arguments, ast.arg, ast.List,
           ast.Tuple, ast.Subscript, ast.Slice, ast.ListComp, ast.GeneratorExp, ast.comprehension, ast.Attribute,
           *BINARY, *UNARY, *COMPARE)


class Refused(Exception):
    """The program is outside of the grammar, or beyond one of the limits."""


class _Break(Exception):
    pass


class _Continue(Exception):
    pass


def check(tree: ast.AST, depth: int = 0) -> None:
    """Refused, with the part's kind and line, where a tree holds anything that is not in the grammar."""
    line = getattr(tree, "lineno", 1)
    called = isinstance(tree, ast.Call) and isinstance(tree.func, ast.Attribute)
    wrong = (
        not isinstance(tree, GRAMMAR) or depth > DEPTH
        or (isinstance(tree, ast.Constant) and not isinstance(tree.value, (int, str, type(None))))
        or (isinstance(tree, ast.Name) and tree.id.startswith("__"))
        or (isinstance(tree, ast.Attribute) and tree.attr not in METHODS)
        or (isinstance(tree, ast.keyword) and tree.arg not in KEYWORDS)
        or (isinstance(tree, (ast.For, ast.comprehension)) and getattr(tree, "is_async", 0))
        or (isinstance(tree, ast.arguments) and (tree.vararg or tree.kwarg or tree.kwonlyargs or tree.posonlyargs))
    )
    if wrong:
        part = tree.attr if isinstance(tree, ast.Attribute) else type(tree).__name__
        raise Refused(f"not in the miniature's grammar: {part} in line {line}")
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.Attribute) and not (called and child is tree.func):
            raise Refused(f"not in the miniature's grammar: {child.attr} without a call in line {line}")
        check(child, depth + 1)


class Interpreter:
    """Runs programs of the miniature's grammar; the same interface as `Sandbox`, and no arbitrary code."""

    kind = "interpreter"

    def __init__(self, reason: str):
        self.about = f"restricted interpreter of the miniature's grammar, all other code is refused ({reason})"

    def run(self, programs: Sequence[Program]) -> list[Outcome]:
        """The outcome of each program, in order; a refused one has no outputs and says why."""
        return [_outcome(program) for program in programs]

    def close(self) -> None:
        """Nothing to end."""

    def __enter__(self) -> Interpreter:
        return self

    def __exit__(self, *_) -> None:
        self.close()


def _outcome(program: Program) -> Outcome:
    outputs, first = [], ""
    try:
        if len(program.code) > LENGTH:
            raise Refused(f"size limit: a program of more than {LENGTH} characters")
        tree = ast.parse(program.code)
        check(tree)
    except (Refused, SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return Outcome((None,) * len(program.inputs), f"input 1: {_words(error)}")
    for number, text in enumerate(program.inputs, 1):
        run = _Run(text)
        try:
            run.body(tree.body, _Scope())
            outputs.append("".join(run.printed))
        except (Refused, _Break, _Continue, ArithmeticError, AttributeError, LookupError, NameError, TypeError,
                ValueError, EOFError, RecursionError) as error:
            outputs.append(None)
            first = first or f"input {number}: {_words(error)}"
    return Outcome(tuple(outputs), first)


def _words(error: Exception) -> str:
    return str(error) if isinstance(error, Refused) else f"{type(error).__name__}: {error}"[:200]


class _Scope(dict):
    """Names of one level; what is missing is looked up further out."""

    def __init__(self, outer: _Scope | None = None):
        super().__init__()
        self.outer = outer

    def find(self, name: str):
        scope = self
        while scope is not None:
            if name in scope:
                return scope[name]
            scope = scope.outer
        raise NameError(f"name {name!r} is not defined")


class _Run:
    """One run: what is left of the input, what was printed, how many steps were taken."""

    def __init__(self, text: str):
        self.lines, self.printed, self.steps, self.size = text.splitlines(), [], 0, 0
        self.names = {
            "int": int, "abs": abs, "map": lambda f, *xs: map(f, *map(self.each, xs)),
            "filter": lambda f, xs: filter(f, self.each(xs)), "len": lambda xs: len(xs), "list": self.flat,
            "sum": lambda xs, start=0: sum(map(self.number, self.each(xs)), self.number(start)),
            "max": lambda *xs, **how: max(*map(self.counted, xs), **how),
            "min": lambda *xs, **how: min(*map(self.counted, xs), **how),
            "sorted": lambda xs, **how: sorted(self.flat(xs), **how),
            "print": self.write, "input": self.read, "range": self.numbers,
        }
        assert set(self.names) == set(NAMES)

    def step(self, *operands) -> None:
        """Counts one step, and one for each item of the texts and lists that an operation goes through."""
        self.steps += 1 + sum(len(one) for one in operands if isinstance(one, (str, list, tuple)))
        if self.steps > STEPS:
            raise Refused(f"step limit: more than {STEPS} steps")

    # --- what programs call

    def read(self) -> str:
        if not self.lines:
            raise EOFError("EOF when reading a line")
        return self.lines.pop(0)

    def write(self, *values, sep=" ", end="\n") -> None:
        sep, end = " " if sep is None else sep, "\n" if end is None else end
        if not isinstance(sep, str) or not isinstance(end, str):
            raise TypeError("sep and end must be None or a string")
        for value in values:
            if not isinstance(value, (int, str, list, tuple, type(None))):
                raise Refused("not in the miniature's grammar: print of something that is no number, text or list")
        for number, value in enumerate(values):
            self.printed.append(f"{sep if number else ''}{value}")
            self.size += len(self.printed[-1])
            if self.size > OUTPUT:
                raise Refused(f"output limit: more than {OUTPUT} characters")
        self.printed.append(end)

    def numbers(self, *bounds) -> range:
        found = range(*bounds)
        if len(found) > ITEMS:
            raise Refused(f"size limit: a range of more than {ITEMS}")
        return found

    def each(self, values):
        """Goes through values, a step each."""
        for value in values:
            self.step()
            yield value

    def counted(self, value):
        self.step(value)
        return value if isinstance(value, (int, str)) else self.each(value)

    def number(self, value) -> int:
        if not isinstance(value, int):
            raise TypeError(f"sum of {type(value).__name__!r}, not of numbers")
        return self.small(value)

    def flat(self, values=()) -> list:
        return [self.small(value, inside=True) for value in self.each(values)]

    def small(self, value, inside: bool = False):
        """The value itself; Refused where it is too large, or is put in a list and is no number, text or None."""
        if isinstance(value, int):
            if value.bit_length() > BITS:
                raise Refused(f"size limit: a number of more than {BITS} bits")
        elif isinstance(value, (str, list, tuple)) and len(value) > ITEMS:
            raise Refused(f"size limit: more than {ITEMS} items")
        if inside and not isinstance(value, (int, str, type(None))):
            raise Refused("not in the miniature's grammar: a list of something other than numbers or texts")
        return value

    # --- statements

    def body(self, statements, scope: _Scope) -> None:
        for statement in statements:
            self.step()
            match statement:
                case ast.Expr(value):
                    self.value(value, scope)
                case ast.Assign(targets, value):
                    found = self.value(value, scope)
                    for target in targets:
                        self.assign(target, found, scope)
                case ast.AugAssign(ast.Name(name), op, value):
                    if isinstance(old := scope.find(name), list):
                        raise Refused("not in the miniature's grammar: a list changed by an operator")
                    scope[name] = self.binary(op, old, self.value(value, scope))
                case ast.If(test, body, orelse):
                    self.body(body if self.value(test, scope) else orelse, scope)
                case ast.For(target, values, body, orelse):
                    self.loop(target, self.value(values, scope), body, orelse, scope)
                case ast.Pass():
                    pass
                case ast.Break():
                    raise _Break("'break' outside loop")
                case ast.Continue():
                    raise _Continue("'continue' outside loop")
                case _:
                    raise Refused(f"not in the miniature's grammar: {type(statement).__name__}")

    def loop(self, target, values, body, orelse, scope: _Scope) -> None:
        for value in self.each(values):
            self.assign(target, value, scope)
            try:
                self.body(body, scope)
            except _Break:
                return
            except _Continue:
                pass
        self.body(orelse, scope)

    def assign(self, target, value, scope: _Scope) -> None:
        match target:
            case ast.Name(name):
                scope[name] = value
            case ast.Tuple(parts) if not any(isinstance(part, ast.Starred) for part in parts):
                values = list(self.each(value))
                if len(values) != len(parts):
                    raise ValueError(f"cannot unpack {len(values)} values into {len(parts)}")
                for part, item in zip(parts, values, strict=True):
                    self.assign(part, item, scope)
            case _:
                raise Refused(f"not in the miniature's grammar: assignment to {type(target).__name__}")

    # --- expressions

    def value(self, node, scope: _Scope):
        self.step()
        match node:
            case ast.Constant(value):
                return self.small(value)
            case ast.Name(name):
                return self.names[name] if name in self.names and not self.shadowed(name, scope) else scope.find(name)
            case ast.BinOp(left, op, right):
                return self.binary(op, self.value(left, scope), self.value(right, scope))
            case ast.UnaryOp(op, operand):
                return UNARY[type(op)](self.value(operand, scope))
            case ast.BoolOp(op, values):
                for part in values:
                    found = self.value(part, scope)
                    if bool(found) == isinstance(op, ast.Or):
                        break
                return found
            case ast.Compare(left, ops, rights):
                found, before = True, self.value(left, scope)
                for op, right in zip(ops, rights, strict=True):
                    after = self.value(right, scope)
                    self.step(before, after)
                    found = COMPARE[type(op)](before, after)
                    if not found:
                        break
                    before = after
                return found
            case ast.IfExp(test, body, orelse):
                return self.value(body if self.value(test, scope) else orelse, scope)
            case ast.List(parts):
                return self.flat(self.items(parts, scope))
            case ast.Tuple(parts):
                return tuple(self.flat(self.items(parts, scope)))
            case ast.ListComp(element, generators):
                return self.flat(self.comprehension(element, generators, scope))
            case ast.GeneratorExp(element, generators):
                return self.comprehension(element, generators, scope)
            case ast.Subscript(base, ast.Slice(lower, upper, step)):
                bounds = [None if part is None else self.value(part, scope) for part in (lower, upper, step)]
                found = self.value(base, scope)
                self.step(found)
                return found[slice(*bounds)]
            case ast.Subscript(base, index):
                return self.value(base, scope)[self.value(index, scope)]
            case ast.Lambda(arguments, body):
                return self.function([part.arg for part in arguments.args], arguments.defaults, body, scope)
            case ast.Call(function, arguments, keywords):
                return self.call(function, arguments, keywords, scope)
        raise Refused(f"not in the miniature's grammar: {type(node).__name__}")

    def shadowed(self, name: str, scope: _Scope | None) -> bool:
        while scope is not None:
            if name in scope:
                return True
            scope = scope.outer
        return False

    def items(self, parts, scope: _Scope):
        for part in parts:
            if isinstance(part, ast.Starred):
                yield from self.each(self.value(part.value, scope))
            else:
                yield self.value(part, scope)

    def binary(self, op, left, right):
        """An arithmetic result of bounded size; texts and lists may only be added or repeated."""
        self.step(left, right)
        numbers = isinstance(left, int) and isinstance(right, int)
        if isinstance(op, ast.Pow) and not (numbers and 0 <= right and left.bit_length() * right <= BITS):
            raise Refused("not in the miniature's grammar: this power")
        if isinstance(op, ast.Mod) and not numbers:
            raise Refused("not in the miniature's grammar: % of something that is no number")
        if isinstance(op, ast.Mult) and not numbers:
            for one, other in ((left, right), (right, left)):
                if isinstance(one, (str, list, tuple)) and isinstance(other, int) and len(one) * other > ITEMS:
                    raise Refused(f"size limit: more than {ITEMS} items")
        return self.small(BINARY[type(op)](left, right))

    def comprehension(self, element, generators, scope: _Scope):
        first = self.value(generators[0].iter, scope)  # evaluated at once, as in Python

        def level(depth, values, inner):
            for value in self.each(values):
                self.assign(generators[depth].target, value, inner)
                if all(self.value(test, inner) for test in generators[depth].ifs):
                    if depth + 1 < len(generators):
                        yield from level(depth + 1, self.value(generators[depth + 1].iter, inner), inner)
                    else:
                        yield self.value(element, inner)

        return level(0, first, _Scope(scope))

    def function(self, names, defaults, body, scope: _Scope):
        given = [self.value(part, scope) for part in defaults]

        def call(*values):
            missing = len(names) - len(values)
            if missing < 0 or missing > len(given):
                raise TypeError(f"lambda takes {len(names)} arguments, got {len(values)}")
            inner = _Scope(scope)
            inner.update(zip(names, [*values, *given[len(given) - missing:]], strict=True))
            return self.value(body, inner)

        return call

    def call(self, function, arguments, keywords, scope: _Scope):
        method = isinstance(function, ast.Attribute)
        base = self.value(function.value if method else function, scope)
        values = list(self.items(arguments, scope))
        named = {word.arg: self.value(word.value, scope) for word in keywords}
        if not method:
            if not callable(base):
                raise TypeError(f"{type(base).__name__!r} object is not callable")
            return self.small(base(*values, **named)) if base is int else base(*values, **named)
        if not isinstance(base, str if function.attr == "split" else list):
            raise AttributeError(f"{type(base).__name__!r} object has no attribute {function.attr!r}")
        if function.attr == "append":
            values = [self.small(value, inside=True) for value in values]
            if len(base) >= ITEMS:
                raise Refused(f"size limit: more than {ITEMS} items")
        else:
            self.step(base)
        return getattr(base, function.attr)(*values, **named)
