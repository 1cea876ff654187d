"""Mistyped URLs: refused, since taken as a path each would create a folder with a strange name in the working directory."""

import re
from collections.abc import Iterable

from aecore.errors import ConfigError, did_you_mean

_SLIP = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9]{0,6})(?::/?(?!/)|;?//|;/|:\\+|:///+)(?P<rest>.*)", re.DOTALL)
_ELSEWHERE = {
    "gs": "Google's storage answers to S3 as well: set AWS_ENDPOINT_URL=https://storage.googleapis.com with an HMAC key, write s3://{rest}",
    "gcs": "Google's storage answers to S3 as well: set AWS_ENDPOINT_URL=https://storage.googleapis.com with an HMAC key, write s3://{rest}",
    "http": "the address of a store is an endpoint: set AWS_ENDPOINT_URL={scheme}://{host} and write s3://bucket/prefix",
    "https": "the address of a store is an endpoint: set AWS_ENDPOINT_URL={scheme}://{host} and write s3://bucket/prefix",
    "s3a": "write s3://{rest}",
    "s3n": "write s3://{rest}",
    "hdfs": "mount it, or copy it to one of these",
    "az": "mount it, or copy it to one of these",
    "abfs": "mount it, or copy it to one of these",
}


def readable(schemes: Iterable[str]) -> str:
    """Return the kinds of addresses that are read, for messages."""
    *others, last = (f"{scheme}://" for scheme in schemes)
    return f"{', '.join(['paths', *others])} and {last} URLs"


def refuse_typos(text: str, what: str, schemes: Iterable[str]) -> None:
    """ConfigError for `s3:/bucket`, `s3//bucket` and the like, and for schemes that are not read; `./s3:` is a path."""
    scheme, separator, rest = text.partition("://")
    if separator and scheme.isalnum() and not rest.startswith("/"):
        if scheme not in schemes:
            known = f"{readable(schemes)} are read and written"
            raise ConfigError(f"{what} has the scheme {scheme!r}: {known}; {_advice(scheme, rest, schemes)}")
        return
    slip = _SLIP.match(text)
    if slip is None or slip["scheme"].lower() not in (*schemes, *_ELSEWHERE) or text.startswith("file:/"):
        return
    scheme, rest = slip["scheme"].lower(), slip["rest"].lstrip("/\\")
    if "@" in text:  # the part before it may be a secret
        raise ConfigError(f"{what} is no URL: write {scheme}://profile@bucket/prefix")
    separator = text[slip.end("scheme") : slip.start("rest")]
    likely = f"{scheme}://{rest}"
    if scheme == "file":  # its URL names no host, hence three slashes; `file:x` is relative, which no URL is
        likely = f"file:///{rest}" if {"/", "\\"} & {*separator} else f"./{rest}"
    raise ConfigError(
        f"{what} {text!r} is neither a URL nor a likely path: did you mean {likely}? (a folder of that name is written ./{text})"
    )


def _advice(scheme: str, rest: str, schemes: Iterable[str]) -> str:
    rest = rest.rpartition("@")[2]  # the part before the @ may be a secret, with slashes in it
    host = rest.partition("/")[0]
    hint = _ELSEWHERE.get(scheme.lower())
    if hint is not None:
        return hint.format(scheme=scheme.lower(), rest=rest, host=host)
    return f"write file:///path or s3://bucket/prefix{did_you_mean(scheme.lower(), schemes)}"
