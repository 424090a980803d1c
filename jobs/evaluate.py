"""`ray job submit --working-dir . -- python jobs/evaluate.py CONFIG --run-dir RUN`."""

import sys

from refscale.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
