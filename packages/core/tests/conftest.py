"""Tests of CUDA are collected only where there is a device."""

import torch

collect_ignore_glob = [] if torch.cuda.is_available() else ["gpu/*"]
