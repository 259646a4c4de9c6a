"""A Lightning loop fed by a Stream: a DataModule with two streams and the state of one of them.

    python examples/lightning_loop.py data/demo runs/lightning
    python examples/lightning_loop.py data/demo runs/lightning --devices 2

The same command resumes from the last checkpoint, on any number of devices.
"""

import lightning
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from resnet import RECIPE, WHOLE, make_resnet, parse_options

from pipeline import Stream


class Images(lightning.LightningDataModule):
    """The training set, endless and cut into epochs, and the validation set, once an epoch."""

    def __init__(self, options):
        super().__init__()
        self.options = options

    def setup(self, stage):  # in each process, which knows its rank by now
        options, trainer = self.options, self.trainer
        common = {"rank": trainer.global_rank, "world_size": trainer.world_size}
        common |= {"batch_size": options.batch_size, "size": options.size}
        common |= RECIPE | {"device": trainer.strategy.root_device}
        self.train = Stream(
            options.data, seed=options.seed, ledger=options.run / "ledger", **common
        )
        self.val = Stream(options.data, **common | WHOLE)
        self.batches = self.train.as_iterable()

    def train_dataloader(self):
        return self.batches  # no DataLoader: an iterable with a len is all that a Trainer needs

    def val_dataloader(self):
        return self.val.as_iterable()

    # Lightning saves and loads the state of the iterable by itself, but does not load it after a
    # checkpoint at an epoch's end, nor with `estimated_stepping_batches`: here it always is.
    def state_dict(self):
        self.train.flush()  # the ledger reaches as far as the checkpoint, in every process
        self.trainer.strategy.barrier()
        return self.batches.state_dict()

    def load_state_dict(self, state):
        self.batches.load_state_dict(state)

    def teardown(self, stage):
        self.train.close()
        self.val.close()


class Classifier(lightning.LightningModule):
    """A ResNet-18; a step's loss is the sum over this process's slice by the size of the batch."""

    def __init__(self, options):
        super().__init__()
        self.options = options

    def setup(self, stage):  # the DataModule is set up before
        classes = len(self.trainer.datamodule.train.classes)
        self.net = make_resnet(classes, self.options.width)

    def training_step(self, batch, index):
        loss = F.cross_entropy(self.net(batch.images.float()), batch.labels, reduction="sum")
        return loss * self.trainer.world_size / self.options.batch_size  # slices may be uneven

    def on_train_batch_end(self, outputs, batch, index):
        loss = self.trainer.strategy.reduce(outputs["loss"], reduce_op="mean")
        steps = self.trainer.estimated_stepping_batches
        self.print(f"step {self.global_step} of {steps}: loss {loss:.6f}", flush=True)

    def on_train_end(self):  # after the last step alone, Lightning would begin one more epoch
        self.trainer.save_checkpoint(self.options.run / "last.ckpt")

    def on_validation_epoch_start(self):
        self.counts = torch.zeros(2, device=self.device)

    def validation_step(self, batch, index):  # rows that pad the last batch have weight 0
        right = self.net(batch.images.float()).argmax(1) == batch.labels
        self.counts += torch.stack([batch.weights[right].sum(), batch.weights.sum()])

    def on_validation_epoch_end(self):
        counts = self.trainer.strategy.reduce(self.counts, reduce_op="sum")
        self.print("right: {:.0f} of {:.0f} validation images".format(*counts))

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), self.options.lr, 0.9, weight_decay=1e-4)
        steps = self.trainer.estimated_stepping_batches
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def main(arguments=None):
    options = parse_options(arguments, devices=1)
    lightning.seed_everything(options.seed)
    saver = ModelCheckpoint(
        options.run, "last", every_n_train_steps=options.save_every, enable_version_counter=False
    )
    trainer = lightning.Trainer(
        max_epochs=options.epochs, devices=options.devices, callbacks=[saver], logger=False
    )
    saved = options.run / "last.ckpt"
    resumed = saved if saved.exists() else None
    trainer.fit(Classifier(options), Images(options), ckpt_path=resumed)


if __name__ == "__main__":
    main()
