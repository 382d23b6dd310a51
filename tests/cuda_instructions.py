"""The parts of a kernel's machine code that run equally often: loops, and what is in none of them.

Left out is what full warps never reach: code for divided ones (behind BRA.DIV) and called functions
(divisions of 64 bits).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

# A loop is one of sums that has so many FMAs, and more than so many for each function: what an
# exponential or a division takes.
SUMS = 20
OF_FUNCTION = 4
# Of a branch that has its predicate behind its name.
CONDITION = re.compile(r"\s+!?U?P\d")
LABEL = re.compile(r"^(\.L_\w+):")
INSTRUCTION = re.compile(
    r"^\s+/\*[0-9a-f]{4,}\*/\s+(?P<when>@!?U?PT?\d*\s+)?(?P<name>[A-Z][A-Z0-9_.]*)(?P<rest>.*)"
)


@dataclass
class Block:
    """Instructions that run one after another."""

    names: list[str] = field(default_factory=list)
    next: set[int] = field(default_factory=set)

    def leaves(self) -> bool:
        """Whether it ends with a branch. Full warps take none that is for divided ones."""
        first, *rest = self.names[-1].split(".") if self.names else ("",)
        return first in ("BRA", "EXIT", "RET") and "DIV" not in rest

    def count(self) -> Counter:
        """Instructions, and of these FMAs, parts of functions, moves of 16 bytes."""
        found = Counter()
        for name in self.names:
            first, *rest = name.split(".")
            found["all"] += first != "NOP"
            found["fma"] += {"FFMA": 1, "FFMA2": 2}.get(first, 0)
            found["functions"] += first == "MUFU"
            if first in ("LDGSTS", "LDG", "STG") and "128" in rest:
                found["moves"] += 1
        return found


def blocks_of(lines: Iterable[str]) -> list[Block]:
    """The code of a kernel, cut at labels and branches, with the ways between its pieces. Only
    what the first piece leads to."""
    blocks, starts, jumps = [Block()], {}, []
    falls = True  # whether the last piece leads to the next one
    for line in lines:
        label, found = LABEL.match(line), INSTRUCTION.match(line)
        if label or (found and blocks[-1].leaves()):
            blocks.append(Block())
            if falls:
                blocks[-2].next.add(len(blocks) - 1)
            falls = True
        if label:
            starts[label[1]] = len(blocks) - 1
        elif found:
            blocks[-1].names.append(found["name"])
            if blocks[-1].leaves():
                if target := re.search(r"\.L_\w+", found["rest"]):
                    jumps.append((len(blocks) - 1, target[0]))
                falls = bool(found["when"] or CONDITION.match(found["rest"]))
    for block, label in jumps:
        if label in starts:
            blocks[block].next.add(starts[label])
    return _reached(blocks)


def _reached(blocks: list[Block]) -> list[Block]:
    seen, rest = {0}, [0]
    while rest:
        more = {n for n in blocks[rest.pop()].next if n < len(blocks)} - seen
        seen |= more
        rest += more
    number = {old: new for new, old in enumerate(sorted(seen))}
    return [
        Block(blocks[old].names, {number[n] for n in blocks[old].next if n in number})
        for old in sorted(seen)
    ]


def loops_of(blocks: list[Block]) -> list[set[int]]:
    """The blocks of every loop: those of a way back to a block that all ways there lead through."""
    before: list[list[int]] = [[] for _ in blocks]
    for number, block in enumerate(blocks):
        for follower in block.next:
            before[follower].append(number)
    through = [(1 << len(blocks)) - 1] * len(
        blocks
    )  # in bits: what every way to a block leads through
    through[0], changed = 1, True
    while changed:
        changed = False
        for number in range(1, len(blocks)):
            ways = -1
            for other in before[number]:
                ways &= through[other]
            if (ways := ways | 1 << number) != through[number]:
                through[number], changed = ways, True
    loops: dict[int, set[int]] = {}
    for number, block in enumerate(blocks):
        for head in block.next:
            if through[number] >> head & 1:
                body, rest = loops.setdefault(head, {head}), [number]
                while rest:
                    if (one := rest.pop()) not in body:
                        body.add(one)
                        rest += before[one]
    return list(loops.values())


@dataclass
class Part:
    """The code of a kernel that is in a loop, and in none within it."""

    instructions: int
    walks: bool = False  # it is of a loop around a loop of sums
    sums: bool = False  # of an innermost loop of sums, but for loops without any in it
    moves: int = 0  # of 16 bytes, in another innermost loop


def _sums(count: Counter) -> bool:
    return count["fma"] >= max(SUMS, OF_FUNCTION * count["functions"] + 1)


def parts_of(lines: Iterable[str]) -> list[Part]:
    """The code of a kernel, in parts that run equally often."""
    blocks = blocks_of(lines)
    counts = [block.count() for block in blocks]
    loops = sorted(loops_of(blocks), key=len)
    own = [loop.difference(*(other for other in loops if other < loop)) for loop in loops]
    counted = [sum((counts[block] for block in part), Counter()) for part in own]
    busy = [loop for loop, count in zip(loops, counted, strict=True) if _sums(count)]
    sums = [loop for loop in busy if not any(other < loop for other in busy)]
    walks = [loop for loop in loops if any(other < loop for other in sums)]
    parts = []
    for loop, count in zip(loops, counted, strict=True):
        moving = loop not in sums and not any(other < loop for other in loops)
        walking = any(loop <= other for other in walks)
        parts.append(Part(count["all"], walking, loop in sums, count["moves"] if moving else 0))
    taken = set().union(*loops)
    rest = sum(counts[block]["all"] for block in range(len(blocks)) if block not in taken)
    return [Part(rest), *parts]
