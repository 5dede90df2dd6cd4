#!/usr/bin/env python3
"""The door of `tsft-prepare`, which tokenises conversations."""

import sys

from megatron_tsft.commands.prepare import main

if __name__ == "__main__":
    sys.exit(main())
