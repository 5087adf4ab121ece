"""How much a pickle would unpack to, told from its opcodes before any of it is unpacked. Standard library only.

A few bytes can stand for very much: what was built once is put into others again and again, and some functions make
as many bytes as a number says. Not here: which functions a pickle may call, which torch's own unpickler decides.
"""

import pickletools
from typing import Any

from mythos_edge.model.bounded_files import size_text

# A checkpoint of 20,000 tensors and their optimizer has some 2 MB of pickle, 1.5 million opcodes, 160,000 calls.
_MOST_BYTES = 32_000_000
_MOST_OPCODES = 2_000_000
_MOST_CALLS = 400_000
# Everything that stands in something counts again in what that stands in.
_MOST_UNPACKED = 200_000_000
# It takes a number of bytes to make.
_MAKES_BYTES = "bytearray"
_INTO_CONTAINERS = frozenset({"APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD"})
_CALLS = frozenset({"REDUCE", "NEWOBJ", "NEWOBJ_EX", "INST", "OBJ", "BUILD"})
_GETS = frozenset({"GET", "BINGET", "LONG_BINGET"})
_PUTS = frozenset({"PUT", "BINPUT", "LONG_BINPUT"})
_MARK = -1


def check_pickle_size(n_bytes: int) -> None:
    """Raises ValueError for a pickle of more bytes than a checkpoint can have, before it is read."""
    if n_bytes > _MOST_BYTES:
        raise ValueError(f"it has {size_text(n_bytes)} beside its tensors, expected at most {size_text(_MOST_BYTES)}")


def check_pickle(data: bytes) -> None:
    """Raises ValueError for a pickle that is damaged, or would unpack to far more than a checkpoint has."""
    # Of each value on the stack its size, in a cell of its own, as what it is put into may grow later.
    stack: list[list[int]] = []
    memo: dict[int, list[int]] = {}
    calls = unpacked = 0
    argument: Any
    for opcodes, (opcode, argument, _) in enumerate(pickletools.genops(data)):
        name = opcode.name
        calls += name in _CALLS
        if name in ("GLOBAL", "INST") and str(argument).rpartition(" ")[2] == _MAKES_BYTES:
            raise ValueError(f"it calls {_MAKES_BYTES}, which no checkpoint needs")
        if name == "MARK":
            stack.append([_MARK])
        elif name in _GETS:
            stack.append(memo.get(argument, [1]))
        elif name in _PUTS or name == "MEMOIZE":
            memo[len(memo) if argument is None else argument] = stack[-1] if stack else [1]
        else:
            unpacked += _apply(opcode, argument, stack)
        if unpacked > _MOST_UNPACKED or opcodes > _MOST_OPCODES or calls > _MOST_CALLS:
            raise ValueError("it unpacks to far more than a checkpoint has")


def _apply(opcode: Any, argument: Any, stack: list[list[int]]) -> int:
    """Does to the sizes on ``stack`` as the opcode does to values; returns the size of what it took from there."""
    taken = _taken(opcode, stack)
    if opcode.name in _INTO_CONTAINERS and taken:
        container, added = taken[0], sum(cell[0] for cell in taken[1:])
        container[0] += added
        stack.append(container)
        return added
    size = sum(cell[0] for cell in taken)
    made = len(argument) if isinstance(argument, str | bytes) else 0
    stack.extend([1 + made + size] for _ in opcode.stack_after)
    return size


def _taken(opcode: Any, stack: list[list[int]]) -> list[list[int]]:
    before = opcode.stack_before
    taken: list[list[int]] = []
    if pickletools.markobject in before:
        while stack and (cell := stack.pop())[0] != _MARK:
            taken.append(cell)
        before = before[: before.index(pickletools.markobject)]
    for _ in before:
        if stack:
            taken.append(stack.pop())
    return taken[::-1]
