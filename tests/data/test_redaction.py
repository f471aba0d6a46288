"""What looks like a secret is hidden, in a time that no text can make long."""

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_softpick.data.redaction import SECRET, redact

SIMPLE = re.compile(SECRET.pattern.replace(r"://[^/\s:]*:[^/\s]*@", r"://[^/\s]*:[^/\s]*@"), SECRET.flags)
"""The plain form of what has a password in it; it takes the square of a text's length."""


@given(st.text(alphabet="a:/@ ", max_size=40))
def test_passwords_are_found_as_by_the_simple_pattern(text):
    assert SIMPLE.pattern != SECRET.pattern
    assert redact(f"x://{text}") == SIMPLE.sub("<hidden>", f"x://{text}")


@pytest.mark.parametrize(
    "unit",
    [":", "@", "a:", ":/", "://", "://a:", "https://", "sk-", "sk-a", "hf_", "?token", "&key", "-", "a", "xoxb-"],
)
@pytest.mark.parametrize("start", ["", "://", "https://", "?", "sk-"])
def test_no_text_takes_long(unit, start):
    text = start + unit * (200_000 // len(unit))
    begin = time.perf_counter()
    redact(text)
    assert time.perf_counter() - begin < 5
