"""Where images come from: listed and read where they lie, never unpacked.

`scan` finds out by looking what a source is:

    SRC/<class>/**/*.jpg              a folder per class (links and nested folders are followed)
    SRC/<class>.tar                   a tar per class, as inside ILSVRC2012_img_train.tar
    SRC.tar                           one tar of such tars, or of `<class>/picture` members
    ILSVRC2012_img_val.tar            unsorted, or a folder of the same, with the ground truth
                                      given or beside it (`ground_truth`)
    SRC/Data/CLS-LOC/{train,val}      Kaggle's tree, with LOC_val_solution.csv
    SRC/{train,val}/...               any of these, the split that is asked for
    SRC/*.parquet                     Hugging Face's: the image's bytes and its label
    SRC/shard-{000000..000099}.tar    WebDataset shards, local or at an address

An image ends as a place in a container; `open_reader` reads it from there in any process.

    scan                      which of these it is
    folders, tars, flat       a class each, classes in one tar, images in no class
    ground_truth              the classes of the latter, and readable names of classes
    devkit, matlab            ILSVRC2012's development kit
    parquet*, webdatasets     what has its labels beside its images; class_names, shard_labels
    listing, names            one row an image, in mapped files; what names may be
    tar_headers               the members of a tar, local or not
    readers                   the bytes of an image
    addresses, remote_file    what lies in a store
"""

from pipeline.sources.listing import (
    Container,
    Listing,
    ListingWriter,
    Reader,
    Reject,
    Unreadable,
)
from pipeline.sources.readers import open_reader
from pipeline.sources.scan import other_split, scan

__all__ = [
    "Container",
    "Listing",
    "ListingWriter",
    "Reader",
    "Reject",
    "Unreadable",
    "open_reader",
    "other_split",
    "scan",
]
