"""Names that other trainers give to the settings of a training."""

from __future__ import annotations

ALIASES = {
    "lr": ("learning_rate", "base_lr", "init_lr", "initial_lr", "rate"),
    "epochs": ("epoch", "num_epochs", "n_epochs", "max_epochs", "nb_epochs"),
    "steps": ("step", "max_steps", "num_steps", "total_steps", "iters", "iterations", "max_iter"),
    "weight_decay": ("wd", "decay", "l2", "weightdecay"),
    "batch_size": ("bs", "batch", "batchsize", "global_batch_size"),
    "threads": ("workers", "num_workers", "loader_workers", "decode_threads", "j"),
    "replicas": ("gpus", "num_gpus", "ngpus", "world_size", "nproc", "nproc_per_node", "nodes"),
    "microbatch": ("micro_batch", "micro_batch_size", "accumulate", "accumulation_steps"),
    "schedule": ("scheduler", "lr_schedule", "lr_scheduler"),
    "dtype": ("amp", "precision", "fp16", "bf16", "half", "mixed_precision"),
    "checkpoint_every": ("save_every", "save_freq", "save_steps", "checkpoint_interval"),
    "validate_every": ("val_every", "eval_every", "eval_freq", "eval_steps", "val_freq"),
    "init": ("pretrained", "weights", "finetune", "checkpoint"),
    "seed": ("random_seed", "manual_seed", "rng"),
    "colour": ("color", "color_jitter"),
    "colour_divide": ("color_divide",),
    "prefetch": ("prefetch_factor", "prefetch_depth"),
    "device": ("accelerator", "cuda", "gpu"),
    "layer_rates": ("lr_mult", "layer_lr", "freeze"),
    "norm": ("normalization", "lrn", "batch_norm", "batchnorm", "bn"),
    "momentum": ("mom", "beta"),
    "patience": ("lr_patience",),
}
"""Names that other trainers give to a setting: an unknown one of these has a sure suggestion."""
MEANT = {alias: name for name, aliases in ALIASES.items() for alias in aliases}
"""Setting that each alias means."""
