"""What ``joblib.Memory`` calls instead of its own file store. Imported on a miss only: joblib imports numpy.

joblib's store pickles, keeps two files an entry, names them after a hash of live objects, and wipes a function's entries when that
function's text changes, though not when a helper's does. Here one store stands for one entry of the memo, whose name is the digest of
its whole spec: joblib's call ids and its check of the function's code decide nothing, and there is nothing that it could wipe.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

from joblib import Memory, StoreBackendBase, register_store_backend

if TYPE_CHECKING:
    from optkit.memo import Miss

BACKEND = "optkit"


def call(miss: Miss, *, force: bool) -> None:
    """Let joblib read, or compute and keep, what ``miss`` describes. ``force`` computes without reading."""
    memory = Memory(miss.folder, backend=BACKEND, verbose=0, backend_options={"miss": miss})
    cached = memory.cache(miss)
    if force:
        cached.call(miss.key.spec)
    else:
        cached(miss.key.spec)


class EntryStore(StoreBackendBase):  # type: ignore[misc]
    """The one entry of a ``Miss``. It inherits the interface alone, so that no method of joblib's reads or writes a pickle."""

    def configure(self, location: str, verbose: int = 0, backend_options: dict[str, Any] | None = None) -> None:
        self.location = location
        self._miss: Miss = (backend_options or {})["miss"]

    def contains_item(self, call_id: Any) -> bool:
        return self._miss.read()

    def load_item(self, call_id: Any, **_: Any) -> Any:
        return self._miss.value

    def dump_item(self, call_id: Any, item: Any, verbose: int = 0) -> None:
        self._miss.keep()

    def get_cached_func_code(self, call_id: Any) -> str:
        """The text that joblib finds for the function of today too (see ``Miss.__repr__``): never a change, so never a wipe."""
        return repr(self._miss)

    def get_cached_func_info(self, call_id: Any) -> dict[str, str]:
        return {"location": self.location}

    def store_cached_func_code(self, call_id: Any, func_code: str | None = None) -> None:
        """The entry's key says what code it was."""

    def get_metadata(self, call_id: Any) -> dict[str, Any]:
        return {}

    def store_metadata(self, call_id: Any, metadata: dict[str, Any]) -> None:
        """Time and duration are in the entry."""

    def _unused(self, *_: Any) -> NoReturn:
        raise NotImplementedError("optkit's memo lists, clears and limits its entries itself")

    _open_item = _item_exists = _move_item = create_location = clear_location = get_items = _unused


register_store_backend(BACKEND, EntryStore)
