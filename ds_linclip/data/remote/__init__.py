"""Files behind paths and URLs; remote ones are read through a cache on the local disk."""

from ds_linclip.data.remote.filesystem import Storage
from ds_linclip.data.remote.urls import check_url, is_remote, local_path, redact

__all__ = ["Storage", "check_url", "is_remote", "local_path", "redact"]
