"""PagedEncoderDecoderCache: T5, BART and their like; the decoder's own past is in pages."""

from __future__ import annotations

import copy
from typing import Any, NoReturn

from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from paged_kv.hf.cache import PagedCache
from paged_kv.hf.copies import Copyable
from paged_kv.hf.stats import CacheStats


class PagedEncoderDecoderCache(Copyable, EncoderDecoderCache):
    """Self-attention in a PagedCache, cross-attention in transformers' own cache.

    What cross-attention holds is the input: it does not grow, and is not compressed.

    Args:
        model: the encoder-decoder model. Not its config: the decoder's layers may read a copy.
        options: those of PagedCache.

    Raises:
        ValueError: the model has no encoder; see PagedCache.
    """

    def __init__(self, model: Any, *args: Any, **options: Any) -> None:
        if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            raise ValueError(
                f"{type(model).__name__} is no encoder-decoder model: use PagedCache(model.config)"
            )
        decoder = model.get_decoder()
        config = copy.deepcopy(decoder.config.get_text_config(decoder=True))
        config.is_encoder_decoder = False
        self._config = config
        super().__init__(PagedCache(config, *args, **options), DynamicCache(config=config))

    def __deepcopy__(self, memo: dict[int, Any]) -> PagedEncoderDecoderCache:
        """Pages are shared until one of the two writes. Raises ValueError: it has been closed."""
        self_attention = copy.deepcopy(self.self_attention_cache, memo)
        other = type(self).__new__(type(self))
        cross = copy.deepcopy(self.cross_attention_cache, memo)
        EncoderDecoderCache.__init__(other, self_attention, cross)
        other._config = self._config
        return other

    def save(self, path: Any) -> NoReturn:
        """Refuses. Raises ValueError."""
        raise ValueError(
            f"save({str(path)!r}): a PagedEncoderDecoderCache cannot be saved; "
            "copy.deepcopy(cache) keeps it in memory"
        )

    def check_dynamic_cache(self, method: str) -> None:
        """Both caches grow: every method is there."""

    def stats(self) -> CacheStats:
        """Of the self-attention. Raises ValueError: it has been closed."""
        return self.self_attention_cache.stats()

    def reset(self) -> None:
        """Forgets everything: the next batch may be another one, of another size."""
        self.self_attention_cache.reset()
        self.cross_attention_cache = DynamicCache(config=self._config)
        for layer in range(len(self)):
            self.is_updated[layer] = False

    def close(self) -> None:
        """Gives all pages back."""
        self.self_attention_cache.close()

    def __enter__(self) -> PagedEncoderDecoderCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
