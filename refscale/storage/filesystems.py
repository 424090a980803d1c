"""The filesystem of a URI: pyarrow's where it knows the scheme, fsspec's for all others.

In: a URI. Out: a pyarrow filesystem and the path in it. On S3 without a region in the URI, opening
asks the bucket for its region. On Google's store an operation is given up after a minute, unless
the URI sets retry_limit_seconds.
"""

import pyarrow as pa
import pyarrow.fs as pafs

from refscale.errors import StorageError

# Without a limit, Google's client on a machine without credentials does not come back.
_GOOGLE_RETRIES_S = 60


def open_filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    """The filesystem of a URI, and the path in it.

    Raises:
        StorageError: It cannot be opened, in the words of the library that knows the scheme; or
            neither library does.
    """
    asked = uri
    if uri.startswith(("gs://", "gcs://")) and "retry_limit_seconds=" not in uri:
        asked += f"{'&' if '?' in uri else '?'}retry_limit_seconds={_GOOGLE_RETRIES_S}"
    try:
        filesystem, path = pafs.FileSystem.from_uri(asked)
    except (pa.ArrowInvalid, OSError, NotImplementedError) as exc:
        # pyarrow may also be built without a scheme, which is then NotImplementedError.
        unknown = isinstance(exc, NotImplementedError) or "Unrecognized filesystem" in str(exc)
        if not unknown:
            raise StorageError(f"cannot open {uri}: {exc}") from exc
        return _open_with_fsspec(uri)
    return filesystem, path


def _open_with_fsspec(uri: str) -> tuple[pafs.FileSystem, str]:
    import fsspec

    try:
        handler, path = fsspec.core.url_to_fs(uri)
    except (ImportError, ValueError, OSError) as exc:
        raise StorageError(f"cannot open {uri}: {exc}") from exc
    return pafs.PyFileSystem(pafs.FSSpecHandler(handler)), path
