"""Exit codes and messages that every command line shares."""

import pytest

from hf_softpick.commands import exit_code
from hf_softpick.errors import DataError


def _raise(error):
    raise error


@pytest.mark.parametrize(
    ("command", "code", "message"),
    [
        (lambda: None, 0, ""),
        (lambda: 3, 3, ""),
        (lambda: _raise(DataError("no text")), 3, "no text\n"),
        (lambda: open("missing/file", "w"), 6, "missing/file: No such file or directory\n"),
        (lambda: _raise(KeyboardInterrupt), 130, "interrupted\n"),
    ],
)
def test_codes_and_messages(command, code, message, capsys):
    assert exit_code(command) == code
    assert capsys.readouterr().err == message


def test_bugs_and_debugging_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        exit_code(lambda: 1 / 0)
    with pytest.raises(DataError):
        exit_code(lambda: _raise(DataError("no text")), debug=True)
