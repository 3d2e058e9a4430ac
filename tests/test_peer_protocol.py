"""How peers are measured: which tokens are read when, at which positions, and what is scored."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from paged_kv.eval.prompt import Prompt
from paged_kv.hf.driver import peer_protocol


class Counting:
    """A model that predicts the token after the one it reads; it records what it is given."""

    device = torch.device("cpu")

    def __init__(self):
        self.calls = []

    def __call__(self, input_ids, position_ids, logits_to_keep, past_key_values, use_cache):
        self.calls.append((input_ids[0].tolist(), position_ids[0].tolist()))
        logits = F.one_hot(input_ids[:, -logits_to_keep:] + 1, 12).float()
        return SimpleNamespace(logits=logits)


def empty_cache(lengths=(3, 2)):
    layers = [SimpleNamespace(keys=torch.zeros(1, 1, n, 4), values=None) for n in lengths]
    return SimpleNamespace(layers=layers, get_seq_length=lambda layer: lengths[layer])


def asked(**prompt):
    model = Counting()
    entered = []

    @contextmanager
    def compression(length):
        entered.append(length)
        yield
        entered.append(len(model.calls))

    fields = Prompt(**prompt)._asdict()
    result = peer_protocol.answer(model, empty_cache(), compression, **fields)
    assert entered[1] == 1, "only the context is read while the press is on"
    return result, model.calls, entered[0]


def test_a_question_is_read_after_the_compression_at_its_true_positions():
    result, calls, length = asked(context=[1, 2, 3], question=[4, 5], max_new_tokens=3)
    assert calls == [([1, 2, 3], [0, 1, 2]), ([4, 5], [3, 4]), ([6], [5]), ([7], [6])]
    assert (result["tokens"], result["nll"], length) == ([6, 7, 8], None, 3)
    assert (result["kept"], result["cache_bytes"]) == (2.5, 4 * (3 + 2) * 4)


def test_without_a_question_the_context_predicts_the_first_token():
    result, calls, _ = asked(context=[1, 2, 6], max_new_tokens=9, stop=frozenset([0, 9]))
    assert result["tokens"] == [7, 8], "what ends an answer is not part of it"
    assert calls == [([1, 2, 6], [0, 1, 2]), ([7], [3]), ([8], [4])]


@pytest.mark.parametrize(("context", "question"), [([1, 2, 3], []), ([1, 2], [3])])
def test_targets_are_predicted_by_tokens_that_saw_the_compressed_cache(context, question):
    result, calls, length = asked(context=context, question=question, targets=[4, 7])
    assert calls == [([1, 2], [0, 1]), ([3, 4], [2, 3])]
    assert length == 2
    # One-hot logits: 4 is predicted with logit 1, 7 with 0, of 12 tokens.
    assert result["nll"] == pytest.approx(float(torch.tensor(11 + torch.e).log()) - 0.5)
    assert result["tokens"] == []
