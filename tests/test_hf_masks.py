"""Masks that are not causal, and masks that users make: the same as in transformers' own cache."""

import pytest
import torch
from hf_models import load, padded, prompt, seen_under_streaming
from torch.nn.attention.flex_attention import create_block_mask
from transformers import DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.models.llama import modeling_llama

from paged_kv.hf import PagedCache, dispatch

PAGES = {"page_size": 16}
STREAMING = {"policy": "streaming", "budget": 80, **PAGES}
TOTAL, PROMPT = 140, 100


@pytest.fixture(scope="module")
def model():
    return load("llama")


def prefix(batch, head, query, key):
    """Tokens of a row's prefix see each other."""
    return (query < 20 + 10 * batch) & (key < 20 + 10 * batch)


def apart(batch, head, query, key):
    """Even queries see no key at 3, 8, 13, ...; nor does anybody in the second row at 4, ..."""
    return ~((key % 5 == 3) & (query % 2 == 0) & (query != key)) & (key % 5 != 4 - 9 * (batch != 1))


RULES = {
    "prefix": {"or_mask_function": prefix},
    "apart": {"and_mask_function": apart},
    "both": {"or_mask_function": prefix, "and_mask_function": apart},
}


@pytest.fixture
def use(monkeypatch):
    """Makes llama a model whose mask has these functions."""

    def change(**functions):
        def create(**arguments):
            return create_causal_mask(**arguments, **functions)

        monkeypatch.setattr(modeling_llama, "create_causal_mask", create)

    return change


def logits(model, cache, tokens, chunks, mask=None) -> torch.Tensor:
    """[rows, tokens, vocabulary]: the tokens in chunks, with what each needs of a mask."""
    found, start = [], 0
    with torch.no_grad():
        for size in chunks:
            end = start + size
            own = None if mask is None else mask[..., :end]
            if own is not None and own.dim() == 4:
                own = own[:, :, start:end]
            part = model(tokens[:, start:end], attention_mask=own, past_key_values=cache)
            found.append(part.logits)
            start = end
    return torch.cat(found, 1)


def two_rows() -> torch.Tensor:
    return torch.tensor([prompt(TOTAL), prompt(TOTAL, seed=1)])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("chunks", [[PROMPT, *[1] * 10], [60, 30, 1, 9, 1, 1]], ids=["one", "many"])
def test_mask_functions(model, use, rule, chunks):
    use(**RULES[rule])
    tokens = two_rows()
    expected = logits(model, DynamicCache(config=model.config), tokens, chunks)
    with PagedCache(model.config, **PAGES) as cache:
        found = logits(model, cache, tokens, chunks)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("rule", RULES)
def test_mask_functions_and_padding(model, use, rule):
    use(**RULES[rule])
    inputs = padded([prompt(70), prompt(41, seed=1)])
    settings = {"do_sample": False, "max_new_tokens": 20}
    expected = model.generate(**inputs, **settings)
    with PagedCache(model.config, **PAGES) as cache:
        assert torch.equal(model.generate(**inputs, past_key_values=cache, **settings), expected)


@pytest.mark.parametrize("rule", RULES)
def test_mask_functions_under_a_policy(model, use, rule):
    """The functions are asked about true positions: the same as a dense model with the mask."""
    use(**RULES[rule])
    tokens = two_rows()
    chunks = [PROMPT] + [1] * (TOTAL - PROMPT)
    with PagedCache(model.config, **STREAMING) as cache:
        found = logits(model, cache, tokens, chunks)
        assert cache.stats().evicted > 0
    row = torch.arange(2)[:, None, None, None]
    query, key = torch.arange(TOTAL)[:, None], torch.arange(TOTAL)
    seen = (key <= query)[None, None]
    if "or_mask_function" in RULES[rule]:
        seen = seen | prefix(row, 0, query, key)
    if "and_mask_function" in RULES[rule]:
        seen = seen & apart(row, 0, query, key)
    held = seen_under_streaming(TOTAL, PROMPT, 80) | (key > query)
    with torch.no_grad():
        expected = model(tokens, attention_mask=seen & held).logits
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


def four_dimensional(kind: str) -> torch.Tensor:
    """[rows, 1, TOTAL, TOTAL], bool or to be added."""
    row = torch.arange(2)[:, None, None, None]
    query, key = torch.arange(TOTAL)[:, None], torch.arange(TOTAL)
    seen = (key <= query) & apart(row, 0, query, key)
    if kind == "bool":
        return seen
    torch.manual_seed(0)
    return torch.randn(2, 4 if kind == "heads" else 1, TOTAL, TOTAL).masked_fill(~seen, -1e9)


@pytest.mark.parametrize("kind", ["bool", "float", "heads"])
def test_a_mask_of_the_users_own(model, kind):
    mask, tokens, chunks = four_dimensional(kind), two_rows(), [PROMPT, 30, 1, 1]
    expected = logits(model, DynamicCache(config=model.config), tokens, chunks, mask)
    with PagedCache(model.config, **PAGES) as cache:
        found = logits(model, cache, tokens, chunks, mask)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["bool", "float", "heads"])
def test_a_mask_of_the_users_own_under_a_policy(model, kind):
    mask, tokens = four_dimensional(kind), two_rows()
    chunks = [PROMPT] + [1] * (TOTAL - PROMPT)
    with PagedCache(model.config, **STREAMING) as cache:
        found = logits(model, cache, tokens, chunks, mask)
        assert cache.stats().evicted > 0
    held = seen_under_streaming(TOTAL, PROMPT, 80)
    dense = mask & held if kind == "bool" else mask.masked_fill(~held, -1e9)
    with torch.no_grad():
        expected = model(tokens, attention_mask=dense).logits
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("policy", ["h2o", "snapkv", "knorm"])
def test_policies_that_look_at_entries_run_with_masks(model, use, policy):
    use(**RULES["both"])
    tokens, chunks = two_rows(), [PROMPT] + [1] * (TOTAL - PROMPT)
    with PagedCache(model.config, policy=policy, budget=80, **PAGES) as cache:
        assert logits(model, cache, tokens, chunks).isfinite().all()
        assert cache.stats().evicted > 0


def test_a_mask_that_is_too_short(model):
    mask = torch.tensor([[0, 1, 1, 1, 1], [1] * 5])
    with PagedCache(model.config) as cache, torch.no_grad():
        logits(model, cache, two_rows(), [20])
        with pytest.raises(ValueError, match="attention_mask has 5 columns"):
            model(torch.tensor([[3], [4]]), attention_mask=mask, past_key_values=cache)


@pytest.mark.parametrize("limit", [80, 1000], ids=["streaming", "all there"])
def test_a_mask_that_hides_what_was_processed(model, limit):
    """Padding is said when it comes; a row whose tokens nobody hides goes on."""
    with PagedCache(model.config, "streaming", limit, **PAGES) as cache, torch.no_grad():
        logits(model, cache, two_rows(), [PROMPT])
        mask = torch.ones(2, PROMPT + 1, dtype=torch.int64)
        mask[1, 30:40] = 0
        before = cache.stats()
        with pytest.raises(ValueError, match=r"attention_mask shows 90 .* row 1, but .* 100 there"):
            model(torch.tensor([[3], [4]]), attention_mask=mask, past_key_values=cache)
        assert cache.stats() == before
        mask[1, 30:40] = 1
        mask[1, -1] = 0  # of the new token it may say what it likes
        model(torch.tensor([[3], [4]]), attention_mask=mask, past_key_values=cache)
        assert cache.sequences.num_tokens.tolist() == [PROMPT + 1, PROMPT]
        mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.int64)], 1)
        model(torch.tensor([[3], [4]]), attention_mask=mask, past_key_values=cache)
        mask = torch.ones(2, PROMPT + 3, dtype=torch.int64)  # shows what was padding
        with pytest.raises(ValueError, match=r"shows 102 .* row 1, but .* 101 there"):
            model(torch.tensor([[3], [4]]), attention_mask=mask, past_key_values=cache)


def test_a_mask_of_one_row_for_a_batch(model):
    mask = torch.ones(1, 20, dtype=torch.int64)
    mask[0, :5] = 0
    with PagedCache(model.config) as cache, torch.no_grad():
        with pytest.raises(ValueError, match="attention_mask has 1 rows, but the batch has 2"):
            model(two_rows()[:, :20], attention_mask=mask, past_key_values=cache)
        model(two_rows()[:1, :20], attention_mask=mask, past_key_values=cache)


def test_a_mask_of_another_kind(model):
    """flex_attention's, made by the user: nobody could look it up at the entries that are left."""
    mask = create_block_mask(lambda b, h, q, k: q >= k, 1, None, 20, 20, device="cpu")
    message = r"attention_mask is a BlockMask: a PagedCache takes a tensor"
    with PagedCache(model.config) as cache, pytest.raises(ValueError, match=message):
        model(two_rows()[:1, :20], attention_mask=mask, past_key_values=cache)


def test_a_mask_is_read_once_in_a_forward_pass(model, monkeypatch):
    """On a GPU each time would wait for it."""
    reads, to_cpu = [], torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda one: reads.append(one.shape) or to_cpu(one))
    inputs = padded([prompt(70), prompt(41, seed=1)])
    with PagedCache(model.config) as cache, torch.no_grad():
        model(**inputs, past_key_values=cache)
    assert reads == [(2, 71)]


@pytest.mark.parametrize(
    "change",
    [
        lambda mask: mask[:, :, -1:],
        lambda mask: mask + 1,
        lambda mask: mask.shape,
        lambda mask: torch.where(mask, 0.0, 1.0),
    ],
    ids=["cut", "add", "shape", "where"],
)
def test_a_model_that_computes_with_masks_itself(model, monkeypatch, change):
    """There is none to compute with."""

    def create(**arguments):
        return change(create_causal_mask(**arguments))

    monkeypatch.setattr(modeling_llama, "create_causal_mask", create)
    with PagedCache(model.config) as cache, pytest.raises(ValueError, match="no mask is made"):
        model(torch.tensor([prompt(20)]), past_key_values=cache)


def test_a_layer_that_is_not_paged_gets_the_mask_that_transformers_makes(model):
    """Where it comes with the mask of layers that are paged."""
    ids = torch.tensor([prompt(20)])
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    seen = []

    def computes(module, query, key, value, attention_mask, **kwargs):
        seen.append(attention_mask)
        return query.transpose(1, 2), None

    with PagedCache(model.config) as cache:
        embeds = model.get_input_embeddings()(ids)
        spec = create_causal_mask(model.config, embeds, mask, cache)
        made = create_causal_mask(model.config, embeds, mask, None)
    tensor = torch.zeros(1, 4, 20, 16)
    dispatch.attention(computes, model, tensor, tensor, tensor, spec)
    dispatch.attention(computes, model, tensor, tensor, tensor, attention_mask=spec)
    assert all(torch.equal(one, made) for one in seen)
