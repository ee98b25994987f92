"""The one exception of this package."""


class ConversionError(Exception):
    """A folder, a tensor or an option that cannot be converted.

    The message names the file, the tensor and the value, and says what to do. Commands print it and
    exit with code 2; nothing has been written then.
    """
