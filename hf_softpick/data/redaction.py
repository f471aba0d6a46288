"""What looks like a token or password, and its removal from messages: those end in logs and bug reports."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from hf_softpick.errors import UserError

SECRET = re.compile(
    r"(?<![A-Za-z0-9])(?:"
    r"hf_[A-Za-z0-9]{20,}"
    r"|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{20,}"
    r"|A[KS]IA[0-9A-Z]{16}"
    r"|sk-[\w-]{0,200}[A-Za-z0-9]{16}[\w-]*"
    r"|xox[abeprs]-[\w-]{10,})"
    r"|://[^/\s:]*:[^/\s]*@|https?://[^/\s@]+@"
    r"|[?&][\w-]*(?:token|key|secret|password|signature|sig|auth)=[^&\s'\"]+",
    re.IGNORECASE,
)


def redact(text: str) -> str:
    """`text` without what looks like a secret."""
    return SECRET.sub("<hidden>", text)


@contextmanager
def redacted_errors() -> Iterator[None]:
    """Takes secrets out of the message of a UserError, and then drops the errors behind it, which repeat them."""
    try:
        yield
    except UserError as error:
        message = redact(str(error))
        if message == str(error):
            raise
        raise type(error)(message) from None
