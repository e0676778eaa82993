"""Small tensors on busy cores: one thread, as the scorer itself sets."""

import torch

torch.set_num_threads(1)
