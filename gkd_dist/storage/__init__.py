"""One small interface over files and object stores; `remote` is the only door to fsspec."""

from gkd_dist.storage.store import Storage, parse_url

__all__ = ["Storage", "parse_url"]
