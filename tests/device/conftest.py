"""These tests run on a device: the pretended one, or a GPU (`make test-device`, `make gpu`)."""

import torch

collect_ignore_glob = ["test_on_*.py"] if torch.get_default_device().type == "cpu" else []
