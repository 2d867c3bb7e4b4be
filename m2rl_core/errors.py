"""What a user can mend: the command line prints such an error as one line, without a traceback."""


class StudyError(ValueError):
    """The message is one line that names what is wrong, where, and the mend."""


def one_line(told: object, most: int = 200) -> str:
    """`told` as one line of at most `most` letters; an error without words by its type's name."""
    return " ".join(str(told).split())[:most] or (type(told).__name__ if isinstance(told, BaseException) else "")
