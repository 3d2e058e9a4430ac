"""Text by transformers with a PagedCache, streamed: what `paged-kv generate --engine hf` runs."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from paged_kv.config import CompressionConfig
from paged_kv.hf import compat
from paged_kv.hf.cache import PagedCache
from paged_kv.sampling import Sampling


class TextGenerator:
    """A model and one cache, which keeps what it has read from one prompt to the next.

    Args:
        directory: of the model.
        tokenizer: the model's.
        config: what is kept of the cache.
        sampling: how tokens are chosen.
        page_size: tokens per page.

    Raises:
        ValueError: see PagedCache.
    """

    def __init__(
        self,
        directory: Path,
        tokenizer: Any,
        config: CompressionConfig,
        sampling: Sampling,
        page_size: int,
    ) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM, set_seed
        from transformers.utils import logging

        logging.disable_progress_bar()
        self.tokenizer, self.sampling = tokenizer, sampling
        dummy = PagedCache(AutoConfig.from_pretrained(directory), config, page_size=page_size)
        dummy.close()  # it may refuse
        try:
            self.model = AutoModelForCausalLM.from_pretrained(
                directory, dtype="auto", local_files_only=True
            ).eval()
        except ValueError as error:  # goes on with a list of all models there are
            reason = str(error).strip().partition("\n")[0]
            raise ValueError(f"model {directory}: {reason}") from None
        self.cache = PagedCache(self.model.config, config, page_size=page_size)
        self.read: list[int] = []  # the tokens in the cache, dropped ones included
        set_seed(sampling.seed)

    def write(self, tokens: list[int]) -> list[int]:
        """Prints what follows the tokens while it is made (beams: at the end); the new tokens."""
        from transformers import TextStreamer

        beams = self.sampling.num_beams > 1
        if beams or not self.read or tokens[: len(self.read)] != self.read:
            self.cache.reset()
        streamer = TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        ids = torch.tensor([tokens], device=self.model.device)
        output = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            **{compat.cache_argument(): self.cache},
            streamer=None if beams else streamer,
            **self._options(),
        )[0].tolist()
        new = output[len(tokens) :]
        if beams:
            print(self.tokenizer.decode(new, skip_special_tokens=True), flush=True)
        self.read = output[:-1]  # the last token has been chosen, not read
        return list(new)

    def statistics(self) -> dict[str, Any]:
        """The cache's, by name."""
        stats = self.cache.stats()
        values = {field.name: getattr(stats, field.name) for field in fields(stats)}
        for tier, num_bytes in values.pop("bytes_by_tier").items():
            values[f"{tier}_bytes"] = num_bytes
        return values | {"merged": round(stats.merged, 1), "fetched": round(stats.fetched, 1)}

    def close(self) -> None:
        """Gives the pages back."""
        self.cache.close()

    def _options(self) -> dict[str, Any]:
        """Of generate(); all of them, since the model's own defaults may sample."""
        sampling = self.sampling
        temperature = sampling.effective_temperature
        return {
            "max_new_tokens": sampling.max_new_tokens,
            "num_beams": sampling.num_beams,
            "do_sample": temperature > 0,
            "temperature": temperature or 1.0,
            # 50 and 1 count as not set where nothing is sampled; 0 switches top_k off.
            "top_k": (sampling.top_k or 0) if temperature else 50,
            "top_p": sampling.top_p or 1.0,
            "pad_token_id": self._pad_token(),
        }

    def _pad_token(self) -> int | None:
        """Beams that have ended are filled with it; generate() warns if there is none."""
        config = self.model.generation_config
        for token in (config.pad_token_id, config.eos_token_id):
            if token is not None:
                return int(token[0] if isinstance(token, list) else token)
        return None
