"""The model card of an export: what is known of the model, as text in Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from constructions.certificate import Certificate
from constructions.family import Construction


def card(
    config: Mapping[str, Any],
    construction: Construction | None,
    example: Mapping[str, list[int]],
    facts: Mapping[str, str],
    certificate: Certificate | None,
    own: bool,
) -> str:
    return "todo"
