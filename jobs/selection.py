"""`ray job submit --working-dir . -- python jobs/selection.py CONFIG --run-dir RUN`."""

import sys
from pathlib import Path

# Not this folder, whose evaluate.py would shadow the package of that name, but the checkout.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from refscale.cli import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(["select", *sys.argv[1:]]))
