"""Evaluates a Program of Thought: a small Python program that leaves its result in `answer`.

    >>> run_program("eggs = 16 - 3 - 4\\nanswer = eggs * 2")
    Fraction(18, 1)
    >>> evaluate_program("while True: pass")
    (None, 'budget')

A model wrote the program, so Python never runs it. `ast.parse` reads it, and the class Interpreter
walks the tree. It knows a small part of Python: arithmetic, exact fractions, variables, loops,
functions, lists, sets and dicts, strings and how to format them, parts of `math`, and linear
equations in sympy's words (`Symbol`, `Eq`) and in those of the authors (`solve_it`).

Promised, for every text:
- No way out. There are no files, and a program makes no classes. A value is an int, float,
  Fraction, bool, str, None, list, tuple, dict, set, range or of a class below. Attributes exist
  only as `module.name` and `value.method`, from closed tables, and so does what `import` finds.
- It ends, within seconds and 200 MB. One budget of steps pays for everything before it is done.
  There is no clock, so the verdict is the same on every machine.
- Nothing is raised, and nothing half done counts. A number needs a program that ran to its end.
- Where Python gives a number, this is the same number or none. (For equations it is sympy's, as an
  exact Fraction; for a sum of floats that of Python 3.12.) But generators, zip, map, filter,
  enumerate and reversed are computed at once, to their end: they do not see a later change of
  their source. A set has its own order. Annotations are not evaluated.
- What is unknown is refused, not guessed: `match`, `try`, `with`, `class`, `f(**d)`, `"%(name)s"`,
  `"{0.real}"`, `"{!r}"`, `:=` in a generator ...

Not promised: safety from bugs in CPython's own parser, or in a thread with a stack below 512 kB; the
last word on a deep recursion, which is "budget" if the caller is deep in the stack.

Read it from both ends: `evaluate_program` says what is done, the tables what the language has.
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
from string import Formatter

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
    """The evaluator gives up. The text is the reason that evaluate_program gives."""


def stop_if(condition, reason="refused"):
    if condition:
        raise Stop(reason)


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
    "bug"        this evaluator failed, not the program: it is printed to stderr
    """
    interpreter = Interpreter()
    try:
        tree = interpreter.module.node = parse(source)
        interpreter.block(tree.body)
        value = interpreter.module.names.get("answer")
    except Stop as stop:
        return None, str(stop)
    except (RecursionError, MemoryError):
        return None, "budget"
    except RuntimeError:  # a dict or set changed its size while a loop walked it
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
    stop_if(type(source) is not str or len(source) > MAX_SOURCE)
    stop_if(len(re.findall(r"[-+~]|\*\*|\bnot\b|\blambda\b", source)) > MAX_SIGNS)
    try:
        tree = ast.parse(source, "<pot>")
        annotate(tree)
        compile(tree, "<pot>", "exec", dont_inherit=True)  # for the rest of the syntax; the code is thrown away
    except (SyntaxError, ValueError) as error:  # ValueError: a null byte, half of a surrogate pair
        raise Stop("error") from error
    return tree


def annotate(tree):
    """Refuse unknown nodes and oversized trees. Write on modules, functions and comprehensions which names are `local`
    to them (by Python's rule those that they assign anywhere), and which they have `declared` global or nonlocal."""
    todo, count = [(tree, None, 0)], 0
    while todo:
        node, scope, depth = todo.pop()
        kind, count = type(node), count + 1
        stop_if(kind not in KNOWN or count > MAX_NODES or depth > MAX_DEPTH)
        if kind is ast.Constant:
            stop_if(type(node.value) not in PLAIN or bits(node.value) > MAX_BITS)  # bytes, 2j, ...
        elif kind is ast.Name and type(node.ctx) is not ast.Load:
            scope.local.add(node.id)
        elif kind in (ast.FunctionDef, ast.alias):
            scope.local.add(getattr(node, "asname", None) or node.name)
        elif kind in (ast.Global, ast.Nonlocal):
            scope.declared.update(dict.fromkeys(node.names, kind))
        elif kind is ast.NamedExpr:  # from a comprehension it assigns to the scope around it
            while type(scope) in (ast.ListComp, ast.SetComp, ast.DictComp):
                scope = scope.around
            stop_if(scope is None or type(scope) is ast.GeneratorExp)  # Python may leave that early
        if kind in SCOPED:
            node.around, node.local, node.declared = scope, set(), {}
            scope = node
        elif kind is ast.arguments:
            scope.local.update(parameter.arg for parameter in node.args)
            scope = None  # no `:=` in a default: that is evaluated elsewhere
        todo.extend((child, scope, depth + 1) for child in ast.iter_child_nodes(node))


# ---- Values ----

# (2x - 3) / y: above (("", -3), ("x", 2)), below (("y", 1),). The constant stands under "".
Linear = make_dataclass("Linear", ["above", "below"], frozen=True)
# Of a = b: a - b. It is true or false, as in sympy, if no unknown is left in it.
Equation = make_dataclass("Equation", ["zero"], frozen=True, namespace={
    "__bool__": lambda self: stop_if(type(self.zero) is Linear, "error") or self.zero == 0})
# Without a text: Python puts that of any value into some of its errors, and here it would be that of all names in reach.
Module = make_dataclass("Module", ["names"], eq=False, repr=False)
Builtin = make_dataclass("Builtin", ["run"], eq=False, repr=False)  # a function of this file: (interpreter, *arguments)
Function = make_dataclass("Function", ["node", "defaults", "scope"], eq=False, repr=False)  # and the scope where it stood
Scope = make_dataclass("Scope", ["node", "outer", "names"], eq=False, repr=False)  # of a module, call or comprehension
Iterator = type(iter([]))  # from zip, map, a generator ...: computed at once, but consumed once

NUMBERS = {int, float, bool, Fraction}
EXACT = {int, Fraction}
ONE = (("", 1),)  # below the line of 2x - 3
PLAIN = {int, float, bool, str, type(None)}
VIEWS = {type({}.keys()), type({}.values()), type({}.items())}
CONTAINERS = {list, tuple, set, dict, *VIEWS}
ITERABLES = {str, range, Iterator, *CONTAINERS}
UNPRINTABLE = {set, Iterator, Module, Builtin, Function, Linear, Equation}  # their text is not Python's, or differs by run
VALUES = {Fraction, *PLAIN, *ITERABLES, *UNPRINTABLE}
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
        self.steps, self.calls = STEPS, 0
        self.scope = self.module = Scope(None, None, {})

    # The budget, and Python's own operations under it

    def pay(self, size, limit=STEPS, per_step=1):
        # What is over its limit costs all that is left, and so does NaN: the exponent of a power may be that
        self.steps -= max(0, int(size) // per_step) if size <= limit else math.inf
        stop_if(self.steps < 0, "budget")

    def weigh(self, *values, refuse=()):
        """Pay for all that Python may visit to compare, copy or print `values`. A shared list is paid at every visit:
        after 64 times `a = [a, a]` there are only 64 lists, but comparing them would take forever."""
        todo = [(value, 0) for value in values]
        while todo:
            value, depth = todo.pop()
            kind = type(value)
            stop_if(kind in refuse)
            stop_if(depth > MAX_NEST, "budget")
            if kind is str:
                self.pay(len(value) // 8)
            elif kind in EXACT:
                self.pay(bits(value) // 64)
            elif kind is range:
                self.pay(self.apply(len, value))
            elif kind in CONTAINERS or kind in (Linear, Equation):
                items = value.items() if kind is dict else value
                items = items if kind in CONTAINERS else vars(value).values()
                # A set keeps the table of its elements when they are gone
                self.pay(len(items) + 1 + (value.__sizeof__() // 1024 if kind is set else 0))
                todo.extend((item, depth + 1) for item in items)

    def apply(self, function, *args, **keywords):
        """function(*args, **keywords) for one of Python's own operations: the arguments are paid for, the growth is
        bounded, and the result is checked, so that nothing outside our closed set of values gets in."""
        self.pay(1)
        if function in INDEXED:  # the solution of an equation may be an index, as in sympy
            args = list(map(whole, args))
        free = function in FREE
        if not free and not NUMBERS.issuperset(map(type, args)):
            self.weigh(*args, *keywords.values())
        try:
            if function in BITS:
                self.pay(BITS[function](*args, **keywords), MAX_BITS, 64)
            if function in SIZES:
                self.pay(SIZES[function](*args, **keywords), MAX_SIZE)
            result = function(*args, **keywords)
        except HOST_ERRORS as error:
            raise Stop("error") from error
        kind = type(result)
        stop_if(kind not in VALUES)  # such as the complex number (-8) ** 0.5
        if kind is range:  # its numbers are made without being paid for
            self.pay(20 * bits(result.start, result.stop, result.step), MAX_BITS, 64)
        elif kind in EXACT:
            self.pay(bits(result), MAX_BITS, 64)
        elif not free and (kind is str or kind in CONTAINERS):
            self.pay(len(result), MAX_SIZE, 8 if kind is str else 1)
        return result

    def each(self, values):
        """Yield the elements one by one, a step for each: `for i in range(10 ** 15)` may leave early."""
        stop_if(type(values) not in ITERABLES, "error")
        if type(values) is set:
            self.weigh(values)
            if not NUMBERS.issuperset(map(type, values)):
                values = sorted(values, key=repr)  # Python's own order differs from run to run
        for value in values:
            self.pay(1)
            yield value

    def listed(self, values):
        """The elements as a new list."""
        stop_if(self.apply(operator.length_hint, values) > MAX_SIZE, "budget")
        return list(self.each(values))

    def key(self, value):
        """`value`, if it may be a dict key or in a set; not NaN, whose place depends on its address. More than
        70 bits have a price: many such values may have one hash, as all multiples of 2**61 - 1 have, and a
        set of them takes quadratic time."""
        self.weigh(value)
        size = 0  # bits
        for part in value if type(value) is tuple else [value]:
            size += 64 if type(part) is float else bits(part) + 1
            if type(part) is Linear:
                self.unknown(part)
            else:
                stop_if(type(part) not in PLAIN or part != part)
        self.pay(4 * size if size > 70 else 0)
        return value

    # Operations of the language that are more than one of Python's

    def operate(self, operation, a, b):
        """a + b ...: `operation` is a function of the module operator."""
        if type(a) is Linear or type(b) is Linear:
            return self.combine(operation, a, b)
        stop_if({type(a), type(b)} & VIEWS)  # a set of what was not a key
        if operation is operator.mod and type(a) is str:
            stop_if("%" in PERCENT.sub("", a))
            self.weigh(b, refuse=UNPRINTABLE)
        return self.apply(operation, a, b)

    def total(self, operation, values, start=0):
        """sum and math.prod. A sum of floats is that of Python 3.12 and later, whatever runs here:
        what each rounding loses is kept and added at the end (Neumaier)."""
        lost = 0.0
        for value in self.each(values):
            before, start = start, self.operate(operation, start, value)
            if operation is operator.add and type(before) is type(value) is float:
                small, large = sorted([value, before], key=abs)
                lost += large - start + small
        return start + lost if type(start) is float and math.isfinite(lost) else start

    def compare(self, comparison, a, b):
        if comparison in (ast.In, ast.NotIn):
            if type(b) in (dict, set):
                found = self.key(a) in b
            elif type(b) is range and type(a) is int:
                found = a in b  # at once, however long it is
            elif type(b) is Iterator:
                found = any(self.apply(operator.contains, [value], a) for value in self.each(b))  # leaves the rest
            else:
                found = self.apply(operator.contains, b, a)
            return found is (comparison is ast.In)
        if comparison in (ast.Is, ast.IsNot):
            stop_if(a is not None and b is not None)  # equal numbers are one object by accident
            return (a is b) is (comparison is ast.Is)
        stop_if(Equation in (type(a), type(b)))
        return self.apply(COMPARISONS[comparison], a, b)

    def at(self, operation, container, index, *value):
        """container[index], container[index] = value and del container[index]."""
        if type(index) is slice:
            stop_if(operation is not operator.getitem)
            self.weigh(container)
        elif type(container) is dict:
            self.key(index)
        return self.apply(operation, container, index, *value)

    def order(self, pick, values, /, *more, key=None, **options):
        """min, max and sorted: `pick` chooses among the places 0, 1 ... by the keys."""
        values = [values, *more] if more else self.listed(values)
        if not values:
            return self.apply(pick, values, **options)
        keys = values if key is None else [self.call(key, [value], {}) for value in values]
        before = self.steps
        self.weigh(keys)
        if pick is sorted:
            self.pay((before - self.steps) * len(keys).bit_length())  # so often each is compared
        picked = self.apply(pick, range(len(keys)), key=keys.__getitem__, **options)
        return [values[i] for i in picked] if pick is sorted else values[picked]

    def rows(self, lists):
        """zip: one element of each in turn, so that one iterator may stand for several lists."""
        lists = [values if type(values) is Iterator else self.listed(values) for values in lists]
        rows = list(zip(*lists))
        self.pay(len(rows) * (1 + len(lists)))
        return rows

    def dictionary(self, values):
        pairs = [self.listed(pair) for pair in self.each(values.items() if type(values) is dict else values)]
        return {self.key(key): value for key, value in pairs}

    def show(self, value, form=str):
        self.weigh(value, refuse=UNPRINTABLE)
        return self.apply(form, value)

    def format(self, value, spec=""):
        if spec == "":
            return self.show(value)
        stop_if(type(value) not in {str, *NUMBERS} or not FORMAT.fullmatch(spec))
        value = whole(value)
        return self.apply(format, self.apply(float, value) if type(value) is Fraction else value, spec)

    def fill(self, text, /, *args, **named):
        """text.format(...). Only the fields {}, {2}, {name} and {:.2f} are let in."""
        stop_if(re.search(r"\{(?!\{|\w*[:}])", text))
        formatter = Formatter()
        formatter.format_field = self.format
        return self.apply(str.join, "", [formatter.vformat(text, args, named)])

    # Equations: linear ones, solved exactly. A symbol is a Linear, Eq(left, right) an Equation

    def unknown(self, symbol):
        """The name in a bare symbol."""
        stop_if(type(symbol) is not Linear)
        name = symbol.above[-1][0]
        stop_if(symbol != Linear(((name, 1),), ONE))
        return name

    def terms(self, value):
        """Two sums, above and below the line: {unknown: coefficient}. 0.1 is 1/10, as in sympy."""
        if type(value) is Linear:
            self.pay(2 * len(value.above + value.below))
            return dict(value.above), dict(value.below)
        stop_if(type(value) not in NUMBERS, "error")
        return self.plus({}, {"": self.apply(Fraction, str(value))}), dict(ONE)

    def plus(self, a, b, factor=1):
        """The sum a + factor * b. Terms that are zero are left out."""
        self.pay(4 * len(a) + 4 * len(b))  # a Fraction takes more time than its step pays for
        result = dict(a)
        for name, value in b.items():
            value = self.apply(operator.mul, factor, value)
            result[name] = self.apply(operator.add, a.get(name, 0), value)
        return {name: value for name, value in result.items() if value}

    def times(self, a, b):
        """The product of two sums, of which one is a number."""
        number, other = (a, b) if a.keys() <= {""} else (b, a)
        stop_if(number.keys() - {""})
        return self.plus({}, other, number.get("", 0))

    def combine(self, operation, a, b):
        """a + b, a - b, a * b and a / b where no unknown is multiplied by an unknown."""
        (a, below_a), (b, below_b) = self.terms(a), self.terms(b)
        if operation is operator.truediv:
            b, below_b = below_b, b
        if operation in (operator.mul, operator.truediv):
            above = self.times(a, b)
        else:
            stop_if(operation not in (operator.add, operator.sub))
            above = self.plus(self.times(a, below_b), self.times(b, below_a), operation(0, 1))  # 1 or -1
        below = self.times(below_a, below_b)
        stop_if(not below, "error")  # a division by zero
        # So that equal quotients look equal, the first coefficient below becomes 1
        scale = self.apply(Fraction, 1, below[min(below)])
        above, below = self.plus({}, above, scale), self.plus({}, below, scale)
        if not above or above.keys() == below.keys() == {""}:
            return above.get("", Fraction(0))
        return Linear(tuple(sorted(above.items())), tuple(sorted(below.items())))

    def solve(self, equations, unknowns):
        """{unknown: value} by Gauss-Jordan elimination. Without a solution every value is None, as
        in solve_it. a / b = c is solved as a - b * c = 0. What makes b zero is no solution."""
        equations, unknowns = (x if type(x) in (list, tuple) else [x] for x in (equations, unknowns))
        names = [self.unknown(symbol) for symbol in unknowns]
        sides = [self.terms(x.zero if type(x) is Equation else x) for x in equations]
        rows, end = [above for above, _ in sides] + [below for _, below in sides], len(sides)
        stop_if(set().union(*rows) - {"", *names})  # the solution would hold an unknown
        for i, name in enumerate(names):
            pivot = next((row for row in rows[i:end] if name in row), None)
            stop_if(pivot is None)  # the solution, if there is one, would hold an unknown
            rows.remove(pivot)
            pivot = self.plus({}, pivot, self.apply(Fraction, 1, pivot[name]))
            rows = [self.plus(row, pivot, -row.get(name, 0)) for row in rows]
            rows.insert(i, pivot)
        if any(rows[len(names):end]) or not all(rows[end:]):
            return dict.fromkeys(unknowns)
        return {symbol: Fraction(-row.get("", 0)) for symbol, row in zip(unknowns, rows)}

    # Names and calls

    def home(self, name):
        """The names of the scope that `name` belongs to."""
        scope = self.scope
        while scope.outer and (name not in scope.node.local or name in scope.node.declared):
            self.pay(1)
            scope = self.module if scope.node.declared.get(name) is ast.Global else scope.outer
        return scope.names

    def place(self, target):
        """(container, index) of a target. The names of a scope are a container, too."""
        if type(target) is ast.Name:
            return self.home(target.id), target.id
        stop_if(type(target) is not ast.Subscript)  # an attribute
        return self.do(target.value), self.do(target.slice)

    def assign(self, target, value):
        self.pay(1)
        if type(target) is ast.Name:
            self.home(target.id)[target.id] = value
        elif type(target) in (ast.Tuple, ast.List):
            values, targets = self.listed(value), list(target.elts)
            for i, part in enumerate(targets):
                if type(part) is ast.Starred:  # a, *rest, b = values
                    end = len(values) - (len(targets) - i - 1)
                    targets[i], values[i:end] = part.value, [values[i:end]]
            stop_if(len(values) != len(targets), "error")
            for part, value in zip(targets, values):
                self.assign(part, value)
        else:
            self.at(operator.setitem, *self.place(target), value)

    def call(self, function, args, keywords):
        if type(function) is Builtin:
            try:
                return function.run(self, *args, **keywords)
            except HOST_ERRORS as error:
                raise Stop("error") from error
        stop_if(type(function) is not Function, "error")
        stop_if(self.calls == MAX_CALLS, "budget")
        node, caller = function.node, self.scope
        parameters = [parameter.arg for parameter in node.args.args]
        self.pay(len(parameters))
        stop_if(len(args) > len(parameters), "error")
        given = dict(zip(parameters, args))
        names = dict(zip(reversed(parameters), reversed(function.defaults))) | given | keywords
        stop_if(given.keys() & keywords.keys() or names.keys() != set(parameters), "error")
        self.scope, self.calls = Scope(node, function.scope, names), self.calls + 1
        leave = [self.do(node.body)] if type(node) is ast.Lambda else self.block(node.body)
        self.scope, self.calls = caller, self.calls - 1
        return leave[0] if leave else None

    # Nodes. A statement gives None, or how it leaves its block: "break", "continue" or [the value it returns]

    def do(self, node):
        self.steps -= 1  # without `pay`, which takes as long as all the rest
        if self.steps < 0:
            raise Stop("budget")
        return NODES[type(node)](self, node)

    def block(self, statements):
        for statement in statements:
            leave = self.do(statement)
            if leave:
                return leave

    def loop(self, node, rounds):  # for, while
        for _ in rounds:
            leave = self.block(node.body)
            if leave and leave != "continue":
                return leave if leave != "break" else None
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

    def comprehend(self, node):
        """The elements of a comprehension, in a scope of its own. Those of a dict are pairs."""
        values, caller = self.do(node.generators[0].iter), self.scope
        element = ast.Tuple([node.key, node.value]) if type(node) is ast.DictComp else node.elt
        self.scope = Scope(node, caller, {})
        result = [self.do(element) for _ in self.rounds(node.generators, values)]
        self.scope = caller
        return result

    def evaluate(self, nodes):
        """The values of a display or of arguments."""
        return [value for node in nodes
                for value in (self.listed(self.do(node.value)) if type(node) is ast.Starred else [self.do(node)])]

    def do_Assign(self, node):
        value = self.do(node.value)
        for target in node.targets:
            self.assign(target, value)

    def do_AugAssign(self, node):
        target = node.target
        if type(target) is ast.Subscript:  # its parts are evaluated once
            stop_if(type(target.slice) is ast.Slice)
            target = ast.Subscript(*map(ast.Constant, self.place(target)))
        old, value = self.do(target), self.do(node.value)
        if type(old) is list and type(node.op) is ast.Add:
            old.extend(self.listed(value))  # in place: other names of this list see it
        else:
            stop_if(type(old) in (list, dict, set))
            old = self.operate(OPERATORS[type(node.op)], old, value)
        self.assign(target, old)

    def do_Import(self, node):
        stop_if(getattr(node, "level", 0))  # from . import ...
        module = getattr(node, "module", "")  # "" for `import math`
        for alias in node.names:
            self.pay(1)
            known, name = IMPORTS.get(module, {}), alias.asname or alias.name
            if (module, name) == ("math", "*"):
                self.scope.names.update(MATH)
            else:
                stop_if(alias.name not in known)
                self.home(name)[name] = known[alias.name]

    def do_Lambda(self, node):
        more = node.args
        stop_if(more.posonlyargs or more.vararg or more.kwonlyargs or more.kwarg or getattr(node, "decorator_list", []))
        return Function(node, [self.do(default) for default in node.args.defaults], self.scope)

    def do_Name(self, node):
        names = self.home(node.id)
        if node.id not in names and names is self.module.names:
            names = BUILTINS
        if node.id not in names:
            raise Stop("refused" if hasattr(builtins, node.id) else "error")
        stop_if(names[node.id] is UNKNOWN)
        return names[node.id]

    def do_Attribute(self, node):
        value = self.do(node.value)
        if type(value) is Module and node.attr in value.names:
            return value.names[node.attr]
        method = METHODS.get((type(value), node.attr))
        stop_if(method is None)
        return Builtin(bound(value, method))

    def do_Call(self, node):
        stop_if(any(keyword.arg is None for keyword in node.keywords))  # f(**keywords)
        function, args = self.do(node.func), self.evaluate(node.args)
        return self.call(function, args, {keyword.arg: self.do(keyword.value) for keyword in node.keywords})

    def do_UnaryOp(self, node):
        value = self.do(node.operand)
        if type(node.op) is ast.Not:
            return not value
        sign = OPERATORS[type(node.op)]
        return self.combine(operator.mul, sign(1), value) if type(value) is Linear else self.apply(sign, value)

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

    def do_FormattedValue(self, node):
        value = self.do(node.value)
        if node.conversion != -1:
            value = self.show(value, {"r": repr, "s": str, "a": ascii}[chr(node.conversion)])
        return self.format(value, self.do(node.format_spec) or "")


# ---- The tables: what the language has ----

NODES = {
    "AnnAssign": lambda m, node: node.value and m.assign(node.target, m.do(node.value)),
    "Assert": lambda m, node: stop_if(not m.do(node.test), "error"),
    "Break": lambda m, node: "break",
    "Continue": lambda m, node: "continue",
    "Expr": lambda m, node: [m.do(node.value)] and None,
    "For": lambda m, node: m.loop(node, m.rounds([node], m.do(node.iter))),
    "FunctionDef": lambda m, node: m.home(node.name).update({node.name: m.do_Lambda(node)}),
    "If": lambda m, node: m.block(node.body if m.do(node.test) else node.orelse),
    "ImportFrom": Interpreter.do_Import,
    "Return": lambda m, node: [m.do(node.value)],
    "While": lambda m, node: m.loop(node, iter(lambda: bool(m.do(node.test)), False)),
    "BinOp": lambda m, node: m.operate(OPERATORS[type(node.op)], m.do(node.left), m.do(node.right)),
    "Constant": lambda m, node: node.value,
    "Delete": lambda m, node: [m.at(operator.delitem, *m.place(x)) for x in node.targets] and None,
    "Dict": lambda m, node: stop_if(None in node.keys) or {  # {**other}
        m.key(m.do(key)): m.do(value) for key, value in zip(node.keys, node.values)},
    "DictComp": lambda m, node: {m.key(key): value for key, value in m.comprehend(node)},
    "GeneratorExp": lambda m, node: iter(m.comprehend(node)),
    "IfExp": lambda m, node: m.do(node.body if m.do(node.test) else node.orelse),
    "JoinedStr": lambda m, node: m.apply(str.join, "", [m.do(part) for part in node.values]),
    "List": lambda m, node: m.evaluate(node.elts),
    "ListComp": Interpreter.comprehend,
    "NamedExpr": lambda m, node: m.assign(node.target, m.do(node.value)) or m.do(node.target),
    "Set": lambda m, node: {m.key(value) for value in m.evaluate(node.elts)},
    "SetComp": lambda m, node: {m.key(value) for value in m.comprehend(node)},
    "Slice": lambda m, node: slice(m.do(node.lower), m.do(node.upper), m.do(node.step)),
    "Subscript": lambda m, node: m.at(operator.getitem, m.do(node.value), m.do(node.slice)),
    "Tuple": lambda m, node: tuple(m.evaluate(node.elts)),
} | {name[3:]: run for name, run in vars(Interpreter).items() if name.startswith("do_")}
NODES = {getattr(ast, name): run for name, run in NODES.items()}
# Nothing to do: `annotate` has seen to global and nonlocal; None is what is left out, as in a[1:]
NODES |= dict.fromkeys((ast.Global, ast.Nonlocal, ast.Pass, type(None)), lambda m, node: None)


def named(module, names):
    return [getattr(module, name) for name in names.split()]


SCOPED = set(named(ast, "Module FunctionDef Lambda ListComp SetComp DictComp GeneratorExp"))
OPERATORS = dict(zip(
    named(ast, "Add Sub Mult Div FloorDiv Mod Pow LShift RShift BitAnd BitOr BitXor USub UAdd"),
    named(operator, "add sub mul truediv floordiv mod pow lshift rshift and_ or_ xor neg pos")))
COMPARISONS = dict(zip(named(ast, "Eq NotEq Lt LtE Gt GtE"), named(operator, "eq ne lt le gt ge")))
KNOWN = {*NODES, *SCOPED, *OPERATORS, *COMPARISONS, *named(ast, """In NotIn Is IsNot And Or Not Load
Store Del Starred comprehension arguments arg keyword alias""")}

# Some operations give more than they take. A bound of how many bits, elements or characters is known beforehand:
BITS = {
    operator.mul: bits, math.gcd: bits, math.lcm: bits,
    operator.pow: lambda a, b: bits(a) * abs(b),
    operator.lshift: lambda a, b: bits(a) + b,
    pow: lambda a, b, modulus=None: bits(a) * abs(b) if modulus is None else bits(b) * bits(modulus),
    round: lambda number, ndigits=None: 4 * abs(ndigits or 0),
    math.comb: lambda n, k: min(k, n - k) * bits(n),
    math.factorial: lambda n: n * (bits(n) - 1) + 1,  # n! is at most ((n + 1) / 2) ** n
    math.perm: lambda n, k=None: abs(n if k is None else k) * bits(n),
}
SIZES = {
    operator.mul: lambda a, b: sum(  # [0] * 3 and 3 * [0]
        len(x) * operator.index(y) for x, y in ((a, b), (b, a)) if type(x) not in NUMBERS),
    str.replace: lambda text, old, new, *times: len(text) + text.count(old) * len(new),
    str.strip: lambda text, characters="": len(text) * len(characters),
    str.join: lambda text, parts: len(text) * len(parts) + sum(map(len, parts)),
    operator.delitem: lambda items, index: len(items) // 64,
    list.pop: lambda items, *index: len(items) // 64 if index else 0,
}
# Others take no time to speak of, however large their arguments:
FREE = {len, next, list.append, list.pop, *named(dict, "items keys values"),
        *named(operator, "getitem setitem delitem length_hint")}
INDEXED = {range, round, operator.getitem, operator.delitem,
           *named(math, "comb factorial gcd isqrt lcm perm")}
FORMAT = re.compile(r"(.?[<>=^])?[-+ ]?0?\d{0,2}[,_]?(\.\d{1,2})?[deEfFgGs%]?")  # no width above 99
PERCENT = re.compile(r"%(%|[-+ #0]*([1-9]\d?)?(\.\d{1,2})?[diufFeEgGsrxX])")  # nor here


def whole(value):
    """A Fraction without denominator as int, all else as it is."""
    return value.numerator if type(value) is Fraction and value.denominator == 1 else value


def bound(first, run=Interpreter.apply):
    """A function of ours whose first argument is given: bound(math.sqrt) applies that of Python."""
    return lambda m, *args, **keywords: run(m, first, *args, **keywords)


def keyed(method):
    """A method whose first argument is a key."""
    return lambda m, items, key, *more: method(items, m.key(key), *more)


MATH = {name: Builtin(bound(getattr(math, name))) for name in """acos asin atan atan2 ceil comb cos
degrees exp fabs factorial floor fmod gcd hypot isclose isqrt lcm log log10 log2 perm pow radians
sin sqrt tan trunc""".split()}
MATH |= {name: getattr(math, name) for name in ("pi", "e", "tau", "inf", "nan")}
MATH["prod"] = Builtin(lambda m, values, /, start=1: m.total(operator.mul, values, start))
SYMPY = {
    "Symbol": Builtin(lambda m, name: Linear(((m.apply(operator.add, "symbol ", name), 1),), ONE)),
    "Eq": Builtin(lambda m, left, right: Equation(m.combine(operator.sub, left, right))),
}
IMPORTS = {"": {"math": Module(MATH)}, "math": MATH, "sympy": SYMPY, "fractions": {
    "Fraction": Builtin(lambda m, *numbers: m.apply(Fraction, *map(operator.pos, numbers)))}}
UNKNOWN = object()  # of a module that may be imported, but not used; behind it what it has
for row in """__future__ annotations; collections Counter OrderedDict defaultdict deque namedtuple;
datetime date datetime timedelta; decimal Decimal getcontext; fractions; functools lru_cache reduce;
itertools accumulate chain combinations permutations product; json; math dist fsum; numpy array;
pandas; random; re; statistics mean median mode stdev; string; time; typing Any Dict List Optional
Tuple Union; sympy Rational simplify solve sqrt symbols""".split(";"):
    module, *names = row.split()
    IMPORTS[""].setdefault(module, UNKNOWN)
    IMPORTS[module] = dict.fromkeys(names, UNKNOWN) | IMPORTS.get(module, {})

# The authors' prefix imports the names of math and sympy
BUILTINS = {**MATH, **SYMPY, "math": IMPORTS[""]["math"], "__name__": "__main__"}
BUILTINS |= {function.__name__: Builtin(bound(function)) for function in (
    abs, all, any, bool, float, int, len, next, pow, range, round)}
BUILTINS |= {name: Builtin(run) for name, run in {
    "dict": lambda m, values=(), /, **named: m.dictionary(values) | named,
    "divmod": lambda m, a, b: (m.operate(operator.floordiv, a, b), m.operate(operator.mod, a, b)),
    "enumerate": lambda m, values, start=0: iter([
        (m.apply(operator.add, start, i), value) for i, value in enumerate(m.listed(values))]),
    "filter": lambda m, function, values: iter([x for x in m.listed(values) if m.call(function, [x], {})]),
    "format": Interpreter.format,
    "list": lambda m, values=(): m.listed(values),
    "isinstance": lambda m, value, kinds: any(
        isinstance(value, KINDS[kind]) for kind in (kinds if type(kinds) is tuple else [kinds])),
    "map": lambda m, function, first, *more: iter([m.call(function, row, {}) for row in m.rows([first, *more])]),
    "max": bound(max, Interpreter.order),
    "min": bound(min, Interpreter.order),
    "print": lambda m, *values, sep="", end="", flush=False: m.weigh(*values, sep, end),
    "reversed": lambda m, values: iter(m.listed(values)[::-1]),
    "set": lambda m, values=(), /: {m.key(value) for value in m.listed(values)},
    "solve_it": Interpreter.solve,
    "sorted": lambda m, values, /, **options: m.order(sorted, values, **options),
    "str": lambda m, value="": m.show(value),
    "sum": bound(operator.add, Interpreter.total),
    "tuple": lambda m, values=(): tuple(m.listed(values)),
    "zip": lambda m, *lists: iter(m.rows(lists)),
}.items()}
KINDS = {BUILTINS[kind.__name__]: kind for kind in (bool, int, float, str, list, tuple, dict, set)}  # for isinstance

METHODS = {(kind, name): wrap(getattr(kind, name)) for wrap, kind, names in (
    (bound, str, """count endswith find index isalpha isdigit lower replace split startswith strip
        title upper"""), (bound, float, "is_integer"),
    (bound, list, "append clear copy count index insert pop remove reverse"),
    (bound, dict, "copy items keys values"), (keyed, dict, "get pop setdefault"),
    (bound, set, "copy"), (keyed, set, "add discard remove"), (bound, tuple, "count index"),
) for name in names.split()}
METHODS |= {
    (str, "format"): Interpreter.fill,
    (str, "join"): lambda m, text, parts: m.apply(str.join, text, m.listed(parts)),
    (list, "extend"): lambda m, items, more: items.extend(m.listed(more)),
    (list, "sort"): lambda m, items, **options: m.apply(
        operator.setitem, items, slice(None), m.order(sorted, items, **options)),
    (dict, "update"): lambda m, items, values=(), /, **named: items.update(m.dictionary(values) | named),
}
