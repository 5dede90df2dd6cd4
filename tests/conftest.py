"""For every test: kernels run in Triton's interpreter where there is no GPU, decided before triton
is imported; hypothesis tries the same examples each time, however long they take."""

import os

import torch
from hypothesis import settings

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
settings.load_profile("ci")  # hypothesis's own: no deadline, no database, derandomized
