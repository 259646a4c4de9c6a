"""A Ray Train loop fed by a Stream: workers that die are started again, and resume exactly.

    python examples/ray_train_loop.py data/demo runs/ray --workers 2

The same command resumes a run whose driver has died. In a cluster, DATA and RUN are on a shared
disk, or DATA is an address such as s3://bucket/data.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ray.train import Checkpoint, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from resnet import RECIPE, count_right, make_resnet, parse_options

from pipeline import Stream


def report(step, loss, parts):
    """Report a step to Ray, with a checkpoint of rank 0: a state dict of each part."""
    parts["stream"].flush()  # the ledger reaches as far as the checkpoint, on every rank
    dist.barrier()
    with TemporaryDirectory() as folder:
        checkpoint = None
        if dist.get_rank() == 0:
            state = {name: part.state_dict() for name, part in parts.items()}
            torch.save(state, f"{folder}/state.pt")
            checkpoint = Checkpoint.from_directory(folder)
        ray.train.report({"step": step, "loss": loss.item()}, checkpoint=checkpoint)


def restore(parts):
    """Load the last checkpoint that was reported, if there is one."""
    if checkpoint := ray.train.get_checkpoint():
        with checkpoint.as_directory() as folder:
            state = torch.load(f"{folder}/state.pt", map_location="cpu")
        for name, part in parts.items():
            part.load_state_dict(state[name])


def work(options):
    """Train in one worker: its rank, world and device come from Ray."""
    context, device = ray.train.get_context(), ray.train.torch.get_device()
    rank, world = context.get_world_rank(), context.get_world_size()
    torch.manual_seed(options.seed)  # the same weights in every worker
    common = {"batch_size": options.batch_size, "size": options.size}
    common |= {"rank": rank, "world_size": world, "device": device}
    ledger = options.run / "ledger"
    with Stream(options.data, seed=options.seed, ledger=ledger, **RECIPE | common) as stream:
        net = make_resnet(len(stream.classes), options.width)
        model = ray.train.torch.prepare_model(net)  # on the device, in DistributedDataParallel
        optimizer = torch.optim.SGD(net.parameters(), options.lr, 0.9, weight_decay=1e-4)
        steps = options.epochs * stream.steps_per_epoch
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        parts = {"net": net, "optimizer": optimizer, "schedule": schedule, "stream": stream}
        restore(parts)
        done = stream.state_dict()["position"] // options.batch_size
        for step, batch in zip(range(done + 1, steps + 1), stream, strict=False):
            # The sum over this worker's slice, by the size of the batch: slices may be uneven.
            loss = F.cross_entropy(model(batch.images.float()), batch.labels, reduction="sum")
            loss = loss / options.batch_size
            optimizer.zero_grad()
            (loss * world).backward()  # the mean over the workers is taken of it
            optimizer.step()
            schedule.step()
            dist.all_reduce(loss.detach_())
            if rank == 0:
                print(f"step {step} of {steps}: loss {loss:.6f}", flush=True)
            if step % options.save_every == 0 or step == steps:
                report(step, loss, parts)
            if step % stream.steps_per_epoch == 0:
                counts = count_right(model, options.data, **common)
                dist.all_reduce(counts)
                if rank == 0:
                    print("right: {:.0f} of {:.0f} validation images".format(*counts), flush=True)


def main(arguments=None):
    options = parse_options(arguments, workers=2)
    options.run = options.run.absolute()  # workers have a folder of their own
    if "://" not in options.data:
        options.data = str(Path(options.data).absolute())
    has_gpu = torch.cuda.is_available()
    run = RunConfig(
        name=options.run.name,
        storage_path=str(options.run.parent),
        failure_config=FailureConfig(max_failures=3),
    )
    TorchTrainer(
        work,
        train_loop_config=options,
        scaling_config=ScalingConfig(num_workers=options.workers, use_gpu=has_gpu),
        run_config=run,
    ).fit()


if __name__ == "__main__":
    from ray_train_loop import main  # so that workers import `work`, and get no pickle of its code

    main()
