"""`paged-kv capacity`: figures computed by hand, and what is printed."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from typing import Any

import pytest
from capacity_models import GEMMA_4B, LLAMA_8B, write
from documents import ROOT

from paged_kv import cli
from paged_kv.capacity.model import read_model
from paged_kv.capacity.sizes import read_size, show_size
from paged_kv.capacity.weights import weight_bytes

GIB = 1 << 30
PREFILL = '{"compress_prefill": true}'


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return write(tmp_path_factory.mktemp("models") / "Llama-3.1-8B", LLAMA_8B)


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    return write(tmp_path_factory.mktemp("models") / "Gemma-3-4B", GEMMA_4B)


def rows(capsys: Any, model: str, *args: str) -> list[dict[str, Any]]:
    assert cli.main(["capacity", "--model", model, "--json", *args]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def table(capsys: Any, model: str, *args: str) -> list[str]:
    assert cli.main(["capacity", "--model", model, *args]) == 0
    return capsys.readouterr().out.splitlines()


# ---- by hand: 2 x 32 layers x 8 heads x 128 numbers x 2 bytes = 128 KiB a token, 4 MiB a page


def test_full(llama, capsys):
    (row,) = rows(capsys, llama, "--memory", "40GiB")
    assert row["bytes_per_token"] == 128 << 10
    assert (row["pages"], row["page_bytes"]) == (10_240, 4 << 20)
    assert (row["prompt_entries"], row["prompt_bytes"]) == (8192, GIB)
    assert (row["decode_entries"], row["decode_bytes"]) == (9216, 288 * (4 << 20))
    assert row["sequences"] == round(10_239 / 288, 2)
    assert row["prompts"] == round(10_239 / 256, 2)
    assert (row["vllm_kv_cache_tokens"], row["vllm_max_concurrency"]) == (327_680, 35.56)
    assert row["gain"] == 1


@pytest.mark.parametrize(
    ("budget", "entries", "pages"),
    [
        ("1024", 1024 + 32, 33),
        ("1000", 1000 + 32, 33),
        ("0.25", 2304 + 32, 73),
        ("9000", 9032, 283),
        ("9200", 9216, 288),  # no more than the sequence has
    ],
)
def test_a_budget(llama, budget, entries, pages, capsys):
    full, row = rows(
        capsys, llama, "--memory", "40GiB", "--policy", "streaming", "--budget", budget
    )
    assert (row["decode_entries"], row["decode_bytes"]) == (entries, pages * (4 << 20))
    assert row["sequences"] == round(10_239 / pages, 2)
    assert row["gain"] == round(288 / pages, 2)
    whole = ("prompt_entries", "prompt_bytes", "vllm_kv_cache_tokens", "vllm_max_concurrency")
    assert [row[key] for key in whole] == [full[key] for key in whole]


def test_prompts_in_pieces(llama, capsys):
    args = ("--memory", "40GiB", "--policy", "streaming", "--policy-config", PREFILL)
    _, row = rows(capsys, llama, *args, "--budget", "1024")
    assert row["prompt_piece"] == 1024
    assert row["prompt_entries"] == 1024 + 31 + 1024
    assert row["vllm_max_concurrency"] == round(10_240 / 66, 2)  # 65 pages and one
    assert row["longest_prompt"] is None
    # On a GPU two steps are in flight, and long prompts come in smaller steps.
    _, row = rows(capsys, llama, *args, "--device", "gpu", "--max-num-batched-tokens", "768")
    assert (row["prompt_piece"], row["prompt_entries"]) == (768, 1024 + 31 + 2 * 768)


@pytest.mark.parametrize(
    ("device", "page_format", "entry"),
    [
        ("cpu", "int8", 2 * (128 + 2)),
        ("cpu", "int4", 2 * (64 + 4 * 2 * 2)),
        ("gpu", "int8", 2 * (128 + 4)),
        ("gpu", "int4", 2 * (64 + 4)),
        ("gpu", "fp8", 2 * 128),
    ],
)
def test_page_formats(llama, device, page_format, entry, capsys):
    args = ("--memory", "40GiB", "--device", device, "--page-format", f"native,{page_format}")
    first, full, small = (
        rows(capsys, llama, *args, "--policy", "full")[:1]
        + rows(capsys, llama, *args, "--policy", "streaming")[2:]
    )
    assert (first["page_format"], full["page_format"]) == ("native", page_format)
    assert full["bytes_per_token"] == small["bytes_per_token"] == 32 * 8 * entry
    assert full["pages"] == 40 * GIB // (32 * 32 * 8 * entry)
    assert small["gain"] == round((full["pages"] - 1) / 33 / (10_239 / 288), 2)


def test_a_hybrid(gemma, capsys):
    """5 full layers are a group, 29 with a window 6 groups that hold window and prompt's step."""
    args = ("--memory", "8GiB", "--policy", "streaming", "--max-num-batched-tokens", "2048")
    full, row = rows(capsys, gemma, *args)
    page = 5 * 32 * 2 * 4 * 256 * 2
    assert (full["page_bytes"], full["pages"]) == (page, 8 * GIB // page)
    assert [(group["layers"], group["groups"]) for group in full["groups"]] == [(5, 1), (29, 6)]
    window = (1023 + 2048 + 31) // 32 + 1
    assert full["prompt_bytes"] == row["prompt_bytes"] == (256 + 6 * window) * page
    assert full["vllm_max_concurrency"] == round(full["pages"] / (288 + 6 * window), 2)
    window = 1023 // 32 + 2  # one entry in the first page and in the last
    assert full["pages_per_sequence"] == 288 + 6 * window
    assert row["pages_per_sequence"] == 33 + 6 * window
    assert full["decode_entries"] == round((5 * 9216 + 29 * 1024) / 34, 2)
    assert row["decode_entries"] == round((5 * 1056 + 29 * 1024) / 34, 2)


def test_ranks_share_heads(llama, capsys):
    (row,) = rows(capsys, llama, "--memory", "40GiB", "--tensor-parallel", "4")
    assert row["bytes_per_token"] == 32 << 10
    (row,) = rows(capsys, llama, "--memory", "40GiB", "--tensor-parallel", "16")
    assert row["bytes_per_token"] == 16 << 10, "a head on each of two ranks"


def test_the_budget_for_so_many_sequences(llama, capsys):
    args = ("--memory", "40GiB", "--policy", "streaming,pyramidal+window", "--sequences", "300")
    full, row, pyramid = rows(capsys, llama, *args)
    assert full["sequences"] == round(10_239 / 288, 2)
    assert row["budget"] == 1056, "34 pages; a page more, and 292 fit"
    assert row["sequences"] >= 300
    assert pyramid["sequences"] >= 300
    more = ("--memory", "40GiB", "--policy", "pyramidal+window", "--budget")
    _, larger = rows(capsys, llama, *more, str(pyramid["budget"] + 32))
    assert larger["sequences"] < 300
    _, everything = rows(capsys, llama, *args[:3], "window", "--sequences", "3")
    assert everything["budget"] == 9216


# ---- weights: Llama-3.1-8B has 8,030,261,248 parameters, 6,979,321,856 of them in linear layers


@pytest.mark.parametrize(
    ("dtype", "num_bytes"),
    [
        ("bf16", 16_060_522_496),
        ("fp32", 32_121_044_992),
        ("fp8", 6_979_321_856 + 2 * 1_050_939_392),
        ("int4", 6_979_321_856 // 2 + 2 * 1_050_939_392),
    ],
)
def test_weights(llama, dtype, num_bytes):
    assert weight_bytes(read_model(llama), dtype) == num_bytes


def test_weights_of_a_rank(llama):
    """Norms are on all ranks: 65 x 4,096 numbers."""
    assert weight_bytes(read_model(llama), "bf16", 2) == (8_030_261_248 + 65 * 4096) // 2 * 2


def test_gpu_memory(llama, capsys):
    (row,) = rows(capsys, llama, "--gpu-memory", "80GB")
    assert row["memory_bytes"] == 73_600_000_000 - 16_060_522_496
    args = ("--gpu-memory", "80GB", "--gpu-memory-utilization", "0.5", "--weights-dtype", "int4")
    (row,) = rows(capsys, llama, *args)
    assert row["memory_bytes"] == 40_000_000_000 - 5_591_539_712


def test_a_default_context_is_what_the_model_takes(tmp_path, capsys):
    model = write(tmp_path / "short", LLAMA_8B, max_position_embeddings=8192)
    (row,) = rows(capsys, model, "--memory", "40GiB")
    assert (row["prompt_entries"], row["decode_entries"]) == (8192 - 1024, 8192)


# ---- tiers


def test_spill(llama, capsys):
    """8,192 entries are dropped: 128 KiB each."""
    args = ("--memory", "40GiB", "--policy", "streaming", "--policy-config")
    _, row = rows(capsys, llama, *args, '{"spill": true}')
    assert row["tiers"]["spill"] == {
        "host_bytes_per_sequence": GIB,
        "file_bytes_per_sequence": 0,
    }
    more = '{"spill": true, "spill_dir": "/x", "spill_host_budget": 2048, "spill_budget": 6144}'
    _, row = rows(capsys, llama, *args, more)
    assert row["tiers"]["spill"] == {
        "host_bytes_per_sequence": GIB // 4,
        "file_bytes_per_sequence": GIB // 2,
    }


def test_swap(llama, capsys):
    more = '{"swap_space": 16, "swap_dir": "/x", "swap_dir_space": 64, "swap_format": "int8"}'
    args = ("--memory", "40GiB", "--policy", "streaming", "--policy-config", more)
    full, row = (row["tiers"]["swap"] for row in rows(capsys, llama, *args))
    slot = 32 * 32 * 8 * 260
    slots = 16 * GIB // slot, 64 * GIB // slot
    assert full["slot_bytes"] == row["slot_bytes"] == slot
    assert (row["host_slots"], row["file_slots"], row["slots_per_sequence"]) == (*slots, 33)
    assert full["sequences"] == round(sum(slots) / 288, 2)


# ---- what is printed


def test_the_table(llama, capsys):
    lines = table(
        capsys, llama, "--gpu-memory", "80GB", "--context", "130000",
        "--policy", "streaming,snapkv,pyramidal+expected_attention", "--budget", "1024,0.25",
    )  # fmt: skip
    assert lines[0] == ("Llama-3.1-8B: 32 layers, 8 KV heads of 128: 128 KiB per token in bfloat16")
    assert lines[1] == (
        "Sequences of 131,024 tokens (130,000 + 1,024), pages of 32, 53.6 GiB for the KV cache"
    )
    assert "92% of 80GB less 15.0 GiB of weights in bfloat16" in lines[2]
    assert all(len(line) <= 100 for line in lines)
    names = [line.split()[:2] for line in lines if line.startswith(("full", "streaming", "pyram"))]
    assert names[:2] == [["full", "native"], ["streaming", "1024"]]
    text = " ".join(line.strip() for line in lines)
    assert "KV cache groups: 2 of 11 layers (compressed), 1 of 10 layers (compressed)" in text
    assert "snapkv 1024, snapkv 0.25: 32 KiB of side data beside each page" in text


def test_the_example_in_the_docs(llama, capsys):
    text = (ROOT / "docs" / "capacity.md").read_text()
    command = text.split("    paged-kv capacity --model DIR ")[1].split("\n\n")[0]
    printed = table(capsys, llama, *shlex.split(command.replace("\\\n", " ")))
    block = [f"    {line}".rstrip() for line in printed[: printed.index("", 5)]]
    assert "\n".join(block) in text


@pytest.mark.parametrize(
    ("args", "note"),
    [
        (("--policy-config", '{"start": "pressure"}'), "nothing is dropped while there are pages"),
        (("--policy-config", PREFILL), "prompts come in pieces of 1,024 tokens"),
        (("--memory", "600MiB"), "prompts of at most 4,768 tokens fit"),
        (("--memory", "600MiB"), "full: vLLM does not start: 149 pages hold no"),
        (("--max-num-seqs", "100"), "at most 100 sequences run at once"),
        (("--policy-config", '{"swap_space": 4}'), "swap holds 1,024 pages in memory and 0 in"),
        (("--policy-config", '{"spill": true}'), "spill takes up to 1 GiB of host memory"),
    ],
)
def test_notes(llama, args, note, capsys):
    memory = () if "--memory" in args else ("--memory", "40GiB")
    lines = table(capsys, llama, "--policy", "streaming", *memory, *args)
    assert note in " ".join(line.strip() for line in lines)
    assert all(len(line) <= 100 for line in lines)


@pytest.mark.parametrize(
    ("text", "num_bytes", "shown"),
    [
        ("40GiB", 40 * GIB, "40 GiB"),
        ("80GB", 80_000_000_000, "74.5 GiB"),
        ("1.5 tib", 1536 * GIB, "1.50 TiB"),
        ("1000", 1000, "0.98 KiB"),
        ("999b", 999, "999 B"),
    ],
)
def test_sizes(text, num_bytes, shown):
    assert read_size("memory", text) == num_bytes
    assert show_size(num_bytes) == shown


def test_it_needs_neither_torch_nor_vllm(llama):
    script = (
        "import sys; from paged_kv import cli; "
        f"cli.main(['capacity', '--model', {llama!r}, '--memory', '40GiB']); "
        "print(*sorted(m.split('.')[0] for m in sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert not {"torch", "vllm", "transformers", "numpy"} & set(result.stdout.split())
