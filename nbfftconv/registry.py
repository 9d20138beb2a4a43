"""Registries: what there is of a kind, by name, in the order of registration."""

from typing import Generic, Protocol, TypeVar

from nbfftconv import epoch


class Named(Protocol):
    """What can be registered.

    Attributes
    ----------
    name : str
        As users and plans call it.
    is_available : bool
        Whether it is to be had in this process; if not, no plan chooses it.
    """

    @property
    def name(self) -> str:
        """As users and plans call it."""

    @property
    def is_available(self) -> bool:
        """Whether it is to be had in this process."""


Item = TypeVar("Item", bound=Named)


class Registry(Generic[Item]):
    """What plans may choose from, and users name.

    Parameters
    ----------
    kind : str
        What messages call it.
    """

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._items: dict[str, Item] = {}
        self._list()

    def _list(self) -> None:  # asked for by every call
        self._names = tuple(self._items)
        self._available = tuple(item for item in self._items.values() if item.is_available)
        epoch.begin()

    def register(self, item: Item) -> None:
        """Let plans choose it, and users name it; of equal costs, that is chosen which was registered first.

        Raises
        ------
        ValueError
            If its name is taken.
        """
        if item.name in ("auto", *self._items):
            raise ValueError(f"the name {item.name!r} is taken")
        self._items[item.name] = item
        self._list()

    def remove(self, name: str) -> None:
        """Take it away again; plans that name it cannot be run any more.

        Raises
        ------
        ValueError
            If there is none of this name.
        """
        self.get(name)
        del self._items[name]
        self._list()

    def get(self, name: str) -> Item:
        """Return that of a name.

        Raises
        ------
        ValueError
            If there is none.
        """
        try:
            return self._items[name]
        except KeyError:
            raise ValueError(f"{self._kind} must be one of {', '.join(self._names)}, got {name!r}") from None

    def candidates(self, name: str = "auto") -> tuple[Item, ...]:
        """Return what a plan may choose from: that of a name, or, for "auto", all that are available.

        Raises
        ------
        ValueError
            If there is none of this name, or it is not available.
        """
        if name == "auto":
            return self._available
        item = self.get(name)
        if not item.is_available:
            raise ValueError(f"the {name} {self._kind} is not available here")
        return (item,)

    def names(self) -> tuple[str, ...]:
        """Return all names."""
        return self._names
