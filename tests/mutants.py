"""Classic mistakes of kernels, compiled into one module beside what they replace.

Compiling a module for each mistake would take most of the time of the tests. So a process says by
the environment variable `COTNET_MUTANT` which one it makes; without it, it makes none.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

CHOICE = "COTNET_MUTANT"
# To be read before the kernels.
PRELUDE = f"""
#include <cstdlib>
namespace cotnet {{
inline const char* const chosen_mutant = std::getenv("{CHOICE}");
inline const int mutant = chosen_mutant ? std::atoi(chosen_mutant) : -1;
inline bool mistaken(int number) {{ return mutant == number; }}
}}  // namespace cotnet
"""


class Mutation(NamedTuple):
    """A change of one place of a file of csrc/cuda, the first that reads like `old`.

    What stands between two `@` is replaced by `new`, or all of it where there are none: whole
    statements, or one expression. `op` is the operator whose kernels show it, where the file does
    not tell.
    """

    file: str
    old: str
    new: str
    op: str | None = None


class Place(NamedTuple):
    """The characters of a file that a mistake replaces."""

    file: str
    start: int
    stop: int

    def meets(self, other: Place) -> bool:
        return self.file == other.file and self.start < other.stop and other.start < self.stop


def place_of(mutation: Mutation, folder: Path) -> Place:
    text = (folder / mutation.file).read_text()
    before, old, behind = mutation.old.split("@") if "@" in mutation.old else ("", mutation.old, "")
    found = text.find(before + old + behind)
    assert found >= 0, f"{mutation.file} has changed: the mutation finds no {mutation.old!r}"
    start = found + len(before)
    return Place(mutation.file, start, start + len(old))


def apart(mutations: dict[int, Mutation], folder: Path) -> list[dict[int, Mutation]]:
    """The numbered mutations in as few groups as keep their places apart."""
    groups: list[dict[int, Mutation]] = []
    for number, mutation in mutations.items():
        place = place_of(mutation, folder)
        for group in groups:
            if not any(place.meets(place_of(other, folder)) for other in group.values()):
                group[number] = mutation
                break
        else:
            groups.append({number: mutation})
    return groups


def plant(mutations: dict[int, Mutation], folder: Path) -> None:
    """Write the mutations, whose places are apart, into the files of a folder."""
    placed = [(place_of(mutation, folder), number) for number, mutation in mutations.items()]
    # From the end of a file, so that the places before it stay where they are.
    for place, number in sorted(placed, reverse=True):
        path = folder / place.file
        text = path.read_text()
        old = text[place.start : place.stop]
        new = choice(number, old, mutations[number].new)
        path.write_text(text[: place.start] + new + text[place.stop :])


def choice(number: int, old: str, new: str) -> str:
    """`old`, or `new` in the mutant of this number: statements or an expression."""
    if old.rstrip().endswith(";"):
        return f"{{ if (mistaken({number})) {{ {new} }} else {{ {old} }} }}\n"
    return f"(mistaken({number}) ? ({new}) : ({old}))"
