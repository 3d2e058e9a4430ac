"""Runs `paged-kv eval perplexity` in this process."""

import json

from paged_kv import cli


def run(capsys, model, file, *args) -> list[dict]:
    """Its rows."""
    command = ["eval", "perplexity", "--model", str(model), "--text", str(file), "--json"]
    assert cli.main([*command, *map(str, args)]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]
