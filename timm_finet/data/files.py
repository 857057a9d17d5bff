"""Files that are written whole or not at all, and refused before the work where they cannot be."""
import os
from contextlib import contextmanager
from pathlib import Path

__all__ = ['check_output', 'replace_file']


def check_output(file: str) -> None:
    """Raise ValueError where `file` cannot be written: no such folder, no right to it, or a folder itself."""
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
    """The name of a file to write, which takes the place of `file` at the end and is deleted after an error."""
    part = f'{file}.part'
    try:
        yield part
        os.replace(part, file)
    except OSError as error:
        raise OSError(f'output={str(file)!r} cannot be written: {error.strerror or error}') from error
    finally:
        Path(part).unlink(missing_ok=True)
