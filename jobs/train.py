"""`ray job submit --working-dir . -- python jobs/train.py CONFIG --run-dir RUN`."""

import sys

from refscale.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
