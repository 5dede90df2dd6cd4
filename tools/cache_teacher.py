#!/usr/bin/env python3
"""The door of `tsft-cache`, which keeps what a teacher says."""

import sys

from megatron_tsft.commands.cache import main

if __name__ == "__main__":
    sys.exit(main())
