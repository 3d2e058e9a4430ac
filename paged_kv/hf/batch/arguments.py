"""What the caller of generate_batch asks for, checked before anything runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import GenerationConfig
from transformers.generation import GenerationMode
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessorList,
)
from transformers.generation.continuous_batching.requests import RequestState

DEFAULT_NEW_TOKENS = 20  # as generate()
UNSUPPORTED = (
    "bad_words_ids",
    "begin_suppress_tokens",
    "exponential_decay_length_penalty",
    "forced_eos_token_id",
    "max_time",
    "min_length",
    "min_new_tokens",
    "output_attentions",
    "output_hidden_states",
    "output_logits",
    "output_scores",
    "return_dict_in_generate",
    "stop_strings",
    "token_healing",
)
SCORES_ONLY = (  # processors that transformers has not classified, but look at no earlier tokens
    "EpsilonLogitsWarper",
    "EtaLogitsWarper",
    "InfNanRemoveLogitsProcessor",
    "LogitNormalization",
    "MinPLogitsWarper",
    "SuppressTokensLogitsProcessor",
    "TypicalLogitsWarper",
)


def split(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options of generate(), and those of the policy."""
    known = vars(GenerationConfig())
    policy_options = {name: value for name, value in options.items() if name not in known}
    return {name: value for name, value in options.items() if name in known}, policy_options


def generation_config(model: Any, base: GenerationConfig | None, options: Any) -> Any:
    """As generate() makes it.

    Raises:
        ValueError: it asks for what transformers' continuous batching does not do.
    """
    chosen, _ = model._prepare_generation_config(base, **options)
    mode = chosen.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise ValueError(f"generate_batch is greedy or samples; use generate() for {mode.value}")
    for name in UNSUPPORTED:
        if value := getattr(chosen, name, None):
            raise ValueError(f"generate_batch does not know {name} (which is {value!r})")
    if chosen.max_new_tokens is None:
        has_length = "max_length" in options or (base is not None and base.max_length is not None)
        chosen.max_new_tokens = None if has_length else DEFAULT_NEW_TOKENS
    return chosen


def logits_processors(model: Any, chosen: Any) -> ContinuousBatchingLogitsProcessorList:
    """What changes the logits before a token is picked.

    Raises:
        ValueError: some look at more than the last token, which a batch does not keep.
    """
    processors = model._get_logits_processor(chosen)
    names = [type(entry).__name__ for entry in processors if not entry.supports_continuous_batching]
    unable = [name for name in names if name not in SCORES_ONLY]
    if unable:
        raise ValueError(
            f"generate_batch cannot have {', '.join(unable)}: change the options that ask for it, "
            "or use generate()"
        )
    return ContinuousBatchingLogitsProcessorList(processors)


def make_requests(model: Any, prompts: Any, chosen: Any) -> list[RequestState]:
    """One for each prompt and sequence to return, named 0, 1, ...

    Raises:
        ValueError: a prompt that is no list of the model's token ids, or leaves no room.
    """
    vocabulary = model.get_input_embeddings().num_embeddings
    requests: list[RequestState] = []
    for index, prompt in enumerate(prompts):
        tokens = _tokens(index, prompt, vocabulary)
        num_new = chosen.max_new_tokens
        if num_new is None:
            num_new = chosen.max_length - len(tokens)
        if num_new < 1:
            raise ValueError(
                f"prompt {index} has {len(tokens)} tokens, which max_length {chosen.max_length} "
                "does not exceed: raise it, or give max_new_tokens"
            )
        requests += [
            RequestState(
                str(len(requests) + copy),
                tokens,
                max_new_tokens=num_new,
                eos_token_id=chosen.eos_token_id,
            )
            for copy in range(chosen.num_return_sequences or 1)
        ]
    return requests


def _tokens(index: int, prompt: Sequence[int], vocabulary: int) -> list[int]:
    """A prompt as ints. Raises ValueError."""
    allowed = f"prompt {index} must be a list of token ids from 0 to {vocabulary - 1}"
    try:
        tokens = [token.__index__() for token in prompt]
    except (AttributeError, TypeError):
        raise ValueError(f"{allowed}, not {str(prompt)[:60]!r}") from None
    wrong = [token for token in tokens if not 0 <= token < vocabulary]
    if wrong:
        raise ValueError(f"{allowed}; it has {wrong[0]}")
    if not tokens:
        raise ValueError(f"{allowed}; it is empty")
    return tokens
