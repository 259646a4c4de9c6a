"""Where pictures come from: listed and read where they lie, never unpacked.

`scan` finds out by looking what a source is:

    SRC/<class>/**/*.jpg              a folder per class (links and nested folders are followed)
    SRC/<class>.tar                   a tar per class, as inside ILSVRC2012_img_train.tar
    SRC.tar                           one tar of such tars, or of `<class>/picture` members
    ILSVRC2012_img_val.tar            unsorted, or a folder of the same, with the ground truth
                                      given or beside it (`ground_truth`)
    SRC/Data/CLS-LOC/{train,val}      Kaggle's tree, with LOC_val_solution.csv
    SRC/{train,val}/...               any of these, the split that is asked for
    SRC/*.parquet                     Hugging Face's: the picture's bytes and its label
    SRC/shard-{000000..000099}.tar    WebDataset shards, local or at an address

A picture ends as a place in a container; `open_reader` reads it from there in any process.

    listing        one row a picture, in mapped files        tar_headers    members of a tar
    folders, tars  a class each, or classes in them          flat           pictures in no class
    ground_truth   their classes, and readable names         devkit         ILSVRC2012's kit
    parquet, webdatasets                                     readers        the bytes again
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
from pipeline.sources.scan import scan

__all__ = [
    "Container",
    "Listing",
    "ListingWriter",
    "Reader",
    "Reject",
    "Unreadable",
    "open_reader",
    "scan",
]
