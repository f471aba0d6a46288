"""Run by two processes: save tensors.pt of a folder as a distributed checkpoint, half of every tensor per process."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

folder = Path(sys.argv[1])
dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2,))
tensors = torch.load(folder / "tensors.pt", weights_only=True)
model = {name: distribute_tensor(tensor, mesh, [Shard(0)]) for name, tensor in tensors.items()}
dcp.save({"model": model}, checkpoint_id=folder / "step-3")
dist.destroy_process_group()
