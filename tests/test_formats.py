"""Page formats: what a number becomes, what happens at the edges, and where the bytes lie."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from paged_kv.core.page_formats import FORMATS, layer_formats
from paged_kv.kernels.page_layout import rotate
from paged_kv.quant import QUANTIZED, make_layout

SIZES = (16, 48, 64, 80, 128, 256)
names = st.sampled_from(sorted(QUANTIZED))


@st.composite
def entries(draw) -> torch.Tensor:
    """float32 [n, size]: entries of any magnitude, some channels far larger than the others."""
    size, seed = draw(st.sampled_from(SIZES)), draw(st.integers(0, 1 << 30))
    generator = torch.Generator().manual_seed(seed)
    found = torch.randn(5, size, generator=generator)
    found[:, :3] *= draw(st.sampled_from([0.0, 1.0, 30.0]))
    return found * 10.0 ** draw(st.integers(-20, 20))


def passed(name: str, numbers: torch.Tensor) -> torch.Tensor:
    codec = QUANTIZED[name](numbers.shape[-1])
    bits = codec.encode(numbers)
    assert (bits.dtype, bits.shape[-1]) == (torch.uint8, codec.num_bytes)
    return codec.decode(bits)


@given(names, entries())
def test_the_error_is_that_of_the_levels(name, numbers):
    error = (passed(name, numbers).double() - numbers.double()).abs()  # squares of 10^21 fit
    largest = numbers.abs().amax(-1, keepdim=True)
    if name == "int8":  # half a step of rotated numbers; a rounded scale costs a quarter more
        rotated = rotate(numbers, QUANTIZED[name](numbers.shape[-1]).rotation)
        step = rotated.abs().amax(-1) / 127 * 0.77
        assert (error.norm(dim=-1) <= step * numbers.shape[-1] ** 0.5).all()
    elif name == "fp8":  # three bits of mantissa; steps end at 2 ** -9 of a scale
        assert (error <= numbers.abs() * 2**-4 * 1.01 + largest / 448 * 2**-9).all()
    else:  # of rotated numbers, whose length is that of the numbers
        codec = QUANTIZED[name](numbers.shape[-1])
        groups = rotate(numbers, codec.rotation).double().unflatten(-1, (codec.num_groups, -1))
        step = (groups.amax(-1) - groups.amin(-1)) / 15 * 0.6 + groups.abs().amax(-1) * 2**-7
        bound = (step.square().sum(-1) * groups.shape[-1]).sqrt()
        assert (error.norm(dim=-1) <= bound).all()


@given(entries())
def test_what_was_stored_stays(numbers):
    once = passed("fp8", numbers)  # the others' rotation rounds
    assert torch.equal(passed("fp8", once), once)


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("size", SIZES)
def test_zeros_constants_and_a_single_number(name, size):
    assert not passed(name, torch.zeros(2, size)).any()
    for value in (1.0, -3.5, 2.0**-30):
        torch.testing.assert_close(
            passed(name, torch.full((1, size), value)), torch.full((1, size), value), rtol=4e-3,
            atol=abs(value) * (0.09 if name == "int4" else 0),
        )  # fmt: skip
    one = torch.zeros(1, size)
    one[0, 5] = -7.0
    assert (passed(name, one) - one).abs().max() < 7 * (0.08 if name == "int4" else 0.004)


@given(names, entries(), st.sampled_from([torch.nan, torch.inf, -torch.inf, 3.4e38]))
def test_what_is_not_finite_stays_in_its_entry(name, numbers, bad):
    expected = passed(name, numbers)
    numbers[2, 7] = bad
    found = passed(name, numbers)
    if abs(bad) != 3.4e38:  # the largest numbers may come back, or as NaN
        assert found[2].isnan().all()
    rest = [0, 1, 3, 4]
    assert torch.equal(found[rest], expected[rest])


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("key_size", "value_size"), [(64, 64), (16, 80), (256, 16)])
def test_every_byte_of_a_block_is_of_one_entry(name, key_size, value_size):
    layout = make_layout(name, torch.bfloat16, key_size, value_size, 48)
    assert layout.elements.shape == (48, layout.entry_bytes)
    assert layout.elements.flatten().sort().values.tolist() == list(range(layout.block_bytes))


def test_bits_per_number():
    """Scales included; docs/formats.md names them."""
    bits = {}
    for name in FORMATS:
        layout = make_layout(name, torch.bfloat16, 64, 64, 32)
        bits[name] = layout.entry_bytes * 8 / 128
    assert bits == {"native": 16, "int8": 8.25, "fp8": 8.25, "int4": 5.0}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("int3", 64, 64, 32), "page_format must be one of native, int8, int4, fp8, not 'int3'"),
        (("int8", 24, 64, 32), "head_dim 24: packed pages need a multiple of 16"),
        (("int4", 64, 8, 32), "head_dim 8: packed pages need a multiple of 16"),
        (("fp8", 64, 64, 8), "page_size 8: packed pages need a multiple of 16 from 16 to 128"),
        (("int8", 64, 64, 144), "page_size 144"),
    ],
)
def test_sizes_that_no_layout_has(arguments, message):
    name, key_size, value_size, page_size = arguments
    with pytest.raises(ValueError, match=f"^{message}"):
        make_layout(name, torch.float32, key_size, value_size, page_size)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "the file cannot be read: No such file"),
        ("{", "the file is not JSON"),
        ("[]", 'the file needs "layers"'),
        ('{"layers": []}', 'the file needs "layers"'),
        ('{"layers": ["int8", "int3"]}', 'the file needs "layers"'),
        ('{"layers": ["int8"]}', "the file has 1 layers, the model 2"),
    ],
)
def test_files_that_are_no_calibration(tmp_path, content, message):
    file = tmp_path / "formats.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ValueError, match=f"^page_format .*formats.json: {message}"):
        layer_formats(str(file), 2)
    file.write_text(json.dumps({"layers": ["int8", "native"]}))
    assert layer_formats(str(file), 2) == ("int8", "native")
