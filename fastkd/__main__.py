"""`python -m fastkd`."""

import os
import sys

from fastkd.cli import main

if __name__ == "__main__":
    status = main()
    if status != 0 and os.environ.get("WORLD_SIZE", "1") != "1":
        # torch.distributed's threads may still wait for processes that are gone: an exit in order could abort, or hang.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
