"""``python -m fastscore``: the same program as ``fastscore``."""

import sys

from fastscore.cli import main

if __name__ == "__main__":
    sys.exit(main())
