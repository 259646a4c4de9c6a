"""An accelerate loop fed by a Stream: each process gets its share of each batch; exact resume.

    python examples/accelerate_loop.py data/demo runs/accelerate
    accelerate launch --num-processes 2 examples/accelerate_loop.py data/demo runs/accelerate
    torchrun --nproc-per-node 2 examples/accelerate_loop.py data/demo runs/accelerate  # on CPUs

The same command resumes from the last checkpoint, on any number of processes.
"""

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from resnet import RECIPE, count_right, make_resnet, parse_options

from pipeline import Stream


def save(accelerator, folder, stream):
    """Save all that was prepared or registered; the folder gets its name when it is whole."""
    stream.flush()  # the ledger reaches as far as the checkpoint, in every process
    accelerator.wait_for_everyone()
    new = folder.with_suffix(".new")
    accelerator.save_state(new)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        new.rename(folder)


def main(arguments=None):
    options = parse_options(arguments)
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    set_seed(options.seed)
    world = accelerator.num_processes
    common = {"batch_size": options.batch_size, "size": options.size, "device": accelerator.device}
    common |= {"rank": accelerator.process_index, "world_size": world}
    ledger = options.run / "ledger"
    with Stream(options.data, seed=options.seed, ledger=ledger, **RECIPE | common) as stream:
        batches = stream.as_iterable()  # epochs of len(batches) batches, and a state
        net = make_resnet(len(stream.classes), options.width)
        optimizer = torch.optim.SGD(net.parameters(), options.lr, 0.9, weight_decay=1e-4)
        steps = options.epochs * len(batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        # Two things are not prepared: the stream has cut its batches by process already, and a
        # DataLoader around it would be cut again; a prepared schedule takes a step per process.
        model, optimizer = accelerator.prepare(net, optimizer)
        accelerator.register_for_checkpointing(batches, schedule)
        if saved := sorted(options.run.glob("step-????????")):
            accelerator.load_state(saved[-1])
        step = batches.state_dict()["position"] // options.batch_size
        for _ in range(step // len(batches), options.epochs):
            for batch in batches:  # after a resume: the rest of the epoch
                # The sum over this process's slice, by the size of the batch: slices may be uneven.
                loss = F.cross_entropy(model(batch.images.float()), batch.labels, reduction="sum")
                loss = loss / options.batch_size
                optimizer.zero_grad()
                accelerator.backward(loss * world)  # the mean over the processes is taken of it
                optimizer.step()
                schedule.step()
                step += 1
                loss = accelerator.reduce(loss.detach())
                accelerator.print(f"step {step} of {steps}: loss {loss:.6f}", flush=True)
                if step % options.save_every == 0 or step == steps:
                    save(accelerator, options.run / f"step-{step:08d}", stream)
            counts = accelerator.reduce(count_right(model, options.data, **common))
            accelerator.print("right: {:.0f} of {:.0f} validation images".format(*counts))
    accelerator.end_training()


if __name__ == "__main__":
    main()
