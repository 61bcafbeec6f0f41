import os
import sys
from pathlib import Path

# One thread a test process (pytest-xdist runs several), nothing from the network, and figures without a display.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "agg")
sys.path.insert(0, str(Path(__file__).parent / "contract"))

import torch

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
