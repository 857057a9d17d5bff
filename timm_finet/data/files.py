"""Write files completely or not at all, and check in advance that they can be written."""
import os
from contextlib import contextmanager
from pathlib import Path

__all__ = ['check_output', 'replace_file']


def check_output(file: str) -> None:
    """Raise ValueError if `file` cannot be written, e.g. because its folder does not exist or it is a folder."""
    part = Path(f'{file}.part')
    try:
        if Path(file).is_dir():
            raise IsADirectoryError('it is a folder')
        part.touch()
        part.unlink()
    except OSError as error:
        raise ValueError(
            f'output={str(file)!r} cannot be written ({error.strerror or error}): give a file in a folder that exists.'
        ) from error


@contextmanager
def replace_file(file: str):
    """Yield the name of a file to write, which replaces `file` at the end or is deleted after an error."""
    part = f'{file}.part'
    try:
        yield part
        os.replace(part, file)
    except OSError as error:
        raise OSError(f'output={str(file)!r} cannot be written: {error.strerror or error}') from error
    finally:
        Path(part).unlink(missing_ok=True)
