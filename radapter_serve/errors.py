"""The one exception that means: the input was wrong, and this sentence says how to mend it."""


class RAdapterError(Exception):
    """An error for people: what is wrong, which value, what is allowed, which command to run next."""
