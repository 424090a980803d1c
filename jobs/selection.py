"""`ray job submit --working-dir . -- python jobs/selection.py CONFIG --run-dir RUN`."""

import sys

from refscale.cli import main

if __name__ == "__main__":
    sys.exit(main(["select", *sys.argv[1:]]))
