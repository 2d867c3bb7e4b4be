"""What a user can mend: the command line prints such an error as one line, without a traceback."""


class StudyError(ValueError):
    """The message is one line that names what is wrong, where, and the mend."""
