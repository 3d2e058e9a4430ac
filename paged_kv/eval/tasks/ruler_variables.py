"""RULER's variable tracking (vt): which variables have a value, directly or from each other?"""

from __future__ import annotations

from itertools import repeat
from random import Random
from string import ascii_uppercase

from paged_kv.eval.tasks.haystacks import NOISE, Growing, hide
from paged_kv.eval.tasks.prompts import Draft, TextPrompt
from paged_kv.eval.tasks.ruler_needles import DEPTHS

MAX_NEW_TOKENS = 30
_HOPS = 4  # variables of the chain after the first
_SHOT_LINES = 5  # of noise; RULER's has as many as 500 tokens hold
_TEMPLATE = TextPrompt(
    "Memorize and track the chain(s) of variable assignment hidden in the following text."
    "\n\n{text}",
    "\nQuestion: Find all variables that are assigned the value {value} in the text above.",
    " Answer: According to the chain(s) of variable assignment in the text above, "
    "{count} variables are assigned the value {value}, they are: ",
)


def draft(generator: Random) -> Draft:
    """One example: a chain of 5 variables, in noise; before it a short one with its answer."""
    names, chain, value = _chain(generator, letters=3)
    facts = list(zip(_depths(generator), chain, strict=True))
    shot = _prompt([NOISE] * _SHOT_LINES, facts, value).text + " ".join(names)
    names, chain, value = _chain(generator, letters=5)
    facts = list(zip(_depths(generator), chain, strict=True))
    filler = Growing(repeat(NOISE))

    def build(count: int) -> TextPrompt:
        asked = _prompt(filler.first(count), facts, value)
        return TextPrompt(f"{shot}\n\n{asked.context}", asked.question, asked.answer_prefix)

    return Draft(build, tuple(names))


def _depths(generator: Random) -> list[int]:
    return sorted(generator.sample(DEPTHS, _HOPS + 1))


def _chain(generator: Random, letters: int) -> tuple[list[str], list[str], str]:
    """Names of variables, their assignments in order, and the value of all."""
    names: list[str] = []
    while len(names) < _HOPS + 1:
        name = "".join(generator.choice(ascii_uppercase) for _ in range(letters))
        if name not in names:
            names.append(name)
    value = str(generator.randrange(10000, 100000))
    sources = [value, *(f"VAR {name}" for name in names[:-1])]
    chain = [f"VAR {name} = {source}" for name, source in zip(names, sources, strict=True)]
    return names, chain, value


def _prompt(noise: list[str], facts: list[tuple[int, str]], value: str) -> TextPrompt:
    text = "\n".join(hide(noise, facts))
    return TextPrompt(
        _TEMPLATE.context.format(text=text),
        _TEMPLATE.question.format(value=value),
        _TEMPLATE.answer_prefix.format(value=value, count=_HOPS + 1),
    )
