"""The one exception that a user is meant to read."""

from __future__ import annotations


class UserError(Exception):
    """A mistake in the input, told in one line that names the thing and the mend; the command line exits with 2."""
