"""The error that every room of the data package raises for a folder, file or setting that a user can mend."""

from tinymim_fast.errors import InputError, printable


class DataError(InputError):
    """A folder, image file or loader setting that can't be used; the message names it and what is wanted."""


class ImageError(DataError):
    """One image that can't be decoded, for the `reason`; the message names it too."""

    def __init__(self, message: str, reason: str = ""):
        super().__init__(message)
        self.reason = reason


def name_some(names, limit: int = 10) -> str:
    """The first `limit` names and how many more there are, for messages about many files; printable."""
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(printable(str(name)) for name in names[:limit]) + more
