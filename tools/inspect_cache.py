#!/usr/bin/env python3
"""The door of `tsft-inspect-cache`, which says what is in a teacher cache."""

import sys

from megatron_tsft.commands.inspect_cache import main

if __name__ == "__main__":
    sys.exit(main())
