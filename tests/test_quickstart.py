"""docs/quickstart.ipynb runs from its first cell to its last."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parent.parent / "docs" / "quickstart.ipynb"

# What a kernel does, in a process of its own; then what the cells left behind.
RUN = """
import json, sys
names = {"__name__": "__main__"}
for number, source in enumerate(json.load(sys.stdin)):
    exec(compile(source, f"cell {number}", "exec"), names)
from matplotlib import pyplot
stats = {name: result[1] for name, result in names["results"].items()}
texts = [result[0] for result in names["results"].values()]
facts = {
    "entries": {name: own.entries for name, own in stats.items()},
    "peaks": {name: own.peak_bytes for name, own in stats.items()},
    "lines": [len(line.get_xdata()) for line in pyplot.gcf().axes[0].lines],
    "texts": texts,
}
print("FACTS", json.dumps(facts))
"""


def code_cells() -> list[str]:
    notebook = json.loads(NOTEBOOK.read_text())
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]


@pytest.mark.model
@pytest.mark.slow
def test_every_cell_runs(smollm2_dir, tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", RUN],
        input=json.dumps(code_cells()),
        env={**os.environ, "MPLBACKEND": "Agg", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
    )
    assert result.returncode == 0, result.stderr
    assert "Paris" in result.stdout
    facts = json.loads(result.stdout.partition("FACTS ")[2])
    everything, late, early = facts["entries"].values()
    layers, page_size, read = 30, 32, 1500 + 48 - 1
    assert everything == read * layers
    for kept in (late, early):
        assert 256 * layers <= kept < (256 + page_size) * layers
    whole, late, early = facts["peaks"].values()
    assert early < 0.4 * late <= 0.4 * whole
    assert facts["lines"] == [48, 48, 48]
    assert len(set(facts["texts"])) > 1


def test_it_is_a_notebook_of_format_4_5():
    notebook = json.loads(NOTEBOOK.read_text())
    names = [cell["id"] for cell in notebook["cells"]]
    assert len(set(names)) == len(names)
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all({"outputs", "execution_count", "source"} <= set(cell) for cell in code)
