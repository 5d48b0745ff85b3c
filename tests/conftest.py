"""One torch thread for every test: two cores are enough for the suite, and sums do not depend on the machine."""

import torch

torch.set_num_threads(1)
