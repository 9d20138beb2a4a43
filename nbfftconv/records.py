"""Records: the integers that a compiled stage reads, named, and nested where one describes something of its own."""

from array import array
from collections.abc import Iterator
from typing import Any

import numpy as np

_WORD, _CODE = np.dtype(np.int64), "q"


def _paths(dtype: np.dtype, prefix: str = "") -> Iterator[str]:
    for name in dtype.names or ():
        field = dtype[name]
        if field.names:
            yield from _paths(field, f"{prefix}{name}.")
        else:
            assert field == _WORD
            yield prefix + name


def fields(*names: str, **nested: np.dtype) -> np.dtype:
    """Return the type of a record: an int64 for each name, and then nested records."""
    return np.dtype([*((name, _WORD) for name in names), *nested.items()])


class RecordType:
    """The type of a stage's record, whose records are made and changed from Python.

    Parameters
    ----------
    dtype : numpy.dtype
        Of `fields`.

    Attributes
    ----------
    dtype : numpy.dtype
    numbers : list of str
        Names of the fields that are no records.
    index : dict
        From a path such as ``"spectra.address"`` to the number of its word.
    """

    def __init__(self, dtype: np.dtype) -> None:
        self.dtype = dtype
        self.numbers = [name for name in dtype.names or () if dtype[name] == _WORD]
        self.index = {path: number for number, path in enumerate(_paths(dtype))}

    def zeros(self) -> "Record":
        """Return a record of zeros."""
        return Record(array(_CODE, bytes(self.dtype.itemsize)), self.index)

    def make(self, numbers: tuple[Any, ...]) -> "Record":
        """Return a record of the numbers of all fields, in their order; those of a nested record are a tuple."""
        return Record(array(_CODE, np.array(numbers, self.dtype).tobytes()), self.index)


class Record:
    """A record as the array of its words; one of Python's, which copies, changes and tells its address soonest.

    Attributes
    ----------
    words : array.array
        Of int64.
    """

    __slots__ = ("_index", "words")

    def __init__(self, words: "array[int]", index: dict[str, int]) -> None:
        self.words, self._index = words, index

    @property
    def address(self) -> int:
        """Of the first word, as long as this is alive."""
        return self.words.buffer_info()[0]

    def copy(self) -> "Record":
        """Return a record that can be changed."""
        return Record(self.words[:], self._index)

    def __getitem__(self, path: str) -> int:
        return self.words[self._index[path]]

    def __setitem__(self, path: str, value: int) -> None:
        self.words[self._index[path]] = value
