"""Counts docstring sentences of a package that open headless, per 1,000; fails at 15 or more.

python tests/english.py [FOLDER OR FILE ...]    default: src/wsd_hf

A sentence is headless if a clause stands where a reader expects a noun with its type, or a verb: "What each row begins with"
instead of "Token ids of each row's prompt". Counted are sentences that open with an interrogative or a relative (What, Who,
Whose, Whom, Which, Whether, How, Why, Whatever, ...), with Nobody, with That before a clause ("That a word is complete shows
later", not "That is the default"), or with Where unless a main clause follows ("Where each row ends", not "Where rows differ,
each has its own").

All strings that are statements count as docstrings: those of modules, classes and functions, and those under fields and
constants. Code in them does not count. An entry of a section (Args, Attributes, Raises, ...) opens with its name, so it is a
sentence that is never headless. A sentence ends with a full stop, question or exclamation mark, or with its paragraph.

The package had 95 per 1,000 when this gate was made; transformers has 1, PEFT 3, Accelerate 3, huggingface_hub 4. Two habits
more that strangers stumble over are counted after that, and decide nothing.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

LIMIT = 15
"""Headless openings per 1,000 sentences at which the gate fails."""

SOURCE = Path(__file__).parent.parent / "src" / "wsd_hf"

CODE = re.compile(r"```.*?```|^\s*>>>.*?(?=\n\s*\n|\Z)", re.DOTALL | re.MULTILINE)

HEADLESS = re.compile(
    r"(What|Who|Whom|Whose|Which|How|Why)(ever)?\b(?!,)|Whether\b|Nobody\b"
    r"|That (a|an|the|it|they|he|she|we|you|this|these|those|each|every|no|all|there)\b"
    r"|Where(ver)? (?![^:;]*, )"
)

HABITS = {
    "behind, in front of": re.compile(r"\b(behind|in front of)\b", re.IGNORECASE),
    "says, tells, knows, asks, wants, stands": re.compile(r"\b(say|tell|know|ask|want|stand)s?\b", re.IGNORECASE),
}
"""Words to look at: prepositions of place used of time, and verbs of persons used of things."""


def docstrings(source: str) -> Iterator[tuple[int, str]]:
    """The docstrings in a module's source, and the lines on which they begin.

    >>> list(docstrings("RATE = 2\\n'Hertz.'"))
    [(2, 'Hertz.')]
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.lineno, node.value.value


def sentences(docstring: str) -> Iterator[tuple[int, str]]:
    """The sentences of a docstring, and the lines, counted from 0, on which they begin.

    >>> list(sentences("Rows kept. Rows\\nlost\\n\\n>>> 1\\n1\\n\\nAll."))
    [(0, 'Rows kept.'), (0, 'Rows lost'), (6, 'All.')]
    """
    prose = CODE.sub(lambda code: "\n" * code.group().count("\n"), docstring)
    for sentence in re.finditer(r"\S.*?(?:[.!?](?=\s)|(?=\n\s*\n)|\Z)", prose, re.DOTALL):
        yield prose.count("\n", 0, sentence.start()), " ".join(sentence.group().split())


def headless(sentence: str) -> bool:
    """True if a sentence opens with a clause instead of a noun or a verb.

    >>> headless("What each row begins with."), headless("Token ids of each row's prompt.")
    (True, False)
    >>> headless("That a word is complete shows later."), headless("That is the default.")
    (True, False)
    >>> headless("Where each row ends."), headless("Where rows differ, each has its own.")
    (True, False)
    """
    return bool(HEADLESS.match(sentence))


def main(places: Iterable[Path]) -> int:
    """Prints the headless sentences of all modules below some places, and the counts; returns the exit status."""
    found = 0
    total = 0
    habits = dict.fromkeys(HABITS, 0)
    for file in sorted(file for place in places for file in ([place] if place.is_file() else place.rglob("*.py"))):
        for line, docstring in docstrings(file.read_text("utf-8")):
            for offset, sentence in sentences(docstring):
                total += 1
                for name, pattern in HABITS.items():
                    habits[name] += len(pattern.findall(sentence))
                if headless(sentence):
                    found += 1
                    print(f"{file}:{line + offset}: {sentence}")
    rate = 1000 * found / max(total, 1)
    print(f"{found} of {total} sentences open headless: {rate:.0f} per 1,000; fewer than {LIMIT} are allowed")
    for name, count in habits.items():
        print(f"{name}: {count}")
    return int(rate >= LIMIT)


if __name__ == "__main__":
    sys.exit(main([Path(place) for place in sys.argv[1:]] or [SOURCE]))
