"""Claims of the paper, with its numbers and the sections that they stand in.

Krizhevsky, Sutskever and Hinton, "ImageNet Classification with Deep Convolutional Neural Networks",
NIPS 2012. Errors are fractions, differences are of errors: negative is better.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

IMAGES, CLASSES, WIDTH, EPOCHS, BATCH = 1_281_167, 1000, 1.0, 90, 128
"""The scale of the paper (ILSVRC-2012): training images, classes, width, passes, batch."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A statement of the paper."""

    key: str
    title: str
    section: str
    """Section, figure or table of the paper."""
    text: str
    """The statement in short, close to the paper's words."""
    number: str = "no number"
    """The paper's number as text."""


@dataclass(frozen=True, kw_only=True)
class Ablation(Claim):
    """A claim that one setting matters; two runs that differ in it alone test it."""

    setting: str
    """Name of the setting in cluster.config."""
    paper_has: Any
    instead: tuple[Any, ...]
    differences: tuple[float | None, float | None] = (None, None)
    """Change of the top-1 and top-5 error by the paper's choice; None: the paper has no number."""
    free: tuple[str, ...] = ()
    """Settings that may differ as well."""
    command: str = ""
    """Flags to add to the command of a run with the paper's choice, for the run without it."""


ERRORS = Claim(
    key="errors",
    title="Error rates",
    section="section 6, tables 1 and 2",
    text="The network errs in 37.5 % of the ILSVRC-2010 test images (top-1; top-5: 17.0 %) and "
    "in 40.7 % (18.2 %) of the ILSVRC-2012 validation images, with ten views each.",
    number="40.7 % / 18.2 %",
)
PAPER_ERRORS = {
    1: "39.0 % / 18.3 % (ILSVRC-2010 test, one view)",
    10: "40.7 % / 18.2 % (ILSVRC-2012 validation, ten views)",
}
"""Top-1 and top-5 error by the number of views."""

VIEWS = Claim(
    key="views",
    title="Ten views",
    section="sections 4.1 and 6",
    text="To average the answers to five crops and their mirror images takes the error on "
    "ILSVRC-2010 from 39.0 % to 37.5 % (top-1), from 18.3 % to 17.0 % (top-5).",
    number="−1.5 / −1.3 points",
)
VIEW_GAIN = (-0.015, -0.013)

KERNELS = Claim(
    key="kernels",
    title="Figure 3: the columns specialise",
    section="section 6.1, figure 3",
    text="The kernels of one GPU are largely colour-agnostic, those of the other largely "
    "colour-specific; this happens in every run, whatever the initial weights.",
    number="every run",
)

ANSWERS = Claim(
    key="answers",
    title="Figure 4, left: five answers",
    section="section 6.1, figure 4",
    text="Even objects off the centre are recognised, and most of the five most probable labels "
    "are reasonable; some images are ambiguous. The paper shows eight test images.",
)

NEIGHBOURS = Claim(
    key="neighbours",
    title="Figure 4, right: neighbours",
    section="section 6.1, figure 4",
    text="Images whose 4096 activations of the last hidden layer are close (Euclidean) are alike "
    "to the network, though their pixels are not close in general.",
)

CODES = Claim(
    key="codes",
    title="Short codes",
    section="section 6.1",
    text="Euclidean distance between 4096 real numbers is inefficient; an auto-encoder to short "
    "binary codes could make it efficient. The paper did not do it.",
)

ENSEMBLE = Claim(
    key="ensemble",
    title="Ensembles",
    section="section 6, table 2",
    text="To average the answers of five such networks takes the error on the ILSVRC-2012 "
    "validation images from 40.7 % to 38.1 % (top-1), from 18.2 % to 16.4 % (top-5).",
    number="5 networks: −2.6 / −1.8 points",
)
ENSEMBLE_ERRORS = {1: "40.7 % / 18.2 %", 5: "38.1 % / 16.4 %"}
"""Top-1 and top-5 error by the number of networks."""

COMPETITION = Claim(
    key="competition",
    title="The competition: seven networks",
    section="section 6, table 2",
    text="Two networks pre-trained on all of ImageNet of fall 2011, with one convolution more, "
    "averaged with the five: 36.7 % (top-1) and 15.4 % (top-5) on the ILSVRC-2012 validation "
    "images, 15.3 % (top-5) on the test images. The second-best entry had 26.2 % there.",
    number="15.3 % against 26.2 % (top-5, test)",
)
SEVEN_ERRORS = "36.7 % / 15.4 %; – / 15.3 % (test)"
SECOND_BEST = 0.262
"""Top-5 error of the second-best entry on the test images, which have no public labels."""

SPEED = Claim(
    key="speed",
    title="Time",
    section="section 5",
    text="90 cycles through 1.2 million images took five to six days on two GTX 580 with 3 GB: "
    "208 to 267 images a second.",
    number="208 to 267 img/s",
)

ABLATIONS = (
    Ablation(
        key="pair", title="Two columns against one", section="section 3.2",
        text="Against a net of one column (half as many kernels in each convolution), the two "
        "columns lower the error by 1.7 % (top-1) and 1.2 % (top-5).",
        number="−1.7 / −1.2 points", differences=(-0.017, -0.012),
        setting="columns", paper_has=2, instead=(1,), free=("columns_per_worker",),
        command="--columns 1",
    ),
    Ablation(
        key="relu", title="ReLU against tanh", section="section 3.1, figure 1",
        text="A four-layer net of ReLUs comes to 25 % training error on CIFAR-10 six times as "
        "fast as one of tanh units; here the error of this network at the end is compared.",
        number="6 times as fast", setting="activation", paper_has="relu", instead=("tanh",),
        free=("lr",), command="--activation tanh",
    ),
    Ablation(
        key="lrn", title="Local response normalisation", section="section 3.3",
        text="It lowers the error by 1.4 % (top-1) and 1.2 % (top-5).",
        number="−1.4 / −1.2 points", differences=(-0.014, -0.012),
        setting="norm", paper_has="lrn", instead=("none",), command="--norm none",
    ),
    Ablation(
        key="lrn_control", title="Local response normalisation against its mean factor",
        section="section 3.3",
        text="The paper has no such control: the factor 2^-0.75, which the normalization comes "
        "to where activations are small, in its place. What it gains over that is its own.",
        setting="norm", paper_has="lrn", instead=("scale",), command="--norm scale",
    ),
    Ablation(
        key="communication", title="Communication between the columns",
        section="section 3.2; the source's network 150",
        text="Columns that exchange nothing before the last layer, with more maps and units for "
        "it, have 1.2 % (top-1) and 1.1 % (top-5) more errors in the source's notes.",
        number="−1.2 / −1.1 points", differences=(-0.0117, -0.0112),
        setting="communication", paper_has=True, instead=(False,),
        command="--no-communication",
    ),
    Ablation(
        key="pooling", title="Overlapping pooling", section="section 3.4",
        text="Windows of 3 with stride 2 instead of 2 with stride 2 lower the error by 0.4 % "
        "(top-1) and 0.3 % (top-5).",
        number="−0.4 / −0.3 points", differences=(-0.004, -0.003),
        setting="pool", paper_has="3/2", instead=("2/2",), command="--pool 2/2",
    ),
    Ablation(
        key="colour", title="Colour augmentation", section="section 4.1",
        text="Shifting the colours along their principal components lowers the top-1 error by "
        "over 1 %.",
        number="over −1 point (top-1)", differences=(-0.01, None),
        setting="colour", paper_has=0.1, instead=(0.0,), command="--colour 0",
    ),
    Ablation(
        key="depth", title="Depth", section="section 7",
        text="To remove any of the middle layers costs about 2 % of top-1 performance.",
        number="about −2 points (top-1)", differences=(-0.02, None),
        setting="without", paper_has="none", instead=("conv3", "conv4", "conv5"),
        command="--without conv4",
    ),
    Ablation(
        key="decay", title="Weight decay", section="section 5",
        text="The small weight decay is not merely a regulariser: it reduces the training error. "
        "Here the validation error is compared.",
        setting="weight_decay", paper_has=5e-4, instead=(0.0,), command="--weight-decay 0",
    ),
)  # fmt: skip
"""Differences are the error with the paper's choice minus that without: negative is better."""
