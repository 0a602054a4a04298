"""One of many processes that read a store through one cache: ``python stream_process.py STORE CACHE BARRIER COUNT``.

Waits until ``COUNT`` processes have left a file in ``BARRIER``, reads every object, prints (size, sha256) of each.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from pathlib import Path

from gkd_dist.shards.manifest import Manifest
from gkd_dist.storage import Storage
from gkd_dist.stream.cache import CachedStorage, NodeCache

if __name__ == "__main__":
    url, folder, barrier, count = sys.argv[1:]
    store = Storage.open(url)
    manifest = Manifest.load(store, "graph")
    cached = CachedStorage(store, manifest.parts, NodeCache(folder, 1 << 30))
    Path(barrier, str(os.getpid())).touch()
    while len(os.listdir(barrier)) < int(count):
        time.sleep(0.005)
    read = [cached.read(entry.key) for entry in manifest.parts]
    print(json.dumps([(len(data), hashlib.sha256(data).hexdigest()) for data in read]))
