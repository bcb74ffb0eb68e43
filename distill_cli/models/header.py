"""The YAML header of a README.md, which the Hugging Face hub reads: licence, base model, tags. Knows no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml

from distill_cli.errors import printable

HUB_LICENCES = (
    "apache-2.0", "mit", "openrail", "openrail++", "creativeml-openrail-m", "bigscience-openrail-m", "bsd", "bsd-2-clause", "bsd-3-clause",
    "mpl-2.0", "cc0-1.0", "cc-by-2.0", "cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "cc-by-nc-2.0", "cc-by-nc-3.0",
    "cc-by-nc-4.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0", "cc-by-nc-nd-4.0", "cc-by-nd-4.0", "gpl-3.0", "lgpl-3.0", "agpl-3.0",
    "apple-amlr", "deepfloyd-if-license", "unlicense", "unknown",
)  # fmt: skip
"""Licences that the hub knows (https://huggingface.co/docs/hub/repositories-licenses); any other is `other`, with a license_name."""
IDENTIFIERS = {
    "creativeml-open-rail-m": "creativeml-openrail-m",
    "creativeml-open-rail++-m": "openrail++",
    "stability-community": "stabilityai-ai-community",
}
"""Licences by the names that models/sources/catalog.py gives them -> their names on the hub."""
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def licence(words: str) -> dict[str, str]:
    """The header's lines for a licence: the hub's identifier, or `other` and a name; {} for none. Words in brackets are a remark."""
    name = re.sub(r"[^a-z0-9.+]+", "-", re.sub(r"\(.*?\)", "", words).lower()).strip("-")
    name = IDENTIFIERS.get(name, name)
    if name in ("", "other", *HUB_LICENCES):
        return {"license": name} if name else {}
    return {"license": "other", "license_name": name}


def written(lines: Mapping[str, Any]) -> str:
    """The header with these lines; empty ones are left out."""
    return f"---\n{yaml.safe_dump({key: value for key, value in lines.items() if value}, sort_keys=False, width=1000)}---\n"


def header_of(text: str) -> str:
    """The lines of the header of a README.md; '' if it has none."""
    found = re.match(r"---[ \r]*\n(.*?)^---[ \r]*$", text, re.DOTALL | re.MULTILINE)
    return found[1] if found else ""


def licence_of(text: str) -> str:
    """The licence in the header of a README.md, of one that is `other` its name; '' if there is none."""
    header = header_of(text)
    found = {key: word.strip("'\"") for key, word in re.findall(r"^(license|license_name): *(\S+)", header, re.MULTILINE)}
    said = found.get("license", "")
    return printable(found.get("license_name", said) if said == "other" else said)
