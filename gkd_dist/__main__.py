"""``python -m gkd_dist`` is ``gkd``."""

import sys

from gkd_dist.cli import main

sys.exit(main())
