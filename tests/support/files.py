"""A reader of the files that a policy names, from one folder."""

from pathlib import Path

from itmlang.source import Reader, Source, UnreadableError


def beside(folder: Path, known: dict[str, Source] | None = None) -> Reader:
    """Files come from the folder, by the name they are written with; each is read once.

    `known` comes to hold all that were read, by name.
    """
    known = {} if known is None else known

    def read(path: str, by: Source, library: bool) -> Source:
        known.setdefault(by.name, by)
        if path not in known:
            if not (folder / path).is_file():
                raise UnreadableError("there is no such file")
            known[path] = Source(path, (folder / path).read_text())
        return known[path]

    return read
