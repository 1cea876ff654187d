"""Why a sample cannot be used, whoever finds it: parsers of headers, decoders, sources, sharding. It is raised, and listed as a value."""

COMPLEX_REMEDY = "save the real and the imaginary part (or magnitude and phase) as channels"


class BadSample(Exception):
    """One sample that cannot be used; it goes to the quarantine with a short `reason` and a readable `message`."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(reason, message)
        self.reason = reason
        self.message = message

    def __str__(self) -> str:
        return f"{self.reason}: {self.message}"

    def bare(self) -> "BadSample":
        """Return it as a value to keep: the traceback and the cause hold the bytes that were read."""
        return BadSample(self.reason, self.message)

    @classmethod
    def of(cls, error: Exception) -> "BadSample":
        """Return an error of a decoder of untrusted bytes as a BadSample: codecs raise their own types, SyntaxError, struct.error, ..."""
        return error if isinstance(error, cls) else cls("decode", f"{type(error).__name__}: {error}")
