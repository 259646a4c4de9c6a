"""Sources of images: listed and read where they lie, never unpacked.

`scan` detects the kind of a source:

    SRC/<class>/**/*.jpg              a folder per class (links and nested folders are followed)
    SRC/<class>.tar                   a tar per class, as inside ILSVRC2012_img_train.tar
    SRC.tar                           one tar of such tars, or of `<class>/image` members
    ILSVRC2012_img_val.tar            unsorted, or a folder of the same, with the ground truth
    ILSVRC2010_images_test.tar        given or beside it (`imagenet`)
    SRC/Data/CLS-LOC/{train,val}      Kaggle's tree, with LOC_val_solution.csv
    SRC/{train,val}/...               any of these, the split that is asked for
    SRC/*.parquet                     Hugging Face's: the image's bytes and its label
    SRC/shard-{000000..000099}.tar    WebDataset shards, local or at an address

A listed image is a place in a container; `open_reader` reads it from there in any process.

    scan        detects the kind of a source
    folders     folders of classes; unsorted folders and tars
    store_folders   folders of classes in a store
    tars        tars of classes
    imagenet    ILSVRC's ground truth, development kit and class names
    matlab      struct arrays of MATLAB files
    parquet     parquet files of Hugging Face
    webdataset  WebDataset shards
    classes     labels beside images -> the list of classes
    listing     one row an image, in mapped files
    faults      damaged sources, and how many images that costs
    paths       globs, brace ranges, addresses -> files
    names       images, archives and bystanders, by their names
    readers     bytes of an image
"""

from pipeline.sources.listing import (
    Container,
    Listing,
    ListingWriter,
    Reject,
    SourceReader,
    Unreadable,
)
from pipeline.sources.readers import open_reader
from pipeline.sources.scan import SPLITS, SplitName, find_other_splits, scan

__all__ = [
    "SPLITS",
    "Container",
    "Listing",
    "ListingWriter",
    "Reject",
    "SourceReader",
    "SplitName",
    "Unreadable",
    "find_other_splits",
    "open_reader",
    "scan",
]
