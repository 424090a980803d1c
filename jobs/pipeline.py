"""`ray job submit --working-dir . -- python jobs/pipeline.py CONFIG --run-dir RUN`: all stages.

Submitting the same command again resumes.
"""

import sys

from refscale.cli import main

if __name__ == "__main__":
    sys.exit(main(["run", *sys.argv[1:]]))
