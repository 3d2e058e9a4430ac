"""Which kernels run: the CPU, the builds, PAGED_KV_CPU_KERNELS; and what operands are refused."""

import os
import shutil
import subprocess
import sys
import warnings

import pytest
import torch
from kernel_builds import BUILDS, COMPILER, kernels_of
from kernel_cases import Case, Row, assert_close, expected, make, poisoned_output

from paged_kv.kernels import cpu, ops
from paged_kv.kernels.cpu import builds
from paged_kv.kernels.operands import DenseAttention, Terms
from paged_kv.quant import make_layout


@pytest.fixture
def fresh(monkeypatch):
    """Nothing has been chosen yet, nor afterwards."""
    monkeypatch.delenv(builds.VARIABLE, raising=False)
    for cached in (builds.best, cpu.kernels):
        cached.cache_clear()
    yield monkeypatch
    for cached in (builds.best, cpu.kernels):
        cached.cache_clear()


def attend_something():
    problem = make(Case((Row(1, 40), Row(3, 20)), "int8"))
    found = poisoned_output(problem)
    ops.attend(found, *problem[:3])
    assert_close(found, expected(problem)[0])


def test_the_best_build_that_the_cpu_can_run(fresh):
    can = [build for build in BUILDS if builds.load(build)[0] is not None]
    if not can and COMPILER is None:
        pytest.skip("no compiler: nothing is built")
    assert can[-1] == "portable"
    assert builds.best()._name.rpartition("/")[2].startswith(f"_{can[0]}.")
    attend_something()


@pytest.mark.parametrize("build", BUILDS)
def test_a_forced_build(fresh, build):
    kernels_of(build)
    fresh.setenv(builds.VARIABLE, build)
    assert f"_{build}." in builds.best()._name
    attend_something()


def test_forced_mistakes(fresh, tmp_path):
    fresh.setenv(builds.VARIABLE, "sse9")
    with pytest.raises(ValueError, match=r"PAGED_KV_CPU_KERNELS must be one of avx512, .*'sse9'"):
        builds.best()
    fresh.setenv(builds.VARIABLE, "portable")
    fresh.setattr(builds, "FOLDER", tmp_path)
    with pytest.raises(ValueError, match="PAGED_KV_CPU_KERNELS=portable: not built"):
        builds.best()


def test_the_reference_when_asked_for(fresh):
    fresh.setenv(builds.VARIABLE, "reference")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not cpu.available()
        attend_something()


def test_nothing_built_is_one_warning_and_the_reference(fresh, tmp_path):
    fresh.setattr(builds, "FOLDER", tmp_path)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        attend_something()
        attend_something()
        queries, keys, place = torch.randn(1, 2, 3, 16), torch.randn(1, 4, 16), torch.arange(4)
        ops.attention_mass(DenseAttention(queries, keys, place[:3], place, Terms(1.0)))
    (warning,) = found
    assert warning.category is RuntimeWarning
    assert "torch reads packed pages" in str(warning.message)
    assert "portable: not built" in str(warning.message)


def test_a_broken_build_is_passed_over(fresh, tmp_path):
    kernels_of("portable")
    for file in builds.FOLDER.glob("_portable.*so"):
        shutil.copy(file, tmp_path)
    (tmp_path / "_avx512.so").write_text("no library")
    (tmp_path / "_avx2.so").write_text("no library")
    fresh.setattr(builds, "FOLDER", tmp_path)
    assert "_portable." in builds.best()._name
    attend_something()


def test_torch_and_the_kernels_share_their_threads():
    """One OpenMP library in the process, torch's: its threads do both."""
    code = (
        "from paged_kv.kernels import cpu; cpu.available()\n"
        "print(len({line.split()[-1] for line in open('/proc/self/maps') if 'libgomp' in line}))"
    )
    if not cpu.available():
        pytest.skip("no kernels")
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert result.stdout == "1\n", result.stderr


def mistakes():
    """name -> (change of the operands of an attention, message)."""

    def segment(**changes):
        def change(o):
            o["segments"] = [o["segments"][0]._replace(**changes)]

        return change

    def table(value, row=0, column=0):
        def change(o):
            o["segments"][0].table[row, column] = value

        return change

    def counts(*values):
        return segment(counts=torch.tensor(values, dtype=torch.int32))

    def queries(**changes):
        def change(o):
            o["queries"] = o["queries"]._replace(**changes)

        return change

    def starts(*values):
        return queries(starts=torch.tensor(values, dtype=torch.int32))

    def terms(**changes):
        def change(o):
            o["terms"] = o["terms"]._replace(**changes)

        return change

    def side(**changes):
        def change(o):
            o["side"] = o["side"]._replace(**changes)

        return change

    def output(make):
        def change(o):
            o["output"] = make(o["output"])

        return change

    return {
        "page too large": (table(99), "page 99, there are"),
        "page negative": (table(-1, 1), "page -1, there are"),
        "count negative": (counts(-1, 20), "counts: row 0"),
        "count beyond the table": (counts(40, 999), "counts: row 1"),
        "starts fall": (starts(0, 3, 1), "starts"),
        "starts beyond": (starts(0, 1, 9), "starts"),
        "starts negative": (starts(-1, 1, 4), "starts"),
        "starts int64": (queries(starts=torch.tensor([0, 1, 4])), "starts is int64"),
        "queries float64": (queries(states=torch.zeros(4, 6, 64).double()), "queries is float64"),
        "head_dim": (queries(states=torch.zeros(4, 6, 32)), "head_dim 64"),
        "heads": (queries(states=torch.zeros(4, 5, 64)), "a multiple of 2 heads"),
        "strided queries": (queries(states=torch.zeros(4, 6, 128)[..., ::2]), "queries is float32"),
        "output dtype": (output(lambda x: x.bfloat16()), "output is bfloat16"),
        "output shape": (output(lambda x: x[:2]), "output is float32 .2, 6, 64."),
        "table int64": (segment(table=torch.zeros(2, 4).long()), "table is int64"),
        "table rows": (segment(table=torch.zeros(3, 4).int()), "table is int32 .3, 4."),
        "counts rows": (counts(1, 2, 3), "counts is int32 .3."),
        "blocks dtype": (segment(blocks=torch.zeros(9, 2, 4)), "blocks is float32"),
        "page size": (
            segment(layout=make_layout("int8", torch.float32, 64, 64, 32)),
            "blocks of 4224 bytes",
        ),
        "no segment": (lambda o: o.update(segments=[]), "segments: one or two"),
        "sinks": (terms(sinks=torch.zeros(5)), "sinks is float32 .5."),
        "weights": (side(weights=torch.zeros(9, 2, 8)), "weights is float32"),
        "few scores": (side(scores=torch.zeros(1, 2, 16)), "page"),
        "softcap": (terms(softcap=-1.0), "softcap -1.0"),
        "decay 0": (side(decay=0.0), "decay 0.0"),
        "decay above 1": (side(decay=1.5), "decay 1.5"),
        "decay NaN": (side(decay=float("nan")), "decay nan"),
    }


@pytest.mark.parametrize("kernels", ["compiled", "reference"])
@pytest.mark.parametrize("name", mistakes())
def test_bad_attention(fresh, kernels, name):
    """Refused with a reason, before anything is written."""
    if kernels == "reference":
        fresh.setenv(builds.VARIABLE, "reference")
    change, message = mistakes()[name]
    problem = make(Case((Row(1, 40), Row(3, 20)), "int8", scores=True))
    operands = {**problem._asdict(), "output": poisoned_output(problem)}
    operands["segments"] = list(operands["segments"])
    del operands["value_size"]
    change(operands)
    output, scores = operands["output"].clone(), operands["side"].scores.clone()
    with pytest.raises(ValueError, match=message):
        ops.attend(**operands)
    assert torch.equal(operands["output"].isnan(), output.isnan())
    assert torch.equal(operands["side"].scores, scores)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"queries": torch.zeros(2, 5, 16)}, "queries is float32 .2, 5, 16."),
        ({"keys": torch.zeros(2, 7, 8)}, "keys is float32 .2, 7, 8."),
        ({"keys": torch.zeros(2, 7, 16).half()}, "keys is float16"),
        ({"keys": torch.zeros(3, 7, 16)}, "keys is float32 .3, 7, 16."),
        ({"query_positions": torch.arange(4)}, "query_positions is int64 .4."),
        ({"key_positions": torch.arange(7).int()}, "key_positions is int32"),
        ({"terms": Terms(1.0, -1.0)}, "softcap -1.0"),
        ({"terms": Terms(1.0, 0.0, torch.zeros(6))}, "sinks is float32 .6."),
    ],
)
def test_bad_dense_attention(changes, message):
    good = DenseAttention(
        torch.zeros(2, 3, 5, 16),
        torch.zeros(2, 7, 16),
        torch.arange(5),
        torch.arange(7),
        Terms(1.0, 0.0, torch.zeros(2, 3)),
    )
    assert ops.attention_mass(good).shape == (2, 7)
    with pytest.raises(ValueError, match=message):
        ops.attention_mass(good._replace(**changes))


@pytest.mark.parametrize("kernels", ["compiled", "reference"])
def test_bad_entries(fresh, kernels):
    if kernels == "reference":
        fresh.setenv(builds.VARIABLE, "reference")
    layout = make_layout("int8", torch.float32, 64, 64, 16)
    blocks = torch.full((3, 2, layout.block_bytes), 7, dtype=torch.uint8)
    before, good = blocks.clone(), torch.zeros(4, 2, 64)
    slots, layers = torch.arange(4), torch.tensor([0])
    zero = torch.tensor([0])

    def refused(message, call, *arguments):
        with pytest.raises(ValueError, match=message):
            call(*arguments)
        assert torch.equal(blocks, before)

    refused("slot 48|slot 48,", ops.write, blocks, layout, good, good, torch.tensor([0, 1, 48, 2]))
    refused("keys is float64", ops.write, blocks, layout, good.double(), good, slots)
    refused("values is float32 .4, 2, 32.", ops.write, blocks, layout, good, good[..., :32], slots)
    refused("slots is int32", ops.write, blocks, layout, good, good, slots.int())
    refused("blocks of 2112", ops.write, blocks[..., :-1], layout, good, good, slots)
    stack = blocks[None]
    refused("part must be key or value", ops.gather, stack, layout, "keys", layers, zero[None])
    refused("page 3", ops.gather, stack, layout, "key", layers, torch.tensor([[0, 3]]))
    refused("layer 1", ops.gather, stack, layout, "key", layers + 1, zero[None])
    for place, bad in enumerate((1, 3, 2, 16)):
        for value in (bad, -1):
            index = tuple(zero + value if i == place else zero for i in range(4))
            fine = (zero,) * 4
            what = ("layer", "page", "KV head", "offset|slot")[place]
            refused(what, ops.store, stack, layout, "key", index, torch.zeros(1, 64))
            refused(what, ops.move, stack, layout, "key", index, fine)
            refused(what, ops.move, stack, layout, "value", fine, index)
    half = good[:1, 0, :32]
    refused("numbers is float32 .1, 32.", ops.store, stack, layout, "key", (zero,) * 4, half)
