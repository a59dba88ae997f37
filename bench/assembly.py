"""What compiled kernels are read for: the width of their accesses, the length of their loops, and how often an instruction stands there."""

from __future__ import annotations

import functools
import re
from pathlib import Path

from fusedres import kernels

PTX_ACCESS = re.compile(r"\b(ld|st)\.global\S*?(?:\.v(\d))?\.[bfsu](\d+)\b|\bcp\.async\.c[ag]\.\S+ .*, 0x([0-9a-f]+)")
# since gfx11 with the bits in the name
AMD_ACCESS = re.compile(
    r"\b(?:global|buffer|flat)_(load|store)_"
    r"(?:(dword|ushort|short|sshort|ubyte|byte|sbyte)(?:x(\d))?|(?:d16_)?(?:hi_)?[bui](\d+))"
)
AMD_BITS = {"dword": 32, "ushort": 16, "short": 16, "sshort": 16, "ubyte": 8, "byte": 8, "sbyte": 8}
PLACE = re.compile(r"(?://|;) (\w+\.py):(\d+):(\d+)")
LABEL, INSTRUCTION = re.compile(r"(\.L_x_\d+):"), re.compile(r"\s*/\*[0-9a-f]+\*/\s+(.*?);")
# a call from which nothing returns is how a far place is reached
JUMP = re.compile(r"\b(?:BRA|CALL\.REL\.NOINC)\b.*?(\.L_x_\d+)")
OPERAND = re.compile(r"tl\.(?:load|store)\((\w+)")


@functools.cache
def _lines(file: str) -> list[str]:
    path = Path(kernels.__path__[0]) / file
    return path.read_text().splitlines() if path.exists() else []


def access_widths(assembly: str) -> tuple[dict[str, int], dict[str, int]]:
    """The narrowest load from and store to every tensor in bits, by the name in the source line of the access."""
    loads: dict[str, int] = {}
    stores: dict[str, int] = {}
    operand, inline = "?", False
    for line in assembly.splitlines():
        if " inline asm" in line:
            inline = "begin" in line
        elif ".loc" in line and not inline:  # inside, the compiler counts the lines of the assembly as the source's
            place = PLACE.search(line)
            if place:
                lines, number, column = _lines(place[1]), int(place[2]), int(place[3])
                call = OPERAND.match(lines[number - 1], column - 1) if 0 < number <= len(lines) else None
                operand = call[1] if call else "?"
        if access := PTX_ACCESS.search(line):
            kind, vector, size, copied = access.groups()
            bits = int(copied, 16) * 8 if copied else int(vector or 1) * int(size)
        elif access := AMD_ACCESS.search(line):
            kind, unit, times, size = access.groups()
            bits = AMD_BITS[unit] * int(times or 1) if unit else int(size)
        else:
            continue
        widths = stores if kind in ("st", "store") else loads
        widths[operand] = min(bits, widths.get(operand, bits))
    return loads, stores


def longest_loop(listing: str) -> int:
    """The instructions of the longest loop without another one in it, of NVIDIA's machine code; 0 where there is none."""
    places, jumps, here = dict[str, int](), list[tuple[int, int]](), 0
    for line in listing.splitlines():
        if label := LABEL.match(line):
            places[label[1]] = here
        elif instruction := INSTRUCTION.match(line):
            jump = JUMP.search(instruction[1])
            if jump and jump[1] in places:
                jumps.append((places[jump[1]], here))
            here += 1
    inner = [(a, b) for a, b in jumps if not any((c, d) != (a, b) and a <= c and d <= b for c, d in jumps)]
    return max((last - first + 1 for first, last in inner), default=0)


def instructions(listing: str) -> list[str]:
    """The instructions of NVIDIA's machine code."""
    return [found[1] for line in listing.splitlines() if (found := INSTRUCTION.match(line))]


def shortest_cycle(listing: str, word: str) -> int:
    """The instructions of the shortest way from an instruction ``word`` back to it, of all of them: a step of a loop, without what a branch
    skips. 0 where no way leads back."""
    code, labels = _program(listing)
    best = 0
    for start in (i for i, text in enumerate(code) if re.search(rf"\b{word}\b", text)):
        seen, front, length = {start}, [start], 0
        while front and (not best or length < best):
            length += 1
            front = [after for at in front for after in _behind(code[at], at, labels) if after < len(code)]
            if start in front:
                best = length
                break
            front = [at for at in dict.fromkeys(front) if at not in seen]
            seen.update(front)
    return best


def shortest_way(listing: str, word: str) -> int:
    """The instructions of the shortest way from the first one through an instruction ``word`` to an end. 0 where there is none."""
    code, labels = _program(listing)
    front, seen, length = [(0, False)], {(0, False)}, 0
    while front:
        length += 1
        after: list[tuple[int, bool]] = []
        for at, passed in front:
            passes = passed or bool(re.search(rf"\b{word}\b", code[at]))
            if passes and code[at].startswith("EXIT"):
                return length
            after += [(place, passes) for place in _behind(code[at], at, labels) if place < len(code)]
        front = [state for state in dict.fromkeys(after) if state not in seen]
        seen.update(front)
    return 0


def _program(listing: str) -> tuple[list[str], dict[str, int]]:
    """The instructions, and where labels stand among them."""
    code, labels = list[str](), dict[str, int]()
    for line in listing.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(code)
        elif found := INSTRUCTION.match(line):
            code.append(found[1])
    return code, labels


def _behind(instruction: str, at: int, labels: dict[str, int]) -> list[int]:
    """Where the program goes on."""
    jump = JUMP.search(instruction)
    if jump and jump[1] in labels:
        # one under a condition may not be taken: of the thread (@P0), or of the warp (U), written beside the target
        maybe = instruction.startswith("@") or re.search(r"\bBRA(\.\S+)? !?U", instruction)
        return [labels[jump[1]], *([at + 1] if maybe else [])]
    return [] if re.match(r"(EXIT|RET)\b", instruction) else [at + 1]


def count(names: str, text: str) -> dict[str, int]:
    """How often each of the words ``names`` stands there, those that do."""
    counts = {name: len(re.findall(rf"\b{name}\b", text)) for name in names.split()}
    return {name: found for name, found in counts.items() if found}
