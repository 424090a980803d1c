"""A model's folder on this machine, also where it is kept on an object store."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from refscale.storage.store import Store


@contextmanager
def local_folder(name: str) -> Iterator[str]:
    """Within, a folder that transformers can load: of a URI a copy that is removed afterwards.

    A loaded model does not need it any more: weights are on the device, or in a mapping, which
    outlives its file.

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
    with tempfile.TemporaryDirectory(prefix="refscale-model-") as work:
        for file in store.list_files("", recursive=True):
            store.fetch(file, work)
        yield work
