"""Policies of a command that compares several, each with options of its own where it has some.

snapkv,pooling:mode=best:window=4,residual:of=snapkv
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from paged_kv import registry
from paged_kv.core.options import parse_json, read_json

SYNTAX = "P[:OPTION=VALUE...][,P...]"  # of --policy
SHARED = "more options, for all policies (those of one follow its name): see paged-kv options"
_COMMA = re.compile(r",(?![^\[]*\])")  # not one between the brackets of a list


class Variant(NamedTuple):
    """A policy and its options.

    Args:
        text: as the user wrote it, by which results name it.
        policy: its name.
        options: those that all have, and its own, which go before.
    """

    text: str
    policy: str
    options: dict[str, Any]


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
    return [_variant(text, common, elsewhere, peers) for text in _COMMA.split(policies)]


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
        raise ValueError(f"{error}{others}") from None
    own = dict(_option(part, text) for part in given)
    _refuse(own, elsewhere, f"policy {text}")
    if own and policy == registry.FULL:
        raise ValueError(f"policy {text}: {policy} has no options of its own")
    return Variant(text, policy, common | own)


def _option(part: str, text: str) -> tuple[str, Any]:
    name, equals, value = part.partition("=")
    if not equals:
        raise ValueError(f"policy {text}: {part!r} must be OPTION=VALUE")
    try:
        return name, read_json(value)
    except ValueError:
        return name, value


def _refuse(options: Mapping[str, Any], elsewhere: Mapping[str, str], where: str) -> None:
    for name in set(options) & set(elsewhere):
        raise ValueError(f"{where} must not have {name}: use {elsewhere[name]}")
