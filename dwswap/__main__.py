"""``python -m dwswap``: the same as the command ``dwswap``."""

import sys

from dwswap.cli import main

if __name__ == "__main__":
    sys.exit(main())
