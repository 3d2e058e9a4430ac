"""`paged-kv generate`, run in this process, and what transformers would write in its place."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path
from typing import Any

import engines  # noqa: F401  sets the environment of vLLM
import tiny_models
import torch

from paged_kv import cli
from paged_kv.hf.driver.conversation import load_tokenizer

TEMPLATE = (
    "{% for m in messages %}{{ 't30' if m.role == 'user' else 't31' }} {{ m.content }} t33 "
    "{% endfor %}{% if add_generation_prompt %}t31 {% endif %}"
)
PROMPT = " ".join(f"t{30 + 7 * index % 60}" for index in range(150))
NEW = 40


def model_for_chats(path: Path) -> str:
    """The directory of a small random Llama that has a chat template."""
    directory = tiny_models.saved("llama", path, tokenizer=True)
    Path(directory, "chat_template.jinja").write_text(TEMPLATE)
    return directory


def statistic(notes: str, name: str) -> int:
    found = re.findall(rf"\b{name} (\d+)", notes)
    assert found, notes
    return int(found[-1])


def continued(tiny: str, tokens: list[int], **options: Any) -> tuple[list[int], str]:
    """What transformers writes with its own cache: tokens and text."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    ids = torch.tensor([tokens])
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 2, **options}
    output = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    new = output[0, len(tokens) :].tolist()
    return new, load_tokenizer(Path(tiny)).decode(new, skip_special_tokens=True)


def reference(tiny: str, **options: Any) -> str:
    """What follows PROMPT."""
    return continued(tiny, load_tokenizer(Path(tiny))(PROMPT).input_ids, **options)[1]


class Command:
    """`paged-kv generate` with a model; called with arguments, and what stdin would hold."""

    def __init__(self, model: str, capsys: Any, monkeypatch: Any) -> None:
        self.model, self.capsys, self.monkeypatch = model, capsys, monkeypatch

    def __call__(self, *args: Any, stdin: str = "", model: Any = None) -> tuple[int, str, str]:
        """(exit code, text, statistics and notes)."""
        self.monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        code = cli.main(["generate", "--model", str(model or self.model), *map(str, args)])
        output = self.capsys.readouterr()
        return code, output.out, output.err
