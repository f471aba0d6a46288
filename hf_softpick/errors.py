"""Errors that a user can cause, each with the exit code that the command lines return. Imports nothing heavy."""


class UserError(Exception):
    """A mistake or condition outside the code: one message that says what, where and what to do; no traceback."""

    exit_code = 2


class RecipeError(UserError):
    """The recipe, the command line or the configuration is wrong."""


class DataError(UserError):
    """The data cannot be read, or nothing usable is left of it."""

    exit_code = 3


class CheckpointError(UserError):
    """No checkpoint can be loaded although one was asked for."""

    exit_code = 4


class NumericsError(UserError):
    """Training met too many non-finite losses or gradients in a row."""

    exit_code = 5


class StorageError(UserError):
    """A file could not be written: disk full, no permission."""

    exit_code = 6


class HubError(UserError):
    """The Hub or the network failed after training itself had finished."""

    exit_code = 69


class Stopped(UserError):
    """A signal asked for a stop; the state is saved and the same command resumes."""

    exit_code = 75
