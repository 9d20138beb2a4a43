"""What the package has written to its cache folder: how much that is, and its removal.

Only files with the names that the package gives are counted and removed, each by itself and within folders that were
opened and checked as for reading. What else is there, links among it, stays, and so do folders that it is in.
"""

import contextlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from nbfftconv.jit import stamp
from nbfftconv.store import ABSENT, STAMP, TEMPORARY, Folder, Refused, existing_folder

_KERNELS = "kernels"
_KERNEL = re.compile(r"[0-9a-f]{64}\.kernel")
_DOCUMENT = re.compile(r"([a-z]+-wisdom|(?:machine|profile)-[0-9a-f]{8})\.json(\.lock|\.ignored)?")

#: Kinds of files, in the order in which they are listed.
KINDS = ("machine code", "machine code of other versions", "wisdom", "machine", "profile", "unfinished")


@dataclass
class Amount:
    """Number of files, and their bytes."""

    files: int = 0
    nbytes: int = 0

    def add(self, nbytes: int) -> None:
        """Count one more file."""
        self.files, self.nbytes = self.files + 1, self.nbytes + nbytes


def size() -> dict[str, Amount]:
    """Return how much there is of each kind of `KINDS`.

    Raises
    ------
    nbfftconv.store.Refused
        If the folder, or one in it, is not used because others may write it.
    """
    amounts = {kind: Amount() for kind in KINDS}
    for _, _, kind, nbytes in _files():
        amounts[kind].add(nbytes)
    return amounts


def clear(keep_profile: bool = False) -> Amount:
    """Remove everything that the package has written, for this machine and for others that share the folder.

    Processes that run go on; what they measure or compile from now on is kept again. Of two that add to one file at
    this very moment, one's addition may be lost.

    Parameters
    ----------
    keep_profile : bool, default False
        Keep what was measured with ``measure=True`` or by ``nbfftconv tune``, which takes minutes.

    Returns
    -------
    Amount
        What was removed.

    Raises
    ------
    OSError
        If something cannot be removed, or is not used because others may write it.
    """
    return _remove({kind for kind in KINDS if kind != "profile" or not keep_profile})


def prune() -> Amount:
    """Remove machine code of other versions of the package, and of other versions of what compiles it.

    Returns
    -------
    Amount
        What was removed.

    Raises
    ------
    OSError
        As `clear` does.
    RuntimeError
        If it is not known which machine code is of this version.
    """
    if stamp() is None:
        raise RuntimeError("the package's source is not to be had, so nobody knows which machine code is of others")
    return _remove({"machine code of other versions"})


def _remove(kinds: set[str]) -> Amount:
    removed = Amount()
    for folder, name, kind, nbytes in _files():
        if kind in kinds:
            with contextlib.suppress(*ABSENT):  # a process has finished it, or removed it
                folder.remove(name)
                removed.add(nbytes)
    _remove_empty_folders(None if "machine code" in kinds else stamp())
    return removed


def _remove_empty_folders(kept: str | None) -> None:
    """Remove the folders of machine code that are empty, and the one that they are in; not the cache folder itself."""
    with contextlib.suppress(OSError):
        with existing_folder(_KERNELS) as folder:
            for name in filter(STAMP.fullmatch, folder.names()):
                with contextlib.suppress(OSError):  # it is not empty
                    if name != kept:
                        folder.remove_folder(name)
        with existing_folder() as folder:
            folder.remove_folder(_KERNELS)


def _files() -> Iterator[tuple[Folder, str, str, int]]:
    """Yield the package's files: the folder, open as long as it is looked at, the name, the kind and the bytes."""
    yield from _files_in(_kind_of_document)
    try:
        with existing_folder(_KERNELS) as folder:
            stamps = list(filter(STAMP.fullmatch, folder.names()))
    except Refused:
        raise
    except ABSENT:
        stamps = []
    for name in stamps:
        yield from _files_in(_kind_of_code if name == stamp() else _kind_of_other_code, _KERNELS, name)


def _kind_of_document(name: str) -> str | None:
    found = _DOCUMENT.fullmatch(name)
    if found is None:
        return _kind_of_rest(name)
    return "wisdom" if found[1].endswith("-wisdom") else found[1].partition("-")[0]


def _kind_of_code(name: str) -> str | None:
    return "machine code" if _KERNEL.fullmatch(name) else _kind_of_rest(name)


def _kind_of_other_code(name: str) -> str | None:
    return "machine code of other versions" if _KERNEL.fullmatch(name) or TEMPORARY.fullmatch(name) else None


def _kind_of_rest(name: str) -> str | None:
    return "unfinished" if TEMPORARY.fullmatch(name) else None


def _files_in(kind_of: Callable[[str], str | None], *names: str) -> Iterator[tuple[Folder, str, str, int]]:
    try:
        with existing_folder(*names) as folder:
            for name in folder.names():
                kind = kind_of(name)
                nbytes = folder.size(name) if kind else None
                if kind and nbytes is not None:
                    yield folder, name, kind, nbytes
    except Refused:
        raise
    except ABSENT:  # there is none, or it was removed meanwhile
        pass
