"""Pickles, read without running them.

A pickle is a program: it may name any function of any module, and Python's unpickler calls it. This
reader knows the instructions that build plain data, and refuses all others. A class or function may be
named only if it is on the caller's list. It is not looked up; the reader only records how the pickle
uses it. Time and memory grow with the length of the pickle, whatever its content.
"""

from __future__ import annotations

import contextlib
import gc
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NoReturn

from checkpoint_conversion.pickles.values import (
    Call,
    Instance,
    Make,
    Named,
    OrderedMap,
    PickleError,
    Refer,
    Use,
    Uses,
)

# No size or seed has a number with more bytes, and printing one takes long.
_LONGEST_NUMBER = 64
# Numbers as keys can be chosen so that each new one is compared with all before it.
_MOST_NUMBER_KEYS = 10_000
_STOP, _MEMOIZE, _EMPTY_TUPLE = b".\x94)"
# Instructions before an unsigned number, and the number's bytes; some of them access the memo.
_GETS, _PUTS = b"hj", b"qr"
_WIDTHS = {ord("K"): 1, ord("M"): 2, ord("h"): 1, ord("j"): 4, ord("q"): 1, ord("r"): 4}
_NUMBERS = (int, float, bool, complex)


@dataclass(frozen=True, eq=False)
class _Callee:
    """A class or function on the stack that has to be called before the end."""

    named: Named
    use: Use


def read_pickle(data: bytes, uses: Uses, refer: Refer | None = None) -> Any:
    """Return the value of a pickle that ends where the bytes end.

    Args:
        data: The pickle, of protocol 2 to 5.
        uses: Gives the permitted uses of a class or function, by module and name; None if it must not
            be named.
        refer: Gives the value of a reference to an object outside of the pickle, or raises ValueError.
            None if the pickle must have no references.

    Raises:
        PickleError: The pickle is broken, longer than its value, or does something that is not
            permitted.
    """
    value, end = read_first_pickle(data, uses, refer)
    if end != len(data):
        raise PickleError(f"{len(data) - end} bytes follow its end")
    return value


def read_first_pickle(
    data: bytes, uses: Uses, refer: Refer | None = None, start: int = 0
) -> tuple[Any, int]:
    """Return the value of the pickle that begins at `start`, and its end; raises like `read_pickle`."""
    reader = _Reader(data, uses, refer, start)
    with _without_collector():
        return reader.read(), reader.at


@contextlib.contextmanager
def _without_collector() -> Iterator[None]:
    """Stop Python's garbage collector for the block.

    It would search again and again while millions of small objects are made, which takes as long as
    making them.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@dataclass
class _Reader:
    """The stack machine of pickles (see the standard library's pickletools)."""

    data: bytes
    uses: Uses
    refer: Refer | None
    at: int
    stack: list[Any] = field(default_factory=list)
    marks: list[list[Any]] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)
    # References on the stack that have to be called before the end.
    callees: int = 0

    def read(self) -> Any:
        begin = self.at
        try:
            self._run()
        except KeyError:
            self._refuse("has an instruction that builds no plain data, or is broken")
        except (IndexError, struct.error):
            self._refuse("is broken")
        except UnicodeDecodeError:
            self._refuse("has a text that is no UTF-8")
        if len(self.stack) != 1 or self.marks or begin + 2 > self.at:
            self._refuse("is broken")
        if self.callees:
            self._refuse("keeps a function as a value")
        return self.stack[0]

    def _run(self) -> None:
        """Follow the instructions up to the end.

        Three of four instructions are handled in the loop itself, for speed: a large checkpoint has
        millions.
        """
        data, table, memo, stack = self.data, _INSTRUCTIONS, self.memo, self.stack
        at, width, number = self.at, _WIDTHS, int.from_bytes
        while (code := data[at]) != _STOP:
            at += 1
            if code == _MEMOIZE:
                memo[len(memo)] = stack[-1]
            elif code in width:
                size = width[code]
                value: Any = number(data[at : at + size], "little")
                at += size
                if code in _GETS:
                    value = memo[value]
                    self.callees += type(value) is _Callee
                elif code in _PUTS:
                    memo[value] = stack[-1]
                    continue
                stack.append(value)
            elif code == _EMPTY_TUPLE:
                stack.append(())
            else:
                self.at = at
                table[code](self)
                at, stack = self.at, self.stack
        self.at = at + 1

    def _refuse(self, why: str) -> NoReturn:
        raise PickleError(f"it {why} (near byte {self.at})")

    # Parts of instructions.

    def take(self, count: int) -> bytes:
        """Return the next bytes."""
        begin, self.at = self.at, self.at + count
        if self.at > len(self.data):
            raise IndexError
        return self.data[begin : self.at]

    def size(self, width: int) -> int:
        """Return the next bytes as an unsigned number."""
        return int.from_bytes(self.take(width), "little")

    def line(self) -> str:
        """Return the text up to the end of the line."""
        end = self.data.find(b"\n", self.at, self.at + 1000)
        if end < 0:
            raise IndexError
        text = self.data[self.at : end].decode("utf-8")
        self.at = end + 1
        return text

    def popped_mark(self) -> list[Any]:
        """Return the values that were put on the stack since the last mark."""
        items, self.stack = self.stack, self.marks.pop()
        return items

    # Instructions.

    def protocol(self) -> None:
        if self.size(1) not in (2, 3, 4, 5):
            self._refuse("is of another protocol than 2 to 5")

    def frame(self) -> None:
        if self.size(8) > len(self.data) - self.at:
            raise IndexError

    def mark(self) -> None:
        self.marks.append(self.stack)
        self.stack = []

    def pop(self) -> None:
        if type(self.stack.pop()) is _Callee:
            self.callees -= 1

    def pop_mark(self) -> None:
        self.callees -= sum(type(item) is _Callee for item in self.popped_mark())

    def number(self, width: int) -> None:
        length = self.size(width)
        if length > _LONGEST_NUMBER:
            self._refuse(f"has a number of {length} bytes")
        self.stack.append(int.from_bytes(self.take(length), "little", signed=True))

    def text(self, width: int) -> None:
        self.stack.append(str(self.take(self.size(width)), "utf-8", "surrogatepass"))

    def binary(self, width: int) -> None:
        self.stack.append(self.take(self.size(width)))

    def tuple_of(self, count: int) -> None:
        if len(self.stack) < count:
            raise IndexError
        self.stack[-count:] = [tuple(self.stack[-count:])]

    def collect(self, kind: Callable[[list[Any]], Any]) -> None:
        items = self.popped_mark()
        self.stack.append(kind(items))

    def append(self) -> None:
        value = self.stack.pop()
        self._target(list).append(value)

    def appends(self) -> None:
        items = self.popped_mark()
        self._target(list).extend(items)

    def set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._put([key, value])

    def set_items(self) -> None:
        items = self.popped_mark()
        self._put(items)

    def dictionary(self) -> None:
        items = self.popped_mark()
        self.stack.append({})
        self._put(items)

    def add_items(self) -> None:
        items = self.popped_mark()
        self._target(set).update(_hashable(items, len(items)))

    def frozen_set(self) -> None:
        items = self.popped_mark()
        self.stack.append(frozenset(_hashable(items, len(items))))

    def _put(self, items: list[Any]) -> None:
        if len(items) % 2:
            raise IndexError
        target = self._target(dict, OrderedMap)
        keys = _hashable(items[::2], len(target) + len(items) // 2)
        target.update(zip(keys, items[1::2], strict=True))

    def _target(self, *kinds: type) -> Any:
        target = self.stack[-1]
        if type(target) not in kinds:
            self._refuse(f"fills a {type(target).__name__}")
        return target

    def name(self, module: Any, name: Any) -> None:
        """Put a class or function on the stack. A dot in its name would be an attribute of another object."""
        use = None
        if isinstance(module, str) and isinstance(name, str) and "." not in name:
            use = self.uses(module, name)
        if use is None:
            self._refuse(f"refers to {module}.{name}, which has no place in it")
        named = Named(module, name)
        self.callees += not use.is_value
        self.stack.append(named if use.is_value else _Callee(named, use))

    def name_in_line(self) -> None:
        self.name(self.line(), self.line())

    def name_on_stack(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self.name(module, name)

    def call(self) -> None:
        self._made("call")

    def new(self) -> None:
        self._made("new")

    def _made(self, how: str) -> None:
        arguments, callee = self.stack.pop(), self.stack.pop()
        named, use = self._callable(callee)
        make: Make | None = getattr(use, how, None)
        if make is None or type(arguments) is not tuple:
            self._refuse(f"calls {named}, which it must not")
        try:
            self.stack.append(make(named, arguments))
        except (ValueError, TypeError, AttributeError, IndexError) as error:
            self._refuse(f"gives {named} other arguments than it takes ({error})")

    def _callable(self, callee: Any) -> tuple[Any, Use | None]:
        if type(callee) is _Callee:
            self.callees -= 1
            return callee.named, callee.use
        if type(callee) is Named:
            return callee, self.uses(callee.module, callee.name)
        return type(callee).__name__, None

    def build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if type(target) is OrderedMap:
            # torch keeps the versions of modules there; no reader needs them.
            if not (isinstance(state, dict) and set(state) == {"_metadata"}):
                self._refuse("gives an OrderedDict attributes")
            return
        if type(target) is not Instance or target.state is not None or state is None:
            self._refuse(f"gives a state to a {type(target).__name__}")
        accepts = getattr(self.uses(target.cls.module, target.cls.name), "state", None)
        if accepts is None or not accepts(state):
            self._refuse(f"gives {target.cls} a state that it cannot have")
        target.state = state

    def persistent_id(self) -> None:
        if self.refer is None:
            self._refuse("refers to something outside of it")
        try:
            self.stack.append(self.refer(self.stack.pop()))
        except (ValueError, TypeError, AttributeError, IndexError) as error:
            self._refuse(f"has a broken reference ({error})")


def _hashable(keys: list[Any], total: int) -> list[Any]:
    """Return the keys, if their hashes are quick to compute and do not collide on purpose."""
    if set(map(type, keys)) <= {str}:
        return keys
    numbers = 0
    for key in keys:
        parts = key if type(key) is tuple and len(key) <= 16 else (key,)
        for part in parts:
            if type(part) in _NUMBERS:
                numbers += 1
            elif part is not None and type(part) not in (str, bytes, Named, Instance, Call):
                raise PickleError(f"it has a {type(part).__name__} as a key")
    if numbers and total > _MOST_NUMBER_KEYS:
        raise PickleError(
            f"it has {total} keys, some of them numbers; the limit is {_MOST_NUMBER_KEYS}"
        )
    return keys


def _unpacked(form: str) -> Callable[[_Reader], None]:
    width = struct.calcsize(form)
    return lambda reader: reader.stack.append(struct.unpack(form, reader.take(width))[0])


def _constant(make: Callable[[], Any]) -> Callable[[_Reader], None]:
    return lambda reader: reader.stack.append(make())


_INSTRUCTIONS: dict[int, Callable[[_Reader], None]] = {
    ord(code): instruction
    for code, instruction in {
        b"\x80": _Reader.protocol,
        b"\x95": _Reader.frame,
        b"(": _Reader.mark,
        b"0": _Reader.pop,
        b"1": _Reader.pop_mark,
        b"N": _constant(lambda: None),
        b"\x88": _constant(lambda: True),
        b"\x89": _constant(lambda: False),
        b"J": _unpacked("<i"),
        b"G": _unpacked(">d"),
        b"\x8a": lambda reader: reader.number(1),
        b"\x8b": lambda reader: reader.number(4),
        b"\x8c": lambda reader: reader.text(1),
        b"X": lambda reader: reader.text(4),
        b"\x8d": lambda reader: reader.text(8),
        b"C": lambda reader: reader.binary(1),
        b"B": lambda reader: reader.binary(4),
        b"\x8e": lambda reader: reader.binary(8),
        b"\x96": lambda reader: reader.binary(8),  # a bytearray
        b"]": _constant(list),
        b"}": _constant(dict),
        b"\x8f": _constant(set),
        b"\x85": lambda reader: reader.tuple_of(1),
        b"\x86": lambda reader: reader.tuple_of(2),
        b"\x87": lambda reader: reader.tuple_of(3),
        b"t": lambda reader: reader.collect(tuple),
        b"l": lambda reader: reader.collect(list),
        b"d": _Reader.dictionary,
        b"a": _Reader.append,
        b"e": _Reader.appends,
        b"s": _Reader.set_item,
        b"u": _Reader.set_items,
        b"\x90": _Reader.add_items,
        b"\x91": _Reader.frozen_set,
        b"c": _Reader.name_in_line,
        b"\x93": _Reader.name_on_stack,
        b"R": _Reader.call,
        b"\x81": _Reader.new,
        b"b": _Reader.build,
        b"Q": _Reader.persistent_id,
    }.items()
}
