"""The items of one partition: a 64-bit key for each text, and the text for each key.

What the store holds is asked for in one question a batch, for all items that this process meets for the first time.
Two texts under one key stop the work by name: the model could not tell them apart.
"""

from typing import cast

from streamgr.errors import Damaged, DataError
from streamgr.events import item_key
from streamgr.state import codec
from streamgr.state.rocks import Batch
from streamgr.state.store import Store

KNOWN = 1 << 17  # items remembered; past that, all are forgotten and asked for again


class Items:
    """The dictionary of one store, for its writer."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._keys: dict[str, int] = {}
        self._texts: dict[int, str] = {}
        self._fresh: dict[int, str] = {}  # perhaps not in the store

    def key(self, text: str) -> int:
        """The item's key; its text is kept from the next `settle` on. Raises `DataError` should two share a key."""
        key = self._keys.get(text)
        if key is None:
            key = item_key(text)
            self._same(key, self._texts.get(key, text), text)
            self._keys[text], self._texts[key], self._fresh[key] = key, text, text
        return key

    def keys(self, texts: list[str]) -> list[int]:
        """The keys of many items."""
        keys = [*map(self._keys.get, texts)]
        return [self.key(text) for text in texts] if None in keys else cast(list[int], keys)

    def text(self, key: int) -> str:
        """The text of an item that an event names. Raises `Damaged` where it is missing."""
        text = self._texts.get(key) or self.find(key)
        if text is None:
            self._store.database.condemn()
            raise Damaged(f"the item {key:016x} has no text", where=str(self._store.path))
        return text

    def find(self, key: int) -> str | None:
        """The text of whatever item; None if it was never seen."""
        text = self._texts.get(key)
        if text is None and (text := self._store.item_text(key)) is not None:
            self._keys[text], self._texts[key] = key, text
        return text

    def settle(self, batch: Batch) -> None:
        """Put the texts that the store lacks into the batch. Raises `DataError` should two share a key."""
        if not self._fresh:
            return
        for (key, text), stored in zip(self._fresh.items(), self._store.item_texts([*self._fresh]), strict=True):
            if stored is None:
                batch.put("items", codec.item_bytes(key), text.encode())
            else:
                self._same(key, stored, text)
        self._fresh = {}

    def written(self) -> None:
        """The batch lies in the store: what was learned from it may be forgotten."""
        if len(self._keys) > KNOWN:
            self._keys, self._texts = {}, {}

    def _same(self, key: int, known: str, text: str) -> None:
        if known != text:
            raise DataError(
                f"items {known!r} and {text!r} share the key {key:016x}",
                where=str(self._store.path),
                remedy="rename one of them at its source: the model could not tell them apart",
            )
