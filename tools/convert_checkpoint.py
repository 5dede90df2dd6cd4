#!/usr/bin/env python3
"""The door of `tsft-convert`, which converts models between Hugging Face and Megatron."""

import sys

from megatron_tsft.commands.convert import main

if __name__ == "__main__":
    sys.exit(main())
