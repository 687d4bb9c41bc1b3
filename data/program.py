"""Evaluates a Program of Thought: a small Python program that leaves its result in `answer`.

    >>> run_program("eggs = 16 - 3 - 4\\nanswer = eggs * 2")
    Fraction(18, 1)
    >>> evaluate_program("while True: pass")
    (None, 'budget')

A model wrote the program, so Python never runs it. `ast.parse` reads it, and the class Interpreter
walks the tree. It knows a small part of Python: arithmetic, exact fractions, variables, loops,
functions, lists, sets and dicts, strings, parts of `math`, and linear equations in sympy's words
(`Symbol`, `Eq`) and in those of the authors (`solve_it`).

Promised, for every text:
- No way out. There are no files, and a program makes no classes. A value is an int, float,
  Fraction, bool, str, None, list, tuple, dict, set, range or of a class below. Attributes exist
  only as `module.name` and `value.method`, from closed tables. `import` finds only what is in
  these tables.
- It ends, within seconds and 200 MB. One budget of steps pays for everything before it is done.
  There is no clock, signal or thread. So the verdict is the same on a slow machine, on every
  system and in a worker thread.
- Nothing is raised, and nothing half done counts. A number needs a program that ran to its end.
- Where Python gives a number, this is the same number or none. (For equations it is sympy's
  number, as an exact Fraction.) There are two exceptions:
  1. Generators, zip, map, filter, enumerate and reversed are computed at once. They do not see a
     later change of their source, and functions that they call are called for every element.
  2. A set has its own order.

Not promised:
- All of Python. What is unknown is refused, not guessed.
- Safety from bugs in CPython's own parser, or in a thread with a stack below 512 kB.
- The last word on a deep recursion: it is "budget" if the caller is deep in the stack.

`evaluate_program` gives the reason beside the number, and lists the reasons. The log counts them.
Read the file from both ends: `evaluate_program` says what is done, the tables at the end say what
the language has.
"""

import ast
import builtins
import gc
import math
import operator
import re
import sys
import warnings
from dataclasses import make_dataclass
from fractions import Fraction

STEPS = 500_000       # the budget, some 0.4 s: a step pays for a node, an operation, an element, 8 characters, 64 bits
MAX_BITS = 4_096      # of an integer
MAX_SIZE = 100_000    # elements or characters in the result of one operation
MAX_NEST = 50         # containers in containers; a list that holds itself meets this, too
MAX_CALLS = 64        # calls of the program's own functions inside each other: some 600 of the host's 1,000 frames
MAX_SOURCE = 16_000   # characters of the program
MAX_SIGNS = 1_000     # prefix signs in it
MAX_NODES = 5_000     # of the syntax tree ...
MAX_DEPTH = 100       # ... and its depth


class Stop(Exception):
    """The evaluator gives up: Stop("refused") or Stop("budget")."""


class ProgramError(Exception):
    """The program made a mistake: here Python would raise, too."""


def run_program(source):
    """The number in `answer`: a Fraction if it is exact, a float if it is a float, else None. Never raises."""
    return evaluate_program(source)[0]


def evaluate_program(source):
    """(value, reason): what run_program gives, and why. The reason is one of

    "ok"         the value is a number; it is None for every other reason
    "no answer"  the program ran to its end, but `answer` is missing or not one finite number
    "error"      Python would raise, too: wrong syntax, a division by zero, a misspelt name ...
    "refused"    the program uses something that this evaluator does not know, or is too long or too deep to be read
    "budget"     the program takes too many steps, too much memory or too deep a recursion
    "bug"        this evaluator failed, not the program. As nothing may be raised, it is printed to stderr and has its
                 own reason, so that a caller can stop there instead of scoring the rationale as wrong.
    """
    interpreter = Interpreter()
    try:
        interpreter.run(parse(source))
        value = interpreter.module.names.get("answer")
    except Stop as stop:
        return None, str(stop)
    except (RecursionError, MemoryError):
        return None, "budget"
    except (ProgramError, RuntimeError):  # RuntimeError: a dict or set changed its size while a loop walked it
        return None, "error"
    except Exception as error:
        print(f"data/program.py: a bug, please report this program: {error!r}\n{source}", file=sys.stderr)
        return None, "bug"
    finally:  # a function and its scope hold each other, and Python's own collector may be in no hurry
        interpreter.module.names.clear()
        if interpreter.steps < STEPS - 20_000:
            gc.collect()
    # Exact types, for True is not 1. The comparison is False for NaN and infinity.
    if type(value) not in (int, float, Fraction) or not abs(value) <= sys.float_info.max:
        return None, "no answer"
    return (value if type(value) is float else Fraction(value)), "ok"


# ---- From the text to a small tree of known nodes ----

warnings.filterwarnings("ignore", module="<pot>")  # what the parser finds odd in a model's program is no news


def parse(source):
    """The syntax tree, checked. CPython's parser recurses in C: 15,000 minus signs overflow a thread's stack of 512 kB
    (macOS) and end the process. So the text is measured first, roughly: signs in strings and comments count as well."""
    if type(source) is not str or len(source) > MAX_SOURCE:
        raise Stop("refused")
    if len(re.findall(r"[-+~]|\*\*|\bnot\b|\blambda\b", source)) > MAX_SIGNS:
        raise Stop("refused")
    try:
        tree = ast.parse(source, "<pot>")
        annotate(tree)
        compile(tree, "<pot>", "exec", dont_inherit=True)  # for the rest of the syntax; the code is thrown away
    except (SyntaxError, ValueError) as error:  # ValueError: a null byte, half of a surrogate pair
        raise ProgramError from error
    return tree


def annotate(tree):
    """Refuse unknown nodes and oversized trees. Write on modules, functions and comprehensions which names are `local`
    to them (by Python's rule those that they assign anywhere), and which they have `declared` global or nonlocal.
    A loop with a list, not a recursion, because the tree may be deep."""
    todo, count = [(tree, None, 0)], 0
    while todo:
        node, scope, depth = todo.pop()
        kind, count = type(node), count + 1
        if kind not in KNOWN or count > MAX_NODES or depth > MAX_DEPTH:
            raise Stop("refused")
        if kind is ast.Constant and (type(node.value) not in PLAIN or bits(node.value) > MAX_BITS):
            raise Stop("refused")  # bytes, 2j, ...
        if kind is ast.Name and type(node.ctx) is ast.Store:
            scope.local.add(node.id)
        elif kind in (ast.FunctionDef, ast.alias):
            scope.local.add(getattr(node, "asname", None) or node.name)
        elif kind in (ast.Global, ast.Nonlocal):
            scope.declared.update(dict.fromkeys(node.names, kind))
        if kind in SCOPED:
            scope, node.local, node.declared = node, set(), {}
        elif kind is ast.arguments:
            scope.local.update(parameter.arg for parameter in node.args)
        todo.extend((child, scope, depth + 1) for child in ast.iter_child_nodes(node))


# ---- Values ----

Linear = make_dataclass("Linear", ["terms"], frozen=True)  # 2x - 3: (("", -3), ("x", 2)), the constant under ""
Equation = make_dataclass("Equation", ["left", "right"], frozen=True)
# Without a text: Python puts that of any value into some of its errors, and here it would be that of all names in reach.
Module = make_dataclass("Module", ["names"], eq=False, repr=False)
Builtin = make_dataclass("Builtin", ["run"], eq=False, repr=False)  # a function of this file: (interpreter, *arguments)
Function = make_dataclass("Function", ["node", "defaults", "scope"], eq=False, repr=False)  # and the scope where it stood
Scope = make_dataclass("Scope", ["node", "outer", "names"], eq=False, repr=False)  # of a module, call or comprehension
Iterator = type(iter([]))  # from zip, map, a generator ...: computed at once, but consumed once

NUMBERS = {int, float, bool, Fraction}
EXACT = {int, Fraction}
PLAIN = {int, float, bool, str, type(None)}
VIEWS = {type({}.keys()), type({}.values()), type({}.items())}
CONTAINERS = {list, tuple, set, dict, *VIEWS}
ITERABLES = {str, range, Iterator, *CONTAINERS}
UNPRINTABLE = {set, Iterator, Module, Builtin, Function, Linear, Equation}  # their text is not Python's, or differs by run
VALUES = {Fraction, Linear, *PLAIN, *ITERABLES, *UNPRINTABLE}
# Python's own operations raise these for a mistake in the program. Any other exception is a bug of this file.
HOST_ERRORS = (ArithmeticError, LookupError, StopIteration, TypeError, ValueError)


def bits(*values):
    """The size of the exact numbers among `values`. Their sum, product or quotient has no more bits than that."""
    total = 0
    for value in values:
        if type(value) is int:
            total += value.bit_length()
        elif type(value) is Fraction:
            total += value.numerator.bit_length() + value.denominator.bit_length()
    return total


class Interpreter:
    """One run of a program: the budget that is left and the scope of names."""

    def __init__(self):
        self.steps = STEPS
        self.calls = 0
        self.scope = self.module = Scope(None, None, {})
        self.returned = None  # the value of the last `return`

    def run(self, tree):
        self.module.node = tree
        self.block(tree.body)

    # The budget, and Python's own operations under it

    def pay(self, steps):
        self.steps -= max(0, steps)
        if self.steps < 0:
            raise Stop("budget")

    def pay_bits(self, size):
        if not size <= MAX_BITS:  # instead of ">", for the exponent of a power may be NaN
            raise Stop("budget")
        self.pay(int(size) // 64)

    def pay_size(self, size, per_step=1):
        if size > MAX_SIZE:
            raise Stop("budget")
        self.pay(size // per_step)

    def weigh(self, *values, refuse=()):
        """Pay for all that Python may visit to compare, copy or print `values`. A shared list is paid at every visit:
        after 64 times `a = [a, a]` there are only 64 lists, but comparing them would take forever."""
        todo = [(value, 0) for value in values]
        while todo:
            value, depth = todo.pop()
            kind = type(value)
            if kind in refuse:
                raise Stop("refused")
            if depth > MAX_NEST:
                raise Stop("budget")
            if kind is str:
                self.pay(len(value) // 8)
            elif kind in EXACT:
                self.pay(bits(value) // 64)
            elif kind is range:
                self.pay(self.apply(len, value))
            elif kind in CONTAINERS or kind in (Linear, Equation):
                items = value.terms if kind is Linear else (value.left, value.right) if kind is Equation else value
                items = value.items() if kind is dict else items
                self.pay(len(items) + 1)
                todo.extend((item, depth + 1) for item in items)

    def apply(self, function, *args, **keywords):
        """function(*args, **keywords) for one of Python's own operations: the arguments are paid for, the growth is
        bounded, and the result is checked, so that nothing outside our closed set of values gets in."""
        self.pay(1)
        if function in INDEXED:  # the solution of an equation may be an index, as in sympy
            args = [whole(value) if type(value) is Fraction else value for value in args]
        free = function in FREE
        if not free and not NUMBERS.issuperset(map(type, args)):
            self.weigh(*args, *keywords.values())
        try:
            if function in BITS:
                self.pay_bits(BITS[function](*args, **keywords))
            if function in SIZES:
                self.pay_size(SIZES[function](*args, **keywords))
            result = function(*args, **keywords)
        except HOST_ERRORS as error:
            raise ProgramError from error
        kind = type(result)
        if kind not in VALUES:
            raise Stop("refused")  # such as the complex number (-8) ** 0.5
        if kind is range:
            self.pay_bits(20 * bits(result.start, result.stop, result.step))  # its numbers are made without being paid for
        for part in result if function is divmod else [result]:
            if type(part) in EXACT:
                self.pay_bits(bits(part))
        if not free and (kind is str or kind in CONTAINERS):
            self.pay_size(len(result), per_step=8 if kind is str else 1)
        return result

    def each(self, values):
        """Yield the elements one by one, a step for each: `for i in range(10 ** 15)` may leave early."""
        if type(values) not in ITERABLES:
            raise ProgramError("not iterable")
        if type(values) is set:
            self.weigh(values)
            if not all(type(value) in NUMBERS for value in values):
                values = sorted(values, key=repr)  # Python's own order differs from run to run
        for value in values:
            self.pay(1)
            yield value

    def listed(self, values):
        """The elements as a new list."""
        if type(values) in ITERABLES and self.apply(operator.length_hint, values) > MAX_SIZE:
            raise Stop("budget")
        return list(self.each(values))

    def key(self, value):
        """`value`, if it may be a dict key or in a set. Integers of more than 60 bits are refused: all multiples of
        2**61 - 1 have the hash 0, and a set of them takes quadratic time; so are long tuples, of which many can be found
        with one hash, and NaN, whose place depends on its address."""
        size = 0  # bits
        for part in value if type(value) is tuple else [value]:
            self.pay(1 + (len(part) // 8 if type(part) is str else 0))
            size += 64 if type(part) is float else bits(part)
            if type(part) is Linear:
                self.unknown(part)
            elif type(part) not in PLAIN or bits(part) > 60 or size > 200 or part != part:
                raise Stop("refused")
        return value

    # Operations of the language that are more than one of Python's

    def operate(self, operation, a, b):
        """a + b, a ** b ...: `operation` is a function of the module operator."""
        if type(a) is Linear or type(b) is Linear:
            return self.combine(operation, a, b)
        if operation is operator.mod and type(a) is str or type(a) in VIEWS or type(b) in VIEWS:
            raise Stop("refused")  # formatting by "%", with widths without bound; a set of what was not a key
        return self.apply(operation, a, b)

    def total(self, operation, values, start):
        for value in self.each(values):
            start = self.operate(operation, start, value)
        return start

    def compare(self, comparison, a, b):
        if comparison in (ast.In, ast.NotIn):
            if type(b) in (dict, set):
                found = self.key(a) in b
            elif type(b) is range and type(a) is int:
                found = a in b  # at once, however long it is
            elif type(b) is Iterator:
                found = any(self.apply(operator.eq, value, a) for value in self.each(b))  # the rest is not consumed
            else:
                found = self.apply(operator.contains, b, a)
            return found is (comparison is ast.In)
        if comparison in (ast.Is, ast.IsNot):
            if a is not None and b is not None:
                raise Stop("refused")  # whether two equal numbers are one object is an accident
            return (a is b) is (comparison is ast.Is)
        return self.apply(COMPARISONS[comparison], a, b)

    def item(self, container, index):
        if type(container) is dict:
            self.key(index)
        elif type(index) is slice:
            self.weigh(container)
        return self.apply(operator.getitem, container, index)

    def set_item(self, container, index, value):
        if type(index) is slice:
            raise Stop("refused")
        if type(container) is dict:
            self.key(index)
        self.apply(operator.setitem, container, index, value)

    def sort(self, values, /, *, key=None, reverse=False):
        values = self.listed(values)
        keys = values if key is None else [self.call(key, [value], {}) for value in values]
        before = self.steps
        self.weigh(keys)
        self.pay((before - self.steps) * len(keys).bit_length())  # so often each is compared
        return [values[i] for i in sorted(range(len(keys)), key=keys.__getitem__, reverse=bool(reverse))]

    def extreme(self, pick, values, *more, key=None, **default):
        """min and max: `pick` is one of them."""
        values = [values, *more] if more else self.listed(values)
        if key is None or not values:
            return self.apply(pick, values, **default)
        better, best = (operator.gt if pick is max else operator.lt), None
        for value in values:
            found = self.call(key, [value], {}), value
            if best is None or self.apply(better, found[0], best[0]):
                best = found
        return best[1]

    def rows(self, lists):
        """zip: one element of each in turn, so that one iterator may stand for several lists."""
        iterators = [values if type(values) is Iterator else iter(self.listed(values)) for values in lists]
        result = []
        while iterators:
            row = []
            for iterator in iterators:
                self.pay(1)
                for value in iterator:
                    row.append(value)
                    break
                else:
                    return result
            result.append(tuple(row))
        return result

    def dictionary(self, values):
        pairs = [self.listed(pair) for pair in self.each(values.items() if type(values) is dict else values)]
        return {self.key(key): value for key, value in pairs}

    def show(self, value, form=str):
        self.weigh(value, refuse=UNPRINTABLE)
        return self.apply(form, value)

    def format(self, value, spec=""):
        if spec == "":
            return self.show(value)
        if type(value) not in {str, *NUMBERS} or not FORMAT.fullmatch(spec):
            raise Stop("refused")
        value = whole(value) if type(value) is Fraction else value
        return self.apply(format, float(value) if type(value) is Fraction else value, spec)

    # Equations: linear ones, solved exactly. A symbol is a Linear, Eq(left, right) an Equation

    def unknown(self, symbol):
        """The name in a bare symbol."""
        if type(symbol) is not Linear or len(symbol.terms) != 1 or symbol.terms[0][1] != 1:
            raise Stop("refused")
        return symbol.terms[0][0]

    def terms(self, value):
        """{unknown: coefficient} of a Linear or a number. The float 0.1 counts as 1/10, as in sympy."""
        if type(value) is Linear:
            self.pay(2 * len(value.terms))
            return dict(value.terms)
        if type(value) not in NUMBERS:
            raise ProgramError("not a number")
        return {"": self.apply(Fraction, repr(value) if type(value) is float else value)}

    def combine(self, operation, a, b):
        """a + b, a - b, a * b and a / b where the result is linear as well."""
        a, b = self.terms(a), self.terms(b)
        if operation is operator.mul and set(a) == {""}:
            a, b = b, a
        if operation in (operator.add, operator.sub):
            terms = {name: self.apply(operation, a.get(name, 0), b.get(name, 0)) for name in a | b}
        elif operation in (operator.mul, operator.truediv) and set(b) == {""}:
            terms = {name: self.apply(operation, a[name], b[""]) for name in a}
        else:
            raise Stop("refused")
        terms = {name: value for name, value in terms.items() if value}
        return Linear(tuple(sorted(terms.items()))) if set(terms) - {""} else Fraction(terms.get("", 0))

    def solve(self, equations, unknowns):
        """{unknown: value} by Gauss-Jordan elimination; without a solution every value is None, as in solve_it."""
        equations, unknowns = (x if type(x) in (list, tuple) else [x] for x in (equations, unknowns))
        names, rows = [self.unknown(symbol) for symbol in unknowns], []
        for equation in equations:
            self.pay(len(names))
            left, right = (equation.left, equation.right) if type(equation) is Equation else (equation, 0)
            terms = self.terms(self.combine(operator.sub, left, right))
            if set(terms) - {"", *names}:
                raise Stop("refused")  # the solution would hold an unknown
            rows.append([terms.get(name, 0) for name in names] + [-terms.get("", 0)])
        for i in range(len(names)):
            pivot = next((row for row in rows[i:] if row[i]), None)
            if pivot is None:
                raise Stop("refused")  # the solution, if there is one, would hold an unknown
            rows.remove(pivot)
            self.pay(4 * len(rows) * len(pivot))  # a Fraction takes more time than its step pays for
            pivot = [self.apply(operator.truediv, value, pivot[i]) for value in pivot]
            rows = [[self.apply(operator.sub, value, self.apply(operator.mul, row[i], step))
                     for value, step in zip(row, pivot)] for row in rows]
            rows.insert(i, pivot)
        if any(row[-1] for row in rows[len(names):]):
            return dict.fromkeys(unknowns)
        return {symbol: Fraction(row[-1]) for symbol, row in zip(unknowns, rows)}

    # Names and calls

    def home(self, name):
        """The names of the scope that `name` belongs to."""
        scope = self.scope
        while scope.outer and (name not in scope.node.local or name in scope.node.declared):
            self.pay(1)
            scope = self.module if scope.node.declared.get(name) is ast.Global else scope.outer
        return scope.names

    def assign(self, target, value):
        self.pay(1)
        if type(target) is ast.Name:
            self.home(target.id)[target.id] = value
        elif type(target) is ast.Subscript:
            self.set_item(self.do(target.value), self.do(target.slice), value)
        elif type(target) in (ast.Tuple, ast.List):
            values, targets = self.listed(value), list(target.elts)
            for i, part in enumerate(targets):
                if type(part) is ast.Starred:  # a, *rest, b = values
                    end = len(values) - (len(targets) - i - 1)
                    targets[i], values[i:end] = part.value, [values[i:end]]
            if len(values) != len(targets):
                raise ProgramError("unpacking")
            for part, value in zip(targets, values):
                self.assign(part, value)
        else:
            raise Stop("refused")  # an attribute

    def call(self, function, args, keywords):
        if type(function) is Builtin:
            try:
                return function.run(self, *args, **keywords)
            except HOST_ERRORS as error:
                raise ProgramError from error
        if type(function) is not Function:
            raise ProgramError("not callable")
        if self.calls == MAX_CALLS:
            raise Stop("budget")
        node, caller = function.node, self.scope
        parameters = [parameter.arg for parameter in node.args.args]
        self.pay(len(parameters))
        given = dict(zip(parameters, args))
        if len(args) > len(parameters) or given.keys() & keywords.keys() or keywords.keys() - set(parameters):
            raise ProgramError("arguments")
        names = dict(zip(parameters[::-1], function.defaults[::-1])) | given | keywords
        if len(names) < len(parameters):
            raise ProgramError("missing arguments")
        self.scope, self.calls = Scope(node, function.scope, names), self.calls + 1
        if type(node) is ast.Lambda:
            result = self.do(node.body)
        else:
            result = self.returned if self.block(node.body) else None
        self.scope, self.calls = caller, self.calls - 1
        return result

    # Nodes. A statement gives None, or how it leaves its block: "break", "continue" or "return"

    def do(self, node):
        self.steps -= 1
        if self.steps < 0:
            raise Stop("budget")
        return NODES[type(node)](self, node)

    def block(self, statements):
        for statement in statements:
            leave = self.do(statement)
            if leave:
                return leave

    def loop(self, node, rounds):
        """`for` and `while`."""
        for _ in rounds:
            leave = self.block(node.body)
            if leave in ("break", "return"):
                return leave if leave == "return" else None
        return self.block(node.orelse)

    def rounds(self, generators, values):
        """The rounds of a `for` or of a comprehension: each assigns the targets."""
        first, *rest = generators
        for value in self.each(values):
            self.assign(first.target, value)
            if all(self.do(test) for test in getattr(first, "ifs", [])):
                if rest:
                    yield from self.rounds(rest, self.do(rest[0].iter))
                else:
                    yield

    def comprehend(self, node, *elements):
        """The values of `elements` in all the rounds of a comprehension, which has a scope of its own."""
        values, caller = self.do(node.generators[0].iter), self.scope
        self.scope = Scope(node, caller, {})
        result = [[self.do(element) for element in elements] for _ in self.rounds(node.generators, values)]
        self.scope = caller
        return result

    def evaluate(self, nodes):
        """The values of a display or of arguments."""
        return [value for node in nodes
                for value in (self.listed(self.do(node.value)) if type(node) is ast.Starred else [self.do(node)])]

    def do_Return(self, node):
        self.returned = self.do(node.value) if node.value else None
        return "return"

    def do_Assign(self, node):
        value = self.do(node.value)
        for target in node.targets:
            self.assign(target, value)

    def do_AugAssign(self, node):
        target = node.target
        place = [self.do(target.value), self.do(target.slice)] if type(target) is ast.Subscript else []  # found once
        if place and type(place[1]) is slice:
            raise Stop("refused")
        old, value = self.item(*place) if place else self.do(target), self.do(node.value)
        if type(old) is list and type(node.op) is ast.Add:
            old.extend(self.listed(value))  # in place: other names of this list see it
        elif type(old) in (list, dict, set):
            raise Stop("refused")
        elif place:
            self.set_item(*place, self.operate(OPERATORS[type(node.op)], old, value))
        else:
            self.assign(target, self.operate(OPERATORS[type(node.op)], old, value))

    def do_Assert(self, node):
        if not self.do(node.test):
            raise ProgramError("assertion")

    def do_Import(self, node):
        for alias in node.names:
            self.pay(1)
            path = f"{node.level * '.'}{node.module}.{alias.name}" if type(node) is ast.ImportFrom else alias.name
            if path == "math.*":
                self.scope.names.update(MATH)
            elif path not in IMPORTS or type(node) is ast.Import and "." in path:
                raise Stop("refused")
            else:
                name = alias.asname or alias.name
                self.home(name)[name] = IMPORTS[path]

    def do_Lambda(self, node):
        more = node.args
        if more.posonlyargs or more.vararg or more.kwonlyargs or more.kwarg or getattr(node, "decorator_list", []):
            raise Stop("refused")
        return Function(node, [self.do(default) for default in node.args.defaults], self.scope)

    def do_Name(self, node):
        names = self.home(node.id)
        if node.id in names:
            return names[node.id]
        if names is self.module.names and node.id in BUILTINS:
            return BUILTINS[node.id]
        raise Stop("refused") if hasattr(builtins, node.id) else ProgramError("unknown name")

    def do_Attribute(self, node):
        value = self.do(node.value)
        if type(value) is Module and node.attr in value.names:
            return value.names[node.attr]
        if (type(value), node.attr) not in METHODS:
            raise Stop("refused")
        method = METHODS[type(value), node.attr]
        return Builtin(lambda m, *args, **keywords: method(m, value, *args, **keywords))

    def do_Call(self, node):
        if any(keyword.arg is None for keyword in node.keywords):
            raise Stop("refused")  # f(**keywords)
        function, args = self.do(node.func), self.evaluate(node.args)
        return self.call(function, args, {keyword.arg: self.do(keyword.value) for keyword in node.keywords})

    def do_UnaryOp(self, node):
        value = self.do(node.operand)
        if type(node.op) is ast.Not:
            return not value
        if type(value) is Linear:
            return self.combine(operator.mul, -1 if type(node.op) is ast.USub else 1, value)
        return self.apply(operator.neg if type(node.op) is ast.USub else operator.pos, value)

    def do_BoolOp(self, node):
        for part in node.values:
            value = self.do(part)
            if bool(value) is (type(node.op) is ast.Or):
                break
        return value

    def do_Compare(self, node):
        left = self.do(node.left)
        for comparison, part in zip(node.ops, node.comparators):
            right = self.do(part)
            if not self.compare(type(comparison), left, right):
                return False
            left = right
        return True

    def do_Dict(self, node):
        if None in node.keys:
            raise Stop("refused")  # {**other}
        return {self.key(self.do(key)): self.do(value) for key, value in zip(node.keys, node.values)}

    def do_FormattedValue(self, node):
        value = self.do(node.value)
        if node.conversion != -1:
            value = self.show(value, {ord("r"): repr, ord("s"): str, ord("a"): ascii}[node.conversion])
        return self.format(value, self.do(node.format_spec) if node.format_spec else "")


# ---- The tables: what the language has ----

NODES = {getattr(ast, name[3:]): method for name, method in vars(Interpreter).items() if name.startswith("do_")}
NODES |= {
    # statements
    ast.AnnAssign: lambda m, node: m.assign(node.target, m.do(node.value)) if node.value else None,
    ast.Break: lambda m, node: "break",
    ast.Continue: lambda m, node: "continue",
    ast.Expr: lambda m, node: m.do(node.value) and None,
    ast.For: lambda m, node: m.loop(node, m.rounds([node], m.do(node.iter))),
    ast.FunctionDef: lambda m, node: m.home(node.name).update({node.name: m.do_Lambda(node)}),
    ast.Global: lambda m, node: None,  # `annotate` has seen to it, and to Nonlocal
    ast.If: lambda m, node: m.block(node.body if m.do(node.test) else node.orelse),
    ast.ImportFrom: Interpreter.do_Import,
    ast.Nonlocal: lambda m, node: None,
    ast.Pass: lambda m, node: None,
    ast.While: lambda m, node: m.loop(node, iter(lambda: bool(m.do(node.test)), False)),
    # expressions
    ast.BinOp: lambda m, node: m.operate(OPERATORS[type(node.op)], m.do(node.left), m.do(node.right)),
    ast.Constant: lambda m, node: node.value,
    ast.DictComp: lambda m, node: {m.key(key): value for key, value in m.comprehend(node, node.key, node.value)},
    ast.GeneratorExp: lambda m, node: iter([value for value, in m.comprehend(node, node.elt)]),
    ast.IfExp: lambda m, node: m.do(node.body if m.do(node.test) else node.orelse),
    ast.JoinedStr: lambda m, node: m.apply(str.join, "", [m.do(part) for part in node.values]),
    ast.List: lambda m, node: m.evaluate(node.elts),
    ast.ListComp: lambda m, node: [value for value, in m.comprehend(node, node.elt)],
    ast.Set: lambda m, node: {m.key(value) for value in m.evaluate(node.elts)},
    ast.SetComp: lambda m, node: {m.key(value) for value, in m.comprehend(node, node.elt)},
    ast.Slice: lambda m, node: slice(*(part and m.do(part) for part in (node.lower, node.upper, node.step))),
    ast.Subscript: lambda m, node: m.item(m.do(node.value), m.do(node.slice)),
    ast.Tuple: lambda m, node: tuple(m.evaluate(node.elts)),
}
SCOPED = {ast.Module, ast.FunctionDef, ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp}
OPERATORS = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: operator.pow, ast.LShift: operator.lshift,
    ast.RShift: operator.rshift, ast.BitAnd: operator.and_, ast.BitOr: operator.or_, ast.BitXor: operator.xor,
}
COMPARISONS = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
KNOWN = {
    *NODES, *SCOPED, *OPERATORS, *COMPARISONS, ast.In, ast.NotIn, ast.Is, ast.IsNot, ast.And, ast.Or, ast.Not,
    ast.USub, ast.UAdd, ast.Load, ast.Store, ast.Starred, ast.comprehension, ast.arguments, ast.arg, ast.keyword,
    ast.alias,
}

# Some operations give more than they take. A bound of how many bits, elements or characters is known beforehand:
BITS = {
    operator.mul: bits,
    operator.pow: lambda a, b: bits(a) * abs(b),
    operator.lshift: lambda a, b: bits(a) + b,
    pow: lambda a, b, modulus=None: bits(a) * abs(b) if modulus is None else bits(b) * bits(modulus),
    round: lambda number, ndigits=None: 4 * abs(ndigits or 0),
    math.comb: lambda n, k: min(k, n - k) * bits(n),
    math.factorial: lambda n: n * (bits(n) - 1) + 1,  # n! is at most ((n + 1) / 2) ** n
    math.gcd: bits,
    math.lcm: bits,
    math.perm: lambda n, k=None: abs(n if k is None else k) * bits(n),
}
SIZES = {
    operator.mul: lambda a, b: max(len(x) * y if type(y) is int and type(x) not in NUMBERS else 0
                                   for x, y in ((a, b), (b, a))),
    str.replace: lambda text, old, new, *times: len(text) + text.count(old) * len(new),
    str.strip: lambda text, characters="": len(text) * len(characters),
    str.join: lambda text, parts: len(text) * len(parts) + sum(map(len, parts)),
}
# Others take no time to speak of, however large their arguments:
FREE = {
    len, next, operator.getitem, operator.setitem, operator.length_hint,
    list.append, list.pop, dict.get, dict.items, dict.keys, dict.values,
}
INDEXED = {range, round, operator.getitem, math.comb, math.factorial, math.gcd, math.isqrt, math.lcm, math.perm}
FORMAT = re.compile(r"(.?[<>=^])?[-+ ]?0?\d{0,2}[,_]?(\.\d{1,2})?[deEfFgGs%]?")  # no width above 99


def whole(number):
    """A Fraction without denominator as int."""
    return number.numerator if number.denominator == 1 else number


def host(function):
    """One of Python's functions as a function of ours."""
    return lambda m, *args, **keywords: m.apply(function, *args, **keywords)


MATH_NAMES = """acos asin atan atan2 ceil comb cos degrees exp fabs factorial floor fmod gcd hypot isclose isqrt lcm log
log10 log2 perm pow radians sin sqrt tan trunc"""
MATH = {name: Builtin(host(getattr(math, name))) for name in MATH_NAMES.split()}
MATH |= {"pi": math.pi, "e": math.e, "tau": math.tau, "inf": math.inf, "nan": math.nan}
MATH["prod"] = Builtin(lambda m, values, /, start=1: m.total(operator.mul, values, start))
SYMPY = {
    "Symbol": Builtin(lambda m, name: Linear(((m.apply(operator.add, "symbol ", name), Fraction(1)),))),
    "Eq": Builtin(lambda m, left, right: Equation(left, right)),
}
FRACTION = Builtin(lambda m, *numbers: m.apply(Fraction, *map(operator.pos, numbers)))
IMPORTS = {"math": Module(MATH), "fractions.Fraction": FRACTION}
IMPORTS |= {f"math.{name}": value for name, value in MATH.items()}
IMPORTS |= {f"sympy.{name}": value for name, value in SYMPY.items()}

# The authors' prefix imports the names of math and sympy
BUILTINS = {**MATH, **SYMPY, "math": IMPORTS["math"], "__name__": "__main__"}
HOST_BUILTINS = (abs, all, any, bool, divmod, float, int, len, next, pow, range, round)
BUILTINS |= {function.__name__: Builtin(host(function)) for function in HOST_BUILTINS}
BUILTINS |= {name: Builtin(run) for name, run in {
    "dict": lambda m, values=(), /, **named: m.dictionary(values) | named,
    "enumerate": lambda m, values, start=0: iter([
        (m.apply(operator.add, start, i), value) for i, value in enumerate(m.listed(values))]),
    "filter": lambda m, function, values: iter([x for x in m.listed(values) if m.call(function, [x], {})]),
    "format": Interpreter.format,
    "list": lambda m, values=(): m.listed(values),
    "isinstance": lambda m, value, kinds: any(
        isinstance(value, KINDS[kind]) for kind in (kinds if type(kinds) is tuple else [kinds])),
    "map": lambda m, function, first, *more: iter([m.call(function, row, {}) for row in m.rows([first, *more])]),
    "max": lambda m, *values, **options: m.extreme(max, *values, **options),
    "min": lambda m, *values, **options: m.extreme(min, *values, **options),
    "print": lambda m, *values, sep="", end="", flush=False: m.weigh(*values, sep, end),
    "reversed": lambda m, values: iter(m.listed(values)[::-1]),
    "set": lambda m, values=(), /: {m.key(value) for value in m.listed(values)},
    "solve_it": Interpreter.solve,
    "sorted": Interpreter.sort,
    "str": lambda m, value="": m.show(value),
    "sum": lambda m, values, start=0: m.total(operator.add, values, start),
    "tuple": lambda m, values=(): tuple(m.listed(values)),
    "zip": lambda m, *lists: iter(m.rows(lists)),
}.items()}
KINDS = {BUILTINS[kind.__name__]: kind for kind in (bool, int, float, str, list, tuple, dict, set)}  # for isinstance

METHODS = {(kind, name): host(getattr(kind, name)) for kind, names in {
    str: "count endswith find index isalpha isdigit lower replace split startswith strip title upper",
    float: "is_integer",
    list: "append clear copy count index insert remove reverse",
    tuple: "count index",
    dict: "copy items keys values",
    set: "copy discard remove",
}.items() for name in names.split()}
METHODS |= {
    (str, "join"): lambda m, text, parts: m.apply(str.join, text, m.listed(parts)),
    (list, "pop"): lambda m, items, *index: m.pay(len(items) // 64 if index else 0) or m.apply(list.pop, items, *index),
    (list, "extend"): lambda m, items, more: items.extend(m.listed(more)),
    (list, "sort"): lambda m, items, **options: m.apply(operator.setitem, items, slice(None), m.sort(items, **options)),
    (dict, "get"): lambda m, items, key, *default: items.get(m.key(key), *default),
    (dict, "setdefault"): lambda m, items, key, default=None: items.setdefault(m.key(key), default),
    (dict, "update"): lambda m, items, values=(), /, **named: items.update(m.dictionary(values) | named),
    (dict, "pop"): lambda m, items, key, *default: items.pop(m.key(key), *default),
    (set, "add"): lambda m, items, item: items.add(m.key(item)),
}
