"""Suggests known keys of a recipe for an unknown one. Works on names only: no part is imported."""

from collections.abc import Iterable, Mapping

from aecore.errors import similar

SHOWN = 4
SURE = 0.75  # among the keys of all sections there is always one that is half similar
Fields = Mapping[str, Mapping[str, str]]  # section -> its fields, each with a note ("" or " (of model.kind=vae)")


def nearest_keys(word: str, below: Iterable[str], fields: Fields, top: Iterable[str]) -> list[str]:
    """Return the known keys most similar to `word`, or to `word.x` for every x in `below`; best first, [] if none is similar."""
    tails = list(below)
    section = similar(word, fields)
    if tails and section:
        known = fields[section[0]]
        return _first(f"{section[0]}.{name}" for tail in tails for name in similar(tail, known)) or section
    if tails:
        return _first(key for tail in tails for key in _of_fields(tail, fields))
    same = [f"{name}.{word}{known[word]}" for name, known in fields.items() if word in known]
    return _first(same) or similar(word, [*top, *fields], at_least=SURE) or _of_fields(word, fields)


def _of_fields(word: str, fields: Fields) -> list[str]:
    """Return the keys whose field is similar to `word` or shares a word with it (`batch_size`, `global_batch`)."""
    like = similar(word, {field for known in fields.values() for field in known}, SHOWN, SURE)
    return _first(f"{name}.{field}{known[field]}" for name, known in fields.items() for field in known if field in like)


def _first(keys: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(keys))[:SHOWN]
