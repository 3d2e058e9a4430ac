"""Prompts of the demo: a dozen short tasks, each about several subjects."""

from __future__ import annotations

from pathlib import Path

_TASKS = {
    "Write a long story about {}, with dialogue and an unexpected ending.": (
        "a lighthouse keeper who finds a door in the sea",
        "two sisters who inherit a bakery and a secret recipe",
        "a postman on a mountain where nobody writes letters",
        "an old robot that learns to repair violins",
    ),
    "Explain step by step how {}, for a curious ten-year-old.": (
        "rain forms in a cloud",
        "a bicycle stays upright",
        "bread dough rises",
        "a vaccine prepares the body",
    ),
    "Give a detailed plan for {}, with a list of what is needed.": (
        "a vegetable garden on a small balcony",
        "a week of hiking in the hills with two children",
        "a school theatre evening",
        "moving a small library to another town",
    ),
    "Compare {}. List the advantages and disadvantages of both, then conclude.": (
        "trains and buses for travel between cities",
        "wood and brick for building a house",
        "living in a village and living in a city",
        "paper books and electronic books",
    ),
    "Describe {} in as much detail as you can.": (
        "a market square early in the morning",
        "the life of a river from its source to the sea",
        "a kitchen in which a feast is being prepared",
        "an abandoned railway station in summer",
    ),
    "Write a conversation between {}. Each should speak at least ten times.": (
        "a student and an astronomer about the age of the universe",
        "a farmer and an engineer about a new dam",
        "a cat and a dog who share a house",
        "a doctor and a patient who cannot sleep",
    ),
    "Write an essay on {}, with an introduction, three arguments and a conclusion.": (
        "why people keep diaries",
        "whether cities should ban cars",
        "what makes a good teacher",
        "how music brings strangers together",
    ),
    "Write instructions for {}. Number the steps and explain the reason for each.": (
        "cooking a vegetable soup",
        "repairing a flat bicycle tire",
        "teaching a dog to wait",
        "painting a wooden fence",
    ),
    "Write a long letter from {}.": (
        "a sailor to his family after a storm",
        "a gardener to the new owner of the garden",
        "a grandmother to her grandchild in the year 2100",
        "a climber to the friend who stayed in the valley",
    ),
    "List twenty ideas for {}, with two sentences about each.": (
        "saving water at home",
        "a rainy afternoon with friends",
        "a small shop in a harbour town",
        "making a long train ride pleasant",
    ),
    "Tell the history of {} from its beginnings to today.": (
        "the wheel",
        "writing",
        "the clock",
        "the bridge",
    ),
    "Write a long poem about {}, and then explain every verse.": (
        "the first snow of the year",
        "a forgotten tool in a shed",
        "the light in a window at night",
        "a ship that comes home",
    ),
}


def built_in(count: int) -> list[str]:
    """The first `count` prompts, all tasks in turn; from the 49th on they repeat."""
    subjects = max(map(len, _TASKS.values()))
    prompts = [
        task.format(about[index]) for index in range(subjects) for task, about in _TASKS.items()
    ]
    return [prompts[index % len(prompts)] for index in range(count)]


def from_file(path: Path, count: int) -> list[str]:
    """The first `count` lines that are not empty, repeated if there are fewer.

    Raises:
        ValueError: no such file, or nothing in it.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--prompts {path}: {error}") from None
    prompts = [line for line in lines if line]
    if not prompts:
        raise ValueError(f"--prompts {path}: holds no prompt (one per line)")
    return [prompts[index % len(prompts)] for index in range(count)]
