"""Policies of a command that compares several, each with options of its own where it has some.

snapkv,pooling:mode=best:window=4,residual:of=snapkv
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from paged_kv import registry
from paged_kv.core.options import parse_json, read_json
from paged_kv.core.page_formats import NATIVE

SYNTAX = "P[:OPTION=VALUE...][,P...]"  # of --policy
SHARED = "more options, for all policies (those of one follow its name): see paged-kv options"
_OF_PAGES = ("residual_pages", "swap_")  # begin options that `full` takes, too
_COMMA = re.compile(r",(?![^\[]*\])")  # not one between the brackets of a list


class Variant(NamedTuple):
    """A policy and its options.

    Args:
        text: as the user wrote it, by which results name it.
        policy: its name.
        options: those that all have, and its own, which go before. `full` has none of its own, and
            of the others those about pages.
    """

    text: str
    policy: str
    options: dict[str, Any]

    def stored_in(self, page_format: str, page_formats: Sequence[str]) -> dict[str, Any]:
        """Its options with one of several page formats: a list may begin with native.

        Native pages have no residual; without a list that is a mistake.
        """
        options = {**self.options, "policy": self.policy, "page_format": page_format}
        if not takes_residual(page_format, page_formats):
            options.pop("residual_pages", None)
        return options


def takes_residual(page_format: str, page_formats: Sequence[str]) -> bool:
    """Whether the option residual_pages is meant for this one of several page formats."""
    return page_format != NATIVE or len(page_formats) == 1


def read_variants(
    policies: str,
    shared: str | None,
    elsewhere: Mapping[str, str],
    peers: Collection[str] = (),
) -> list[Variant]:
    """What --policy and --policy-config say.

    Args:
        policies: names with commas between. An option of one follows it after a colon; its value
            is JSON, or a string without quotes.
        shared: JSON object of options for all but peers; None or empty: none.
        elsewhere: options that may not be given here -> what is to be used.
        peers: names that are no policies and allowed; they have no options.

    Raises:
        ValueError: names the option.
    """
    common = parse_json(shared, "policy-config") if shared else {}
    _refuse(common, elsewhere, "policy-config")
    texts = _COMMA.split(policies)
    refuse_repeated(f"policy {policies}", texts)
    return [_variant(text, common, elsewhere, peers) for text in texts]


def refuse_repeated(where: str, labels: Sequence[str]) -> None:
    """Raises ValueError, which begins with `where`, for something that is compared with itself."""
    for label in labels:
        if labels.count(label) > 1:
            raise ValueError(f"{where}: {label} is there {labels.count(label)} times")


def _variant(
    text: str, common: dict[str, Any], elsewhere: Mapping[str, str], peers: Collection[str]
) -> Variant:
    if text in peers:
        return Variant(text, text, {})
    policy, *given = text.split(":")
    try:
        registry.check(policy)
    except ValueError as error:
        others = f"; or a peer: {', '.join(peers)}" if peers else ""
        whole = str(error).replace(repr(policy), repr(text), 1)  # a peer's name may have colons
        raise ValueError(f"{whole}{others}") from None
    own = dict(_option(part, text) for part in given)
    _refuse(own, elsewhere, f"policy {text}")
    if len(own) < len(given):
        raise ValueError(f"policy {text}: an option is there twice")
    if policy != registry.FULL:
        return Variant(text, policy, common | own)
    if own:
        raise ValueError(f"policy {text}: {policy} has no options of its own")
    of_pages = {name: common[name] for name in common if name.startswith(_OF_PAGES)}
    return Variant(text, policy, of_pages)


def _option(part: str, text: str) -> tuple[str, Any]:
    name, equals, value = part.partition("=")
    if not equals:
        raise ValueError(f"policy {text}: {part!r} must be OPTION=VALUE")
    try:
        return name, read_json(value)
    except ValueError:
        return name, value


def _refuse(options: Mapping[str, Any], elsewhere: Mapping[str, str], where: str) -> None:
    for name in sorted(set(options) & set(elsewhere)):
        raise ValueError(f"{where} must not have {name}: use {elsewhere[name]}")
