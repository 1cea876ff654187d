"""What people say of a dataset (`about.*` of a recipe): whose it is, what may be done with it. In the manifest, and in no identity.

The terms are those of Croissant and of Hugging Face's dataset cards. A run that states something else than the newest generation does
writes a generation of its own for it, without new parts: the same samples, the same `dataset_sha256`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from aecore.errors import ConfigError, require_text
from aecore.registry import knob, spec

About = Mapping[str, Any]  # any: texts, and a boolean
MOST_TEXT = 1 << 16  # characters of a description


@spec
class AboutSpec:
    """What is said of a dataset; null: what it says already, "" takes a text back."""

    license: str | None = knob(
        None, "Croissant license; an identifier as in Hugging Face's cards (cc-by-4.0, mit, other) or an address", identity=False, since=2
    )
    owner: str | None = knob(None, "Croissant creator; who answers for the data, a name or an address", identity=False, since=2)
    description: str | None = knob(None, "Croissant description; a few sentences on what the samples are", identity=False, since=2)
    personal_data: bool | None = knob(
        None, "Croissant RAI personalSensitiveInformation; whether the samples tell something of persons", identity=False, since=2
    )

    def __post_init__(self) -> None:
        for name in ("license", "owner"):
            value = getattr(self, name)
            if value is not None and (value != value.strip() or not value.isprintable()):
                raise ConfigError(f"about.{name} is {value!r}, expected one line of text without spaces around it")
        require_text(self.description or "", "about.description")
        if len(self.description or "") > MOST_TEXT:
            raise ConfigError(f"about.description has {len(self.description or '')} characters, expected at most {MOST_TEXT}")


def stated(about: AboutSpec | None, there: About | None) -> About | None:
    """Return what a generation says, `there` being what the one before it says; None if nothing is said."""
    given = {} if about is None else {name: value for name, value in dataclasses.asdict(about).items() if value is not None}
    found = {name: value for name, value in {**(there or {}), **given}.items() if value != ""}
    return found or None


def require_stated(about: object) -> None:
    """ValueError unless this is what a manifest can say."""
    if about is None:
        return
    if not isinstance(about, Mapping) or not about:
        raise ValueError(f"about is {about!r}, expected what is said of the dataset")
    kinds = {"license": str, "owner": str, "description": str, "personal_data": bool}
    for name, value in about.items():
        if name not in kinds or type(value) is not kinds[name]:
            raise ValueError(f"about says {name} {value!r}, expected {', '.join(kinds)}")
