"""A folder of a model or dataset on this machine, also where an object store keeps it."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from refscale.storage.store import Store


@contextmanager
def local_folder(name: str) -> Iterator[str]:
    """Within, a folder that libraries can load: of a URI a copy that is removed afterwards.

    What is loaded does not need it any more: weights are on the device, or in a mapping, as the
    rows of a dataset, which outlives its file.

    Raises:
        StorageError: The URI cannot be read.
    """
    if "://" not in name:
        yield name
        return
    store = Store(name)
    if store.is_local:
        yield store.uri
        return
    with tempfile.TemporaryDirectory(prefix="refscale-copy-") as work:
        for file in store.list_files("", recursive=True):
            store.fetch(file, work)
        yield work
