"""A ResNet-18 in plain PyTorch, fed by a Stream: train, evaluate, stop anywhere, resume exactly.

    python examples/resnet.py data/demo runs/resnet
    torchrun --nproc-per-node 2 examples/resnet.py data/demo runs/resnet    # shares each batch

The same command resumes from the last checkpoint, on any number of processes. Afterwards
`duet verify data/demo --ledger runs/resnet` proves that every sample was read once an epoch.
"""

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pipeline import Stream

RECIPE = {"mean": "channel", "std": "channel", "colour": 0, "layout": "NHWC", "crop": "resized"}
"""Normalized by the training set, channels last in memory, RandomResizedCrop."""
WHOLE = {"split": "val", "once": True, "scale": (1, 1), "ratio": (1, 1), "flip": 0}
"""Each validation image once: its largest square in the middle, resized."""


class Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut, a 1x1 convolution where the shape changes."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Identity()
        if stride > 1 or inputs != outputs:
            conv = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(outputs))

    def forward(self, x):
        y = self.norm1(self.conv1(x)).relu()
        return (self.norm2(self.conv2(y)) + self.shortcut(x)).relu()


def make_resnet(classes, width=64):
    """Return a ResNet-18 (He et al. 2015, table 1) whose first stage has `width` channels."""
    stem = [nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    blocks, inputs = [], width
    for stage in range(4):
        outputs = width * 2**stage
        blocks += [Block(inputs, outputs, 2 if stage else 1), Block(outputs, outputs, 1)]
        inputs = outputs
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes)]
    net = nn.Sequential(*stem, nn.MaxPool2d(3, 2, 1), *blocks, *head)
    return net.to(memory_format=torch.channels_last)


def parse_options(arguments, **defaults):
    """Return DATA, RUN and the few settings that all of these examples have."""
    parser = argparse.ArgumentParser()
    parser.add_argument("data")
    parser.add_argument("run", type=Path)
    settings = {"epochs": 5, "batch_size": 128, "size": 128, "width": 64, "save_every": 100}
    for name, value in (settings | {"seed": 0, "lr": 0.1} | defaults).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    return parser.parse_args(arguments)


@torch.inference_mode()
def count_right(model, data, **settings):
    """Return how many validation images this rank has classified right, and of how many."""
    model.eval()
    counts = 0
    with Stream(data, **RECIPE | WHOLE | settings) as stream:
        for batch in stream:  # rows that pad the last batch have weight 0
            right = model(batch.images.float()).argmax(1) == batch.labels
            counts = counts + torch.stack([batch.weights[right].sum(), batch.weights.sum()])
    model.train()
    return counts


def save(path, step, parts):
    """Write a checkpoint, whole or not at all: a state dict of each part, and the step."""
    parts["stream"].flush()  # the ledger reaches as far as the checkpoint, on every rank
    dist.barrier()
    if dist.get_rank() == 0:
        new = path.with_suffix(".new")
        torch.save({name: part.state_dict() for name, part in parts.items()} | {"step": step}, new)
        new.replace(path)


def restore(path, parts):
    """Load the last checkpoint into the parts, and return its step; 0 if there is none."""
    state = torch.load(path, map_location="cpu") if path.exists() else {"step": 0}
    for name in state.keys() & parts.keys():
        parts[name].load_state_dict(state[name])
    return state["step"]


def main(arguments=None):
    options = parse_options(arguments)
    if "RANK" in os.environ:  # torchrun
        dist.init_process_group()
    else:
        dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1)
    rank, world, device = dist.get_rank(), dist.get_world_size(), "cpu"
    if torch.cuda.is_available():
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(device)
    torch.manual_seed(options.seed)  # the same weights on every rank
    common = {"batch_size": options.batch_size, "size": options.size}
    common |= {"rank": rank, "world_size": world, "device": device}
    ledger = options.run / "ledger"
    with Stream(options.data, seed=options.seed, ledger=ledger, **RECIPE | common) as stream:
        net = make_resnet(len(stream.classes), options.width)
        model = DistributedDataParallel(net.to(device))
        optimizer = torch.optim.SGD(model.parameters(), options.lr, 0.9, weight_decay=1e-4)
        steps = options.epochs * stream.steps_per_epoch
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        parts = {"net": net, "optimizer": optimizer, "schedule": schedule, "stream": stream}
        done = restore(options.run / "checkpoint.pt", parts)
        for step, batch in zip(range(done + 1, steps + 1), stream, strict=False):
            # The sum over this rank's slice, by the size of the batch: slices may be uneven.
            loss = F.cross_entropy(model(batch.images.float()), batch.labels, reduction="sum")
            loss = loss / options.batch_size
            optimizer.zero_grad()
            (loss * world).backward()  # the mean over the ranks is taken of it
            optimizer.step()
            schedule.step()
            dist.all_reduce(loss.detach_())
            if rank == 0:
                print(f"step {step} of {steps}: loss {loss:.6f}", flush=True)
            if step % options.save_every == 0 or step == steps:
                save(options.run / "checkpoint.pt", step, parts)
            if step % stream.steps_per_epoch == 0:
                counts = count_right(model, options.data, **common)
                dist.all_reduce(counts)
                if rank == 0:
                    print("right: {:.0f} of {:.0f} validation images".format(*counts), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
